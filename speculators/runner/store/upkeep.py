"""Verifies a store, removes what is unused (`gc`), and measures its size.

An artifact can be removed if no kept run has its key and nothing has used it for some days; so can quarantined
directories and work directories that were not resumed. A run marks every artifact that it uses, cache hits included.
An artifact that another process has claimed, or reads under a claim, is never removed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from speculators.runner.planning.graph import KINDS
from speculators.runner.store import artifact as artifacts
from speculators.runner.store.artifacts import Store

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A path below artifacts/, where only artifacts should be."""

    stage: str
    key: str
    """The name of its directory: a key, unless it is a foreign path."""
    path: Path
    damage: str
    """What is wrong with it; empty if it is intact."""


def entries(store: Store, stages: Collection[str] = ()) -> Iterator[Entry]:
    """Hash every artifact of these stages (none: all) again. Hidden files are skipped."""
    for stage in _visible(store.root / "artifacts"):
        if stages and stage.name not in stages:
            continue
        if not stage.is_dir():
            yield Entry(stage=stage.name, key="", path=stage, damage="it is not the directory of a stage")
            continue
        for start in _visible(stage):
            if not start.is_dir():
                yield Entry(stage=stage.name, key=start.name, path=start, damage="it is not a directory of artifacts")
                continue
            for path in _visible(start):
                yield Entry(stage=stage.name, key=path.name, path=path, damage=_damage(path))


def quarantine(store: Store, entry: Entry) -> Path | None:
    """Move a damaged or foreign entry to quarantine; return its new path, None if its key is claimed."""
    name = "-".join(filter(None, (entry.stage, entry.key)))
    if not _is_key(entry.key):
        return store.quarantine_path(entry.path, name)
    with store.claimed_at_once(entry.stage, entry.key) as claimed:
        return store.quarantine_path(entry.path, name) if claimed else None


def _damage(path: Path) -> str:
    if path.is_symlink() or not path.is_dir():
        return "it is not an artifact"
    try:
        artifact = artifacts.read_artifact(path)
    except OSError as error:
        return f"artifact.json cannot be read: {error.strerror}"
    except ValueError as error:
        return f"artifact.json is damaged: {error}"
    if (artifact.stage, artifact.key) != (path.parents[1].name, path.name) or path.parent.name != path.name[:2]:
        return f"its artifact.json is that of {artifact.stage} {artifact.key[:8]}"
    return artifacts.damage(artifact)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unused:
    """A directory that can be removed."""

    what: str
    """`artifact`, `work` or `quarantine`."""
    stage: str
    key: str
    path: Path
    bytes: int
    days: float
    """Since it was last used."""


def keys_of_runs(runs: Path) -> set[str]:
    """The keys of all runs below a directory; of one without run.json (killed, or running), those of its events."""
    keys: set[str] = set()
    for run in runs.glob("*/"):
        try:
            keys |= {step["key"] for step in json.loads((run / "run.json").read_text())["steps"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            keys |= _decided(run / "events.jsonl")
    return keys


def _decided(events: Path) -> set[str]:
    try:
        lines = events.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {match[1] for line in lines if (match := re.search(r'"key": "([0-9a-f]{64})"', line))}


def find_unused(store: Store, kept: Collection[str], days: float) -> list[Unused]:
    """Directories without a kept key that are not in use and unused for `days`; oldest first."""
    busy = {*kept, *store.in_use()}
    unused = [item for item in _everything(store) if item.days >= days and item.key not in busy]
    return sorted(unused, key=lambda item: -item.days)


def remove(store: Store, unused: Unused) -> bool:
    """Delete a directory; return false if its key is claimed, or was used in the meantime."""
    if unused.what == "quarantine":
        _delete(unused.path)
        return True
    with store.claimed_at_once(unused.stage, unused.key) as claimed:
        if not claimed:
            return False
        if unused.what == "work":
            store.discard_work(unused.stage, unused.key)
            return True
        if _age(unused.path / "artifact.json") < unused.days:
            return False
        quarantined = store.quarantine(unused.stage, unused.key)  # one rename: no reader sees it incomplete
        if quarantined is not None:
            _delete(quarantined)
        return True


def discard(store: Store, artifact: artifacts.Artifact) -> None:
    """Delete an artifact of this store, unless another process has claimed its key."""
    if artifact.path.is_relative_to(store.root):
        with store.claimed_at_once(artifact.stage, artifact.key) as claimed:
            quarantined = store.quarantine(artifact.stage, artifact.key) if claimed else None
        if quarantined is not None:
            _delete(quarantined)


def _everything(store: Store) -> Iterator[Unused]:
    for stage in KINDS:
        for artifact in store.own_artifacts(stage):
            stamp = artifact.path / "artifact.json"
            yield Unused(
                what="artifact", stage=stage, key=artifact.key, path=artifact.path, bytes=artifact.bytes,
                days=_age(stamp),
            )  # fmt: skip
        for path in _visible(store.root / "work" / stage):
            yield Unused(
                what="work", stage=stage, key=path.name, path=path, bytes=total_bytes(path),
                days=min(map(_age, [path, *path.rglob("*")])),
            )  # fmt: skip
    for path in _visible(store.root / "quarantine"):
        name, _, nanoseconds = path.name.rpartition("-")
        if name and nanoseconds.isdecimal():
            stage, _, key = name.rpartition("-")
            days = max(0.0, (time.time() - int(nanoseconds) / 1e9) / SECONDS_PER_DAY)
            yield Unused(what="quarantine", stage=stage, key=key, path=path, bytes=total_bytes(path), days=days)


def _visible(directory: Path) -> list[Path]:
    """Paths in a directory, sorted; [] if it is missing. Hidden names are skipped: file systems use them."""
    return sorted(directory.glob("[!.]*"))


def _is_key(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", name) is not None


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age(path: Path) -> float:
    """Days since a path was last written; 0 if it is missing or its time is in the future, so that it is kept."""
    try:
        return max(0.0, (time.time() - path.stat().st_mtime) / SECONDS_PER_DAY)
    except OSError:
        return 0.0


def store_bytes(store: Store) -> int:
    """Size of a store in bytes: artifacts, work, quarantine, and files that servers write for their clients."""
    return total_bytes(*(store.root / part for part in ("artifacts", "work", "quarantine", "services")))


def total_bytes(*paths: Path) -> int:
    """Size in bytes of all files below directories, which may be missing or change; hard links count once."""
    return sum(_file_sizes(paths))


def _file_sizes(paths: Iterable[Path]) -> Iterable[int]:
    linked = set[tuple[int, int]]()
    for directory, _, names in itertools.chain.from_iterable(os.walk(path) for path in paths):
        for name in names:
            try:
                status = os.lstat(f"{directory}/{name}")
            except OSError:
                continue
            if status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in linked:
                    continue
                linked.add((status.st_dev, status.st_ino))
            yield status.st_size
