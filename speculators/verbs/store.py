"""ls, verify, gc, export, import: inspect and maintain the artifact store."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from speculators import ui
from speculators.config import composed
from speculators.config.execution import RunOptions
from speculators.errors import RecipeError, StoreError, closest
from speculators.runner.planning.graph import KINDS
from speculators.runner.planning.plan import Planner
from speculators.runner.store import archive, upkeep
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store, free_bytes, open_store
from speculators.verbs import usage


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Artifacts selected by `STAGE` or `STAGE:KEY-PREFIX`, STAGE being a kind or a node's name; empty: all."""

    kinds: list[tuple[str, str]]
    """(kind, beginning of the key)."""
    keys: set[tuple[str, str]]
    """(kind, key) of those made by a node of the selected name."""

    def has(self, stage: str, key: str) -> bool:
        """Whether an artifact, or another directory of a stage, is selected."""
        if not self.kinds:
            return True
        return (stage, key) in self.keys or any(stage == kind and key.startswith(start) for kind, start in self.kinds)

    @property
    def stages(self) -> set[str]:
        """The kinds of what is selected; empty: all."""
        return {kind for kind, _ in (*self.kinds, *self.keys)}


def ls(argv: list[str]) -> int:
    """List the artifacts in the store and its read-only stores."""
    arguments = usage.parse("ls", argv)
    store = _store(arguments.options)
    selection = _selection(store, arguments.names)
    rows = [
        {"stage": a.stage, "node": a.provenance.get("node", ""), "key": a.key, "bytes": a.bytes,
         "finished": a.provenance.get("finished", ""), "run": a.provenance.get("run", ""),
         "store": str(a.path.parents[3]), "path": str(a.data)}
        for stage in KINDS if not selection.stages or stage in selection.stages
        for a in store.artifacts(stage) if selection.has(a.stage, a.key)
    ]  # fmt: skip
    if arguments.as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        shown = [(_label(r["stage"], r["node"]), r["key"][:8], ui.size(r["bytes"]), r["run"]) for r in rows]
        print(ui.listing([("stage", "key", "size", "run"), *shown], right=[2]))
        roots = ", ".join(str(s.root) for s in (store, *store.layers))
        print(f"\n{len(rows)} artifacts, {ui.size(sum(r['bytes'] for r in rows))} in {roots}")
    else:
        ui.narrate("empty", str(store.root))
    return 0


def verify(argv: list[str]) -> int:
    """Re-hash artifacts and report damage; `--quarantine` moves damaged ones to quarantine."""
    arguments = usage.parse("verify", argv)
    store, quarantine = _store(arguments.options), "--quarantine" in arguments.flags
    selection = _selection(store, arguments.names)
    broken, num_left = {}, 0
    for entry in upkeep.entries(store, selection.stages):
        if not selection.has(entry.stage, entry.key):
            continue
        ui.narrate("broken" if entry.damage else "intact", entry.stage, f"{entry.key[:8]}  {entry.damage}")
        if not entry.damage:
            continue
        name = entry.key or entry.stage
        broken[name] = {"stage": entry.stage, "trouble": entry.damage}
        moved_to = upkeep.quarantine(store, entry) if quarantine else None
        num_left += moved_to is None
        if moved_to is not None:
            ui.narrate("moved", entry.stage, str(moved_to))
    if arguments.as_json:
        print(json.dumps(broken, indent=1))
    if num_left:
        hint = "`speculators-run verify --quarantine` moves them to quarantine; the next run makes them again"
        raise StoreError(
            f"{num_left} artifacts are damaged",
            "they are in use: try again later" if quarantine else hint,
        )
    return 0


def gc(argv: list[str]) -> int:
    """Delete what has been unused for `days`; without `--delete` only list it."""
    arguments = usage.parse("gc", argv)
    store, days, runs = _store(arguments.options), arguments.options.get("days", "30"), arguments.options.get("run.dir")
    if re.fullmatch(r"\d+(\.\d*)?", days) is None:
        raise RecipeError(f"days={days} is not a number of days", "for example days=30")
    selection = _selection(store, arguments.names)
    unused = upkeep.find_unused(store, _keys_of_runs(None if runs is None else _listed(runs)), float(days))
    unused = [item for item in unused if selection.has(item.stage, item.key)]
    delete, kept = "--delete" in arguments.flags, []
    for item in unused:
        if delete and not upkeep.remove(store, item):
            kept.append(item)
        verb = "in use" if item in kept else "deleted" if delete else "unused"
        detail = f"{item.key[:8]}  {ui.size(item.bytes):>10}  {item.days:.0f} days"
        ui.narrate(verb, f"{item.what} {item.stage}", detail)
    if arguments.as_json:
        print(json.dumps([{**dataclasses.asdict(item), "path": str(item.path)} for item in unused], indent=1))
    total = ui.size(sum(item.bytes for item in unused if item not in kept))
    how = "" if delete or not unused else "; nothing was deleted: add --delete"
    ui.narrate("gc", f"{len(unused) - len(kept)} directories", f"{total}{how}")
    return 0


