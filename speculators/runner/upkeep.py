"""Making room in a store: what may go, and letting it go.

An artifact may go when no run that is kept names its key and nothing has used it for some days; so may what was set
aside and the work directories of attempts that nobody resumed. A run marks what it uses, its hits too. What another
process holds the claim of is never touched: it is being made.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from speculators.runner.graph import KINDS
from speculators.runner.store import Store

DAY = 86400.0


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
    """The keys of every run below a directory; a run that ended before it wrote them down names none."""
    keys: set[str] = set()
    for file in runs.glob("*/run.json"):
        try:
            keys |= {step["key"] for step in json.loads(file.read_text())["steps"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return keys


def rubbish(store: Store, kept: Collection[str], days: float) -> list[Rubbish]:
    """What may go: not of a kept key, and not used for so many days; oldest first."""
    found = [r for r in _everything(store) if r.days >= days and r.key not in kept]
    return sorted(found, key=lambda r: -r.days)


def remove(store: Store, unwanted: Rubbish) -> bool:
    """Delete one; false if somebody else is at work on its key."""
    if unwanted.what == "aside":
        shutil.rmtree(unwanted.path)
        return True
    with store.claimed_at_once(unwanted.stage, unwanted.key) as ours:
        if ours and unwanted.what == "work":
            store.discard_work(unwanted.stage, unwanted.key)
        elif ours:
            aside = store.set_aside(unwanted.stage, unwanted.key)  # in one step: nobody finds half of it
            if aside is not None:
                shutil.rmtree(aside)
        return ours


def _everything(store: Store) -> Iterator[Rubbish]:
    for stage in KINDS:
        for artifact in store.artifacts(stage):
            stamp = artifact.path / "artifact.json"
            yield Rubbish(
                what="artifact", stage=stage, key=artifact.key, path=artifact.path, bytes=artifact.bytes,
                days=_age(stamp),
            )  # fmt: skip
        for path in sorted((store.root / "work" / stage).glob("[!.]*")):
            yield Rubbish(
                what="work", stage=stage, key=path.name, path=path, bytes=size(path),
                days=min(map(_age, [path, *path.rglob("*")])),
            )  # fmt: skip
    for path in sorted((store.root / "aside").glob("*-*-*")):
        stage, key, nanoseconds = path.name.rsplit("-", 2)
        days = (time.time() - int(nanoseconds) / 1e9) / DAY
        yield Rubbish(what="aside", stage=stage, key=key, path=path, bytes=size(path), days=days)


def _age(path: Path) -> float:
    """Days since a path was last written; one that went away meanwhile is as young as can be."""
    try:
        return max(0.0, (time.time() - path.stat().st_mtime) / DAY)
    except OSError:
        return 0.0


def size(path: Path) -> int:
    """Bytes of all files below a directory, which need not exist."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
