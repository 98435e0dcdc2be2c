"""ls, verify, gc, export, import: the artifact store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from speculators import ui
from speculators.config import composed
from speculators.config.schema import RunOptions
from speculators.errors import RecipeError, StoreError, closest
from speculators.runner.planning.graph import KINDS
from speculators.runner.planning.plan import Planner
from speculators.runner.store import archive, upkeep
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store, free_bytes, open_store

_WORDS = ("run.store", "run.stores_read", "--json")
"""What every verb here takes besides stages."""


def ls(words: list[str]) -> int:
    """What the store and those below it hold."""
    store, wanted, as_data = _store_words(words)
    stages = dict.fromkeys(word.partition(":")[0] for word in wanted) or KINDS
    rows = [
        {"stage": a.stage, "key": a.key, "bytes": a.bytes, "finished": a.provenance.get("finished", ""),
         "run": a.provenance.get("run", ""), "store": str(a.path.parents[3])}
        for stage in stages for a in store.artifacts(stage) if _fits(wanted, a.stage, a.key)
    ]  # fmt: skip
    if as_data:
        print(json.dumps(rows, indent=1))
    elif rows:
        shown = [(r["stage"], r["key"][:8], ui.size(r["bytes"]), r["finished"][:16], r["run"]) for r in rows]
        print(ui.columns([("stage", "key", "size", "finished", "run"), *shown], right=[2]))
        roots = ", ".join(str(s.root) for s in (store, *store.layers))
        print(f"\n{len(rows)} artifacts, {ui.size(sum(r['bytes'] for r in rows))} in {roots}")
    else:
        ui.narrate("empty", str(store.root))
    return 0


def verify(words: list[str]) -> int:
    """Whether all that lies in the store still is what was stored; what is not is moved aside if asked."""
    store, wanted, as_data = _store_words([word for word in words if word != "--aside"], "--aside")
    broken, left = {}, 0
    for entry in upkeep.entries(store, {word.partition(":")[0] for word in wanted}):
        if not _fits(wanted, entry.stage, entry.key):
            continue
        ui.narrate("broken" if entry.damage else "whole", entry.stage, f"{entry.key[:8]}  {entry.damage}")
        if not entry.damage:
            continue
        name = entry.key or entry.stage
        broken[name] = {"stage": entry.stage, "trouble": entry.damage}
        aside = upkeep.quarantine(store, entry) if "--aside" in words else None
        left += aside is None
        if aside is not None:
            ui.narrate("aside", entry.stage, str(aside))
    if as_data:
        print(json.dumps(broken, indent=1))
    if left:
        hint = "`speculators-run verify --aside` moves them out of the way; the next run makes them again"
        raise StoreError(
            f"{left} artifacts are not what was stored",
            "somebody is at work on them: try again later" if "--aside" in words else hint,
        )
    return 0


def gc(words: list[str]) -> int:
    """What nobody used for long; deleted if asked."""
    days, runs, rest = 30.0, None, []
    for word in words:
        name, _, value = word.partition("=")
        if name == "days":
            try:
                days = float(value)
            except ValueError:
                raise RecipeError(f"days={value} is not a number", "say days=30") from None
        elif name == "run.dir":
            runs = _listed(value)
        elif word != "--delete":
            rest.append(word)
    store, wanted, as_data = _store_words(rest, "days", "run.dir", "--delete")
    found = [item for item in upkeep.find_unused(store, _kept(runs), days) if _fits(wanted, item.stage, item.key)]
    delete, kept = "--delete" in words, []
    for item in found:
        if delete and not upkeep.remove(store, item):
            kept.append(item)
        verb = "in use" if item in kept else "deleted" if delete else "would go"
        ui.narrate(verb, f"{item.what} {item.stage}", f"{item.key[:8]}  {ui.size(item.bytes)}  {item.days:.0f} days")
    if as_data:
        print(json.dumps([{**dataclasses.asdict(item), "path": str(item.path)} for item in found], indent=1))
    total = ui.size(sum(item.bytes for item in found if item not in kept))
    how = "" if delete or not found else "; nothing was deleted: add --delete"
    ui.narrate("gc", f"{len(found) - len(kept)} directories", f"{total}{how}")
    return 0


def export(words: list[str]) -> int:
    """Artifacts as one file: those of `STAGE` or `STAGE:KEY`, or all that a recipe finds."""
    *chosen, file = [word for word in words if word != "--json"] or [""]
    if not chosen or "=" in file or not file:
        hint = "speculators-run export train:0123abcd FILE, or export recipe=NAME FILE"
        raise RecipeError("export wants artifacts and, last, a file", hint)
    if any(word.startswith("recipe=") for word in chosen):
        found = _of_recipe(chosen)
    else:
        store, wanted, _ = _store_words(chosen)
        found = [artifact for word in wanted for artifact in _named(store, word)]
    found = list({(artifact.stage, artifact.key): artifact for artifact in found}.values())
    archive.export_artifacts(found, Path(file).expanduser())
    for artifact in found:
        ui.narrate("exported", artifact.stage, f"{artifact.key[:8]}  {ui.size(artifact.bytes)}")
    if "--json" in words:
        print(json.dumps([{"stage": a.stage, "key": a.key, "bytes": a.bytes} for a in found], indent=1))
    ui.narrate("export", f"{len(found)} artifacts", f"{ui.size(sum(a.bytes for a in found))}  {file}")
    return 0


def import_(words: list[str]) -> int:
    """What `export` wrote, checked, into the store."""
    plain = [word for word in words if "=" not in word and word != "--json"]
    if len(plain) != 1:
        raise RecipeError("import wants one file", "speculators-run import FILE")
    store, _, as_data = _store_words([word for word in words if word != plain[0]])
    path = Path(plain[0]).expanduser()
    here = Store(store.root)
    need = sum(item.bytes for item in archive.contents(path) if here.find(item.stage, item.key) is None)
    if need > (free := free_bytes(here.root)):
        hint = "make room (`speculators-run gc`), or name a larger disk: run.store=PATH"
        raise StoreError(f"{path} holds {ui.size(need)} that are new, the store has {ui.size(free)} free", hint)
    rows = []
    for item, new in archive.import_artifacts(path, here, lambda holder: ui.narrate("waits", holder)):
        ui.narrate("imported" if new else "cached", item.stage, f"{item.key[:8]}  {ui.size(item.bytes)}")
        rows.append({"stage": item.stage, "key": item.key, "bytes": item.bytes, "new": new})
    if as_data:
        print(json.dumps(rows, indent=1))
    return 0


def _kept(runs: list[str] | None) -> set[str]:
    """The keys that runs name. A directory that is asked for and is not there would let everything of its go."""
    kept: set[str] = set()
    for name in runs or ["runs"]:
        directory = Path(name).expanduser()
        if directory.is_dir():
            kept |= upkeep.keys_of_runs(directory)
        elif runs:
            raise StoreError(f"run.dir: there is no directory `{name}`", "name those that hold the runs to keep")
        else:
            ui.narrate("note", "no runs here", "only the last use counts; say run.dir=PATH,PATH to keep what runs name")
    return kept


def _of_recipe(words: Sequence[str]) -> list[Artifact]:
    """What a recipe finds, in data-flow order."""
    config = composed.compose_cached(words)
    steps = Planner(config, open_store(config.run)).plan()
    for step in steps:
        if step.artifact is None and not step.path:
            ui.narrate("missing", step.node.name, step.reason)
    found = [step.artifact for step in steps if step.artifact is not None]
    if not found:
        raise StoreError(f"nothing of {config.recipe} is in the store", "run it first")
    return found


def _named(store: Store, word: str) -> list[Artifact]:
    """The artifacts of `STAGE`, or the one of `STAGE:KEY-PREFIX`, whole."""
    stage, _, prefix = word.partition(":")
    found = [artifact for artifact in store.artifacts(stage) if artifact.key.startswith(prefix)]
    if not found or (prefix and len(found) > 1):
        keys = [artifact.key[: max(8, len(prefix) + 4)] for artifact in store.artifacts(stage)]
        many = f"{len(found)} artifacts" if found else "no artifact"
        raise StoreError(f"{many} of the store fits `{word}`", f"there is: {', '.join(keys) or 'nothing'}")
    for artifact in found:
        if store.find(artifact.stage, artifact.key) is None:
            hint = "`speculators-run verify` says what is wrong with it"
            raise StoreError(f"{stage} {artifact.key[:8]} is not whole", hint)
    return found


def _listed(value: str) -> list[str]:
    """`a,b` or `[a,b]`, as Hydra writes a list."""
    return [item.strip() for item in value.removeprefix("[").removesuffix("]").split(",") if item.strip()]


def _fits(wanted: Sequence[str], stage: str, key: str) -> bool:
    """Whether a `STAGE` or `STAGE:KEY-PREFIX` means this one; without any, all are meant."""
    named = [word.partition(":") for word in wanted]
    return not named or any(stage == name and key.startswith(prefix) for name, _, prefix in named)


def _store_words(words: Sequence[str], *others: str) -> tuple[Store, list[str], bool]:
    """The store, the words that name stages, and whether data is wanted; `others` are the verb's own words."""
    run, stages = RunOptions(), []
    for word in words:
        name, _, value = word.partition("=")
        if name == "run.store":
            run.store = value
        elif name == "run.stores_read":
            run.stores_read = _listed(value)
        elif word != "--json":
            if "=" in word or word.startswith("-"):
                raise RecipeError(f"there is no option `{name}` here", closest(name, [*others, *_WORDS]))
            if (stage := word.partition(":")[0]) not in KINDS:
                raise RecipeError(f"there is no stage `{stage}`", closest(stage, KINDS))
            stages.append(word)
    return open_store(run), stages, "--json" in words