def export(argv: list[str]) -> int:
    """Write artifacts into one file: those of `STAGE` or `STAGE:KEY`, or all existing ones of a recipe."""
    arguments = usage.parse("export", argv)
    of_recipe = any(override.startswith("recipe=") for override in arguments.overrides)
    *selectors, file = arguments.names or [""]
    if not file or bool(selectors) == of_recipe:
        hint = "speculators-run export train:0123abcd FILE, or export recipe=NAME FILE"
        raise RecipeError("export needs artifacts and, last, a file", hint)
    if of_recipe:
        artifacts = _of_recipe(arguments.overrides)
    else:
        store = _store(usage.parse("ls", arguments.overrides).options)
        artifacts = [artifact for selector in selectors for artifact in _select(store, selector)]
    artifacts = list({(artifact.stage, artifact.key): artifact for artifact in artifacts}.values())
    archive.export_artifacts(artifacts, Path(file).expanduser())
    for artifact in artifacts:
        ui.narrate("exported", artifact.stage, f"{artifact.key[:8]}  {ui.size(artifact.bytes)}")
    if arguments.as_json:
        print(json.dumps([{"stage": a.stage, "key": a.key, "bytes": a.bytes} for a in artifacts], indent=1))
    ui.narrate("export", f"{len(artifacts)} artifacts", f"{ui.size(sum(a.bytes for a in artifacts))}  {file}")
    return 0


def import_(argv: list[str]) -> int:
    """Check a file that `export` wrote, and add its artifacts to the store."""
    arguments = usage.parse("import", argv)
    if len(arguments.names) != 1:
        raise RecipeError("import needs one file", "speculators-run import FILE")
    path, store = Path(arguments.names[0]).expanduser(), _store(arguments.options)
    target = Store(store.root)
    need = sum(item.bytes for item in archive.contents(path) if target.find(item.stage, item.key) is None)
    if need > (free := free_bytes(target.root)):
        hint = "free space (`speculators-run gc`), or use a larger disk: run.store=PATH"
        raise StoreError(f"{path} has {ui.size(need)} of new artifacts, the store has {ui.size(free)} free", hint)
    rows = []
    for item, new in archive.import_artifacts(path, target, lambda holder: ui.narrate("waits", holder)):
        ui.narrate("imported" if new else "cached", item.stage, f"{item.key[:8]}  {ui.size(item.bytes)}")
        rows.append({"stage": item.stage, "key": item.key, "bytes": item.bytes, "new": new})
    if arguments.as_json:
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
    of_stage, selection = _selection(store, [stage]), _selection(store, [selector])
    candidates = [a for kind in KINDS if kind in of_stage.stages for a in store.artifacts(kind)]
    artifacts = [artifact for artifact in candidates if selection.has(artifact.stage, artifact.key)]
    if not artifacts or (prefix and len(artifacts) > 1):
        keys = [a.key[: max(8, len(prefix) + 4)] for a in candidates if of_stage.has(a.stage, a.key)]
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


def _selection(store: Store, selectors: Sequence[str]) -> Selection:
    """Resolve selectors of artifacts.

    Raises:
        RecipeError: a selector names neither a kind nor a node that has made an artifact of this store.
    """
    parts = [(stage, prefix) for stage, _, prefix in (selector.partition(":") for selector in selectors)]
    nodes = [(a.provenance.get("node", ""), a) for kind in KINDS for a in store.artifacts(kind)] if parts else []
    known = {*KINDS, *(node for node, _ in nodes if node)}
    for stage, _ in parts:
        if stage not in known:
            raise RecipeError(f"there is no stage `{stage}`", closest(stage, known))
    keys = {
        (a.stage, a.key) for name, prefix in parts for node, a in nodes if node == name and a.key.startswith(prefix)
    }
    return Selection(parts, keys)


def _label(kind: str, node: str) -> str:
    """`extract (collect)`: a node's name, with its kind if that differs; without a node, the kind."""
    return f"{node} ({kind})" if node not in ("", kind) else kind


def _store(options: Mapping[str, str]) -> Store:
    """The store of `run.store` and `run.stores_read`."""
    run = RunOptions()
    run.store = options.get("run.store", run.store)
    run.stores_read = _listed(options["run.stores_read"]) if "run.stores_read" in options else run.stores_read
    return open_store(run)
