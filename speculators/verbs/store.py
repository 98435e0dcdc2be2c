"""ls, verify, gc, export, import: inspect and maintain the artifact store."""

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

_STORE_OPTIONS = ("run.store", "run.stores_read", "--json")
"""Options that all verbs here take."""


def ls(argv: list[str]) -> int:
    """List the artifacts in the store and its read-only stores."""
    store, selectors, as_data = _parse(argv)
    stages = dict.fromkeys(selector.partition(":")[0] for selector in selectors) or KINDS
    rows = [
        {"stage": a.stage, "key": a.key, "bytes": a.bytes, "finished": a.provenance.get("finished", ""),
         "run": a.provenance.get("run", ""), "store": str(a.path.parents[3])}
        for stage in stages for a in store.artifacts(stage) if _selected(selectors, a.stage, a.key)
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


def verify(argv: list[str]) -> int:
    """Re-hash artifacts and report damage; `--quarantine` moves damaged ones to quarantine."""
    store, selectors, as_data = _parse([argument for argument in argv if argument != "--quarantine"], "--quarantine")
    broken, num_left = {}, 0
    for entry in upkeep.entries(store, {selector.partition(":")[0] for selector in selectors}):
        if not _selected(selectors, entry.stage, entry.key):
            continue
        ui.narrate("broken" if entry.damage else "intact", entry.stage, f"{entry.key[:8]}  {entry.damage}")
        if not entry.damage:
            continue
        name = entry.key or entry.stage
        broken[name] = {"stage": entry.stage, "trouble": entry.damage}
        moved_to = upkeep.quarantine(store, entry) if "--quarantine" in argv else None
        num_left += moved_to is None
        if moved_to is not None:
            ui.narrate("moved", entry.stage, str(moved_to))
    if as_data:
        print(json.dumps(broken, indent=1))
    if num_left:
        hint = "`speculators-run verify --quarantine` moves them to quarantine; the next run makes them again"
        raise StoreError(
            f"{num_left} artifacts are damaged",
            "they are in use: try again later" if "--quarantine" in argv else hint,
        )
    return 0


def gc(argv: list[str]) -> int:
    """Delete what has been unused for `days`; without `--delete` only list it."""
    days, runs, rest = 30.0, None, []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name == "days":
            try:
                days = float(value)
            except ValueError:
                raise RecipeError(f"days={value} is not a number", "for example days=30") from None
        elif name == "run.dir":
            runs = _listed(value)
        elif argument != "--delete":
            rest.append(argument)
    store, selectors, as_data = _parse(rest, "days", "run.dir", "--delete")
    unused = upkeep.find_unused(store, _keys_of_runs(runs), days)
    unused = [item for item in unused if _selected(selectors, item.stage, item.key)]
    delete, kept = "--delete" in argv, []
    for item in unused:
        if delete and not upkeep.remove(store, item):
            kept.append(item)
        verb = "in use" if item in kept else "deleted" if delete else "unused"
        ui.narrate(verb, f"{item.what} {item.stage}", f"{item.key[:8]}  {ui.size(item.bytes)}  {item.days:.0f} days")
    if as_data:
        print(json.dumps([{**dataclasses.asdict(item), "path": str(item.path)} for item in unused], indent=1))
    total = ui.size(sum(item.bytes for item in unused if item not in kept))
    how = "" if delete or not unused else "; nothing was deleted: add --delete"
    ui.narrate("gc", f"{len(unused) - len(kept)} directories", f"{total}{how}")
    return 0


def export(argv: list[str]) -> int:
    """Write artifacts into one file: those of `STAGE` or `STAGE:KEY`, or all existing ones of a recipe."""
    *selectors, file = [argument for argument in argv if argument != "--json"] or [""]
    if not selectors or "=" in file or not file:
        hint = "speculators-run export train:0123abcd FILE, or export recipe=NAME FILE"
        raise RecipeError("export needs artifacts and, last, a file", hint)
    if any(selector.startswith("recipe=") for selector in selectors):
        artifacts = _of_recipe(selectors)
    else:
        store, selectors, _ = _parse(selectors)
        artifacts = [artifact for selector in selectors for artifact in _select(store, selector)]
    artifacts = list({(artifact.stage, artifact.key): artifact for artifact in artifacts}.values())
    archive.export_artifacts(artifacts, Path(file).expanduser())
    for artifact in artifacts:
        ui.narrate("exported", artifact.stage, f"{artifact.key[:8]}  {ui.size(artifact.bytes)}")
    if "--json" in argv:
        print(json.dumps([{"stage": a.stage, "key": a.key, "bytes": a.bytes} for a in artifacts], indent=1))
    ui.narrate("export", f"{len(artifacts)} artifacts", f"{ui.size(sum(a.bytes for a in artifacts))}  {file}")
    return 0


def import_(argv: list[str]) -> int:
    """Check a file that `export` wrote, and add its artifacts to the store."""
    files = [argument for argument in argv if "=" not in argument and argument != "--json"]
    if len(files) != 1:
        raise RecipeError("import needs one file", "speculators-run import FILE")
    store, _, as_data = _parse([argument for argument in argv if argument != files[0]])
    path = Path(files[0]).expanduser()
    target = Store(store.root)
    need = sum(item.bytes for item in archive.contents(path) if target.find(item.stage, item.key) is None)
    if need > (free := free_bytes(target.root)):
        hint = "free space (`speculators-run gc`), or use a larger disk: run.store=PATH"
        raise StoreError(f"{path} has {ui.size(need)} of new artifacts, the store has {ui.size(free)} free", hint)
    rows = []
    for item, new in archive.import_artifacts(path, target, lambda holder: ui.narrate("waits", holder)):
        ui.narrate("imported" if new else "cached", item.stage, f"{item.key[:8]}  {ui.size(item.bytes)}")
        rows.append({"stage": item.stage, "key": item.key, "bytes": item.bytes, "new": new})
    if as_data:
        print(json.dumps(rows, indent=1))
    return 0


def _keys_of_runs(runs: list[str] | None) -> set[str]:
    """Keys in the plans of runs, which `gc` keeps. A missing directory is an error, because its artifacts would go."""
    kept: set[str] = set()
    for name in runs or ["runs"]:
        directory = Path(name).expanduser()
        if directory.is_dir():
            kept |= upkeep.keys_of_runs(directory)
        elif runs:
            raise StoreError(f"run.dir: there is no directory `{name}`", "name the directories of runs to keep")
        else:
            ui.narrate("note", "no runs here", "only the last use counts; run.dir=PATH,PATH keeps those of runs")
    return kept


def _of_recipe(overrides: Sequence[str]) -> list[Artifact]:
    """Existing artifacts of a recipe, in data-flow order."""
    config = composed.compose_cached(overrides)
    steps = Planner(config, open_store(config.run)).plan()
    for step in steps:
        if step.artifact is None and not step.path:
            ui.narrate("missing", step.node.name, step.reason)
    artifacts = [step.artifact for step in steps if step.artifact is not None]
    if not artifacts:
        raise StoreError(
            f"the store has no artifact of {config.recipe}", f"run it first: speculators-run {' '.join(overrides)}"
        )
    return artifacts


def _select(store: Store, selector: str) -> list[Artifact]:
    """The artifacts of `STAGE`, or the one of `STAGE:KEY-PREFIX`; all must be intact."""
    stage, _, prefix = selector.partition(":")
    artifacts = [artifact for artifact in store.artifacts(stage) if artifact.key.startswith(prefix)]
    if not artifacts or (prefix and len(artifacts) > 1):
        keys = [artifact.key[: max(8, len(prefix) + 4)] for artifact in store.artifacts(stage)]
        many = f"{len(artifacts)} artifacts match" if artifacts else "no artifact matches"
        raise StoreError(f"{many} `{selector}`", f"there is: {', '.join(keys) or 'nothing'}")
    for artifact in artifacts:
        if store.find(artifact.stage, artifact.key) is None:
            hint = "`speculators-run verify` reports the damage"
            raise StoreError(f"{stage} {artifact.key[:8]} is damaged", hint)
    return artifacts


def _listed(value: str) -> list[str]:
    """Parse `a,b` or `[a,b]`."""
    return [item.strip() for item in value.removeprefix("[").removesuffix("]").split(",") if item.strip()]


def _selected(selectors: Sequence[str], stage: str, key: str) -> bool:
    """Whether a `STAGE` or `STAGE:KEY-PREFIX` selects the artifact; without selectors, all are selected."""
    parts = [selector.partition(":") for selector in selectors]
    return not parts or any(stage == name and key.startswith(prefix) for name, _, prefix in parts)


def _parse(argv: Sequence[str], *others: str) -> tuple[Store, list[str], bool]:
    """The store, the selectors of artifacts, and whether to print JSON; `others` are further options, for hints."""
    run, selectors = RunOptions(), []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name == "run.store":
            run.store = value
        elif name == "run.stores_read":
            run.stores_read = _listed(value)
        elif argument != "--json":
            if "=" in argument or argument.startswith("-"):
                raise RecipeError(f"there is no option `{name}` here", closest(name, [*others, *_STORE_OPTIONS]))
            if (stage := argument.partition(":")[0]) not in KINDS:
                raise RecipeError(f"there is no stage `{stage}`", closest(stage, KINDS))
            selectors.append(argument)
    return open_store(run), selectors, "--json" in argv
