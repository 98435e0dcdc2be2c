"""Looking after a store: what is not what it should be, what may go, and how much it holds.

An artifact may go when no run that is kept names its key and nothing has used it for some days; so may what was set
aside and the work directories of attempts that nobody resumed. A run marks what it uses, its hits too. What another
process holds the claim of, or reads while it makes something else, is never touched.
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

DAY = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What lies where an artifact should be."""

    stage: str
    key: str
    """The name of its directory: a key, unless something else has come there."""
    path: Path
    trouble: str
    """What is wrong with it; empty if nothing is."""


def entries(store: Store, stages: Collection[str] = ()) -> Iterator[Entry]:
    """Everything below artifacts/, of all stages if none is named, read and hashed again. Hidden files do not count."""
    for stage in _visible(store.root / "artifacts"):
        if stages and stage.name not in stages:
            continue
        if not stage.is_dir():
            yield Entry(stage=stage.name, key="", path=stage, trouble="it is no directory of a stage")
            continue
        for start in _visible(stage):
            if not start.is_dir():
                yield Entry(stage=stage.name, key=start.name, path=start, trouble="it is no directory of artifacts")
                continue
            for path in _visible(start):
                yield Entry(stage=stage.name, key=path.name, path=path, trouble=_trouble(path))


def move_aside(store: Store, entry: Entry) -> Path | None:
    """Move an entry that is broken or foreign to aside/; None if somebody else is at work on its key."""
    name = "-".join(filter(None, (entry.stage, entry.key)))
    if not _is_key(entry.key):
        return store.move_aside(entry.path, name)
    with store.claimed_at_once(entry.stage, entry.key) as ours:
        return store.move_aside(entry.path, name) if ours else None


def _trouble(path: Path) -> str:
    if path.is_symlink() or not path.is_dir():
        return "it is no artifact"
    try:
        artifact = artifacts.read_artifact(path)
    except OSError as error:
        return f"artifact.json cannot be read: {error.strerror}"
    except ValueError as error:
        return f"artifact.json is damaged: {error}"
    if (artifact.stage, artifact.key) != (path.parents[1].name, path.name) or path.parent.name != path.name[:2]:
        return f"it says that it is {artifact.stage} {artifact.key[:8]}"
    return artifacts.trouble(artifact)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubbish:
    """One directory that may go."""

    what: str
    """`artifact`, `work` or `aside`."""
    stage: str
    key: str
    path: Path
    bytes: int
    days: float
    """Since it was last used."""


def named_by_runs(runs: Path) -> set[str]:
    """The keys of every run below a directory, of one that was killed or still goes on those that it has decided."""
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
    return {found[1] for line in lines if (found := re.search(r'"key": "([0-9a-f]{64})"', line))}


def rubbish(store: Store, kept: Collection[str], days: float) -> list[Rubbish]:
    """What may go: not of a kept key, not in use, and not used for so many days; oldest first."""
    busy = {*kept, *store.in_use()}
    found = [r for r in _everything(store) if r.days >= days and r.key not in busy]
    return sorted(found, key=lambda r: -r.days)


def remove(store: Store, unwanted: Rubbish) -> bool:
    """Delete one; false if somebody else is at work on its key, or has used it since it was looked at."""
    if unwanted.what == "aside":
        _delete(unwanted.path)
        return True
    with store.claimed_at_once(unwanted.stage, unwanted.key) as ours:
        if not ours:
            return False
        if unwanted.what == "work":
            store.discard_work(unwanted.stage, unwanted.key)
            return True
        if _age(unwanted.path / "artifact.json") < unwanted.days:
            return False
        aside = store.set_aside(unwanted.stage, unwanted.key)  # in one step: nobody finds half of it
        if aside is not None:
            _delete(aside)
        return True


def discard(store: Store, artifact: artifacts.Artifact) -> None:
    """Delete an artifact of this very store that nobody will want, unless somebody else is at work on its key."""
    if artifact.path.is_relative_to(store.root):
        with store.claimed_at_once(artifact.stage, artifact.key) as ours:
            aside = store.set_aside(artifact.stage, artifact.key) if ours else None
        if aside is not None:
            _delete(aside)


def _everything(store: Store) -> Iterator[Rubbish]:
    for stage in KINDS:
        for artifact in store.own(stage):
            stamp = artifact.path / "artifact.json"
            yield Rubbish(
                what="artifact", stage=stage, key=artifact.key, path=artifact.path, bytes=artifact.bytes,
                days=_age(stamp),
            )  # fmt: skip
        for path in _visible(store.root / "work" / stage):
            yield Rubbish(
                what="work", stage=stage, key=path.name, path=path, bytes=size(path),
                days=min(map(_age, [path, *path.rglob("*")])),
            )  # fmt: skip
    for path in _visible(store.root / "aside"):
        name, _, nanoseconds = path.name.rpartition("-")
        if name and nanoseconds.isdecimal():
            stage, _, key = name.rpartition("-")
            days = max(0.0, (time.time() - int(nanoseconds) / 1e9) / DAY)
            yield Rubbish(what="aside", stage=stage, key=key, path=path, bytes=size(path), days=days)


def _visible(directory: Path) -> list[Path]:
    """What lies in a directory, sorted; nothing if there is none. File systems keep things of theirs in hidden ones."""
    return sorted(directory.glob("[!.]*"))


def _is_key(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", name) is not None


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age(path: Path) -> float:
    """Days since a path was last written. One that went away meanwhile is as young as can be; so is one of the future:
    where a clock has jumped, what is kept too long can go later, and what is gone is gone."""
    try:
        return max(0.0, (time.time() - path.stat().st_mtime) / DAY)
    except OSError:
        return 0.0


def held(store: Store) -> int:
    """Bytes of all that a store holds: artifacts, work, what was set aside, what servers leave for their clients."""
    return size(*(store.root / part for part in ("artifacts", "work", "aside", "services")))


def size(*paths: Path) -> int:
    """Bytes of all files below directories, which need not exist and may change meanwhile; of linked ones, once."""
    return sum(_file_sizes(paths))


def _file_sizes(paths: Iterable[Path]) -> Iterable[int]:
    linked = set[tuple[int, int]]()
    for directory, _, names in itertools.chain.from_iterable(os.walk(path) for path in paths):
        for name in names:
            try:
                found = os.lstat(f"{directory}/{name}")
            except OSError:
                continue
            if found.st_nlink > 1:
                if (found.st_dev, found.st_ino) in linked:
                    continue
                linked.add((found.st_dev, found.st_ino))
            yield found.st_size
