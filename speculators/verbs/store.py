"""ls, verify, gc: the artifact store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from speculators import ui
from speculators.errors import RecipeError, StoreError, closest
from speculators.runner import upkeep
from speculators.runner.graph import KINDS
from speculators.runner.store import Store, store_root


def ls(words: list[str]) -> int:
    """What the store holds."""
    store, wanted, as_data = _store_words(words)
    rows = [
        {"stage": a.stage, "key": a.key, "bytes": a.bytes, "finished": a.provenance.get("finished", ""),
         "run": a.provenance.get("run", "")}
        for stage in wanted for a in store.artifacts(stage)
    ]  # fmt: skip
    if as_data:
        print(json.dumps(rows, indent=1))
    elif rows:
        shown = [(r["stage"], r["key"][:8], ui.size(r["bytes"]), r["finished"][:16], r["run"]) for r in rows]
        print(ui.columns([("stage", "key", "size", "finished", "run"), *shown], right=[2]))
        print(f"\n{len(rows)} artifacts, {ui.size(sum(r['bytes'] for r in rows))} in {store.root}")
    else:
        ui.narrate("empty", str(store.root))
    return 0


def verify(words: list[str]) -> int:
    """Whether it still is what was stored."""
    store, wanted, as_data = _store_words(words)
    broken = {}
    for artifact in (a for stage in wanted for a in store.artifacts(stage)):
        trouble = store.trouble(artifact)
        ui.narrate("broken" if trouble else "whole", artifact.stage, f"{artifact.key[:8]}  {trouble}")
        if trouble:
            broken[artifact.key] = {"stage": artifact.stage, "trouble": trouble}
    if as_data:
        print(json.dumps(broken, indent=1))
    if broken:
        raise StoreError(
            f"{len(broken)} artifacts are not what was stored",
            f"remove their directories below {store.root / 'artifacts'}; the next run makes them again",
        )
    return 0


def gc(words: list[str]) -> int:
    """What nobody used for long; deleted if asked."""
    days, runs, rest = 30.0, "runs", []
    for word in words:
        name, _, value = word.partition("=")
        if name == "days":
            try:
                days = float(value)
            except ValueError:
                raise RecipeError(f"days={value} is not a number", "say days=30") from None
        elif name == "run.dir":
            runs = value
        elif word != "--delete":
            rest.append(word)
    store, _, as_data = _store_words(rest)
    found = upkeep.rubbish(store, upkeep.named_by_runs(Path(runs).expanduser()), days)
    delete = "--delete" in words
    for item in found:
        gone = delete and upkeep.remove(store, item)
        verb = "deleted" if gone else "in use" if delete else "would go"
        ui.narrate(verb, f"{item.what} {item.stage}", f"{item.key[:8]}  {ui.size(item.bytes)}  {item.days:.0f} days")
    if as_data:
        print(json.dumps([{**dataclasses.asdict(item), "path": str(item.path)} for item in found], indent=1))
    total = ui.size(sum(item.bytes for item in found))
    how = "" if delete or not found else "; nothing was deleted: add --delete"
    ui.narrate("gc", f"{len(found)} directories", f"{total}{how}")
    return 0


def _store_words(words: list[str]) -> tuple[Store, list[str], bool]:
    """The store, the stages that were named (all of them if none is), and whether data is wanted."""

    root, stages = "", []
    for word in words:
        if word.startswith("run.store="):
            root = word.partition("=")[2]
        elif word != "--json":
            if word not in KINDS:
                raise RecipeError(f"there is no stage `{word}`", closest(word, KINDS))
            stages.append(word)
    return Store(store_root(root)), stages or list(KINDS), "--json" in words
