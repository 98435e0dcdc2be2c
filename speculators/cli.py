"""speculators-run: a recipe in, a trained and measured draft model out.

    speculators-run recipe=NAME [KEY=VALUE ...]       run what is not done yet
    speculators-run plan recipe=NAME [KEY=VALUE ...]  what would run, and why
    speculators-run explain STAGE recipe=NAME ...     why it is there, or not
    speculators-run -m recipe=NAME KEY=A,B            one run for each value
    speculators-run recipe=NAME --cfg job             the composed recipe
    speculators-run ls [STAGE ...]                    what the store holds
    speculators-run verify [STAGE ...]                whether it still is that
    speculators-run gc [days=30] [--delete]           what nobody used for long

until=STAGE stops there, only=STAGE runs nothing else, force=STAGE makes it
anew, from=STAGE that and all that follows.

Exit codes: 0, 1 (you can mend it), 2 (a defect of ours), 128 + signal.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speculators import ui
from speculators.config import Config
from speculators.errors import RecipeError, RunError, StoreError, closest

if TYPE_CHECKING:
    from speculators.runner.store import Store

_FLAGS = (
    "-m",
    "--multirun",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--hydra-help",
    "--shell-completion",
    "-sc",
    "--resolve",
    "-p",
    "--package",
)


def main() -> None:
    """The console script: every error becomes one message and an exit code here."""
    sys.exit(_guarded(sys.argv[1:]))


def _guarded(words: Sequence[str]) -> int:
    from speculators.runner.execute import Interrupted

    try:
        _refuse_foreign_package()
        return _dispatch(list(words))
    except RunError as failure:
        ui.error(failure)
        return 1
    except Interrupted as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read stdout has gone; what it did not want to read is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        print("\nerror: unexpected, a defect of speculators-run\n\nhint: report the lines above", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        return _help()
    if words[0] == "--version":
        print(importlib.metadata.version("speculators-run"))
        return 0
    first = words[0]
    if first.startswith("-") or "=" in first:
        return _run(words)
    if first not in VERBS:
        raise RecipeError(f"there is no verb `{first}`", closest(first, VERBS))
    return VERBS[first](words[1:])


def _help() -> int:
    from speculators import recipe

    rows = [("  " + name, _first_comment(path)) for name, path in sorted(recipe.available().items())]
    print(f"{__doc__}\nRecipes (made of the choices in conf/; ./recipes is looked up too):\n\n{ui.columns(rows)}")
    return 0


def _first_comment(path: Path) -> str:
    comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if not c.startswith("@")), "")


def _run(words: list[str]) -> int:
    from speculators import recipe

    if any(word in _FLAGS or word.startswith("--") for word in words):
        recipe.run_as_hydra_app(words, lambda config: run_recipe(config, words))
    else:
        run_recipe(recipe.compose(words), words)
    return 0


def run_recipe(config: Config, words: Sequence[str]) -> None:
    """Carry out one recipe, tell about it on stderr and print what was measured on stdout."""
    from speculators.job import write_json
    from speculators.runner.events import Events
    from speculators.runner.execute import Execution, as_json, resolved
    from speculators.runner.plan import Planner
    from speculators.runner.store import Store

    began = time.monotonic()
    planner = Planner(config, Store(store_root(config.run.store)))
    directory = _run_directory(config)
    write_json(directory / "config.json", resolved(config))
    status = "failed"
    with ui.watcher(name for name, node in planner.graph.items() if node.kind != "fetch") as watch:
        events = Events(directory / "events.jsonl", [watch])
        events.emit("run.started", recipe=config.recipe, run=directory.name, words=list(words))
        execution = Execution(planner=planner, directory=directory, events=events, words=list(words))
        try:
            execution.run()
            status = "done"
        finally:
            seconds = time.monotonic() - began
            write_json(
                directory / "run.json", {"status": status, "seconds": seconds, "steps": as_json(execution.steps)}
            )
            events.emit("run.finished", status=status, seconds=seconds)
            events.close()
    for name, step in execution.steps.items():
        if step.node.kind == "evaluate" and step.path:
            print(f"{name}: {step.path}\n\n{ui.evaluation(json.loads((step.path / 'evaluation.json').read_text()))}")
    ui.narrate("done", config.recipe, f"{ui.duration(seconds)}  {directory}")


def _plan(words: list[str]) -> int:
    from speculators import recipe
    from speculators.runner import estimate
    from speculators.runner.execute import as_json
    from speculators.runner.plan import Planner
    from speculators.runner.store import Store

    as_data = "--json" in words
    config = recipe.compose([w for w in words if w != "--json"])
    planner = Planner(config, Store(store_root(config.run.store)))
    steps = {step.node.name: step for step in planner.plan()}
    needs = estimate.estimate(planner, steps)
    if as_data:
        print(json.dumps({"steps": as_json(steps), "derived": planner.derived, **dataclasses.asdict(needs)}, indent=1))
        return 0
    print(ui.columns((s.state.name, name, s.key[:8] or "-", s.reason) for name, s in steps.items()))
    print("\n" + ui.columns((name, json.dumps(value)) for name, value in planner.derived.items()))
    for server in needs.servers:
        print(f"\nserver for {server.stage} ({server.mode}):\n  {server.command}")
    if needs.feature_tokens:
        print(
            f"\nhidden states: at most {needs.feature_tokens:,} tokens, {ui.size(needs.feature_bytes)}; "
            f"free in the store: {ui.size(needs.free_bytes)}"
        )
    return 0


def _explain(words: list[str]) -> int:
    from speculators import recipe
    from speculators.runner.explain import explain
    from speculators.runner.plan import Planner
    from speculators.runner.store import Store

    as_data = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or "=" in words[0]:
        raise RecipeError("explain wants a stage", "speculators-run explain train recipe=NAME")
    config = recipe.compose(words[1:])
    found = explain(Planner(config, Store(store_root(config.run.store))), words[0])
    print(json.dumps(dataclasses.asdict(found), indent=1) if as_data else ui.explanation(found))
    return 0


def _ls(words: list[str]) -> int:
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


def _verify(words: list[str]) -> int:
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


def _gc(words: list[str]) -> int:
    from speculators.runner import upkeep

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
    from speculators.runner.graph import KINDS
    from speculators.runner.store import Store

    root, stages = "", []
    for word in words:
        if word.startswith("run.store="):
            root = word.partition("=")[2]
        elif word != "--json":
            if word not in KINDS:
                raise RecipeError(f"there is no stage `{word}`", closest(word, KINDS))
            stages.append(word)
    return Store(store_root(root)), stages or list(KINDS), "--json" in words


def store_root(named: str) -> Path:
    """Where artifacts are kept: what the recipe says as `run.store`, the environment's word, or the user's cache."""
    return Path(named or os.environ.get("SPECULATORS_STORE") or "~/.cache/speculators-run").expanduser().resolve()


def _run_directory(config: Config) -> Path:
    """A fresh `runs/<time>-<recipe>`; a second run in the same second gets a number."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.run.dir).expanduser().resolve() / f"{stamp}-{config.recipe}"
    for attempt in range(1000):
        directory = base.with_name(f"{base.name}-{attempt}") if attempt else base
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(
                f"run.dir: cannot make `{directory}` ({error.strerror})",
                "name a directory you may write to: run.dir=PATH",
            ) from None
        (directory / "logs").mkdir()
        return directory
    raise StoreError(f"run.dir: a thousand runs started at once in `{base.parent}`", "wait a second")


def _refuse_foreign_package() -> None:
    """Upstream's PyPI package has the same import name; mixed files of both would fail in ways nobody can read."""
    try:
        version = importlib.metadata.version("speculators")
    except importlib.metadata.PackageNotFoundError:
        return
    raise RecipeError(
        f"the package `speculators` {version} is installed beside `speculators-run`, and both are `import speculators`",
        "pip uninstall speculators, then reinstall speculators-run; keep upstream in an environment of its own",
    )


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "plan": _plan,
    "explain": _explain,
    "ls": _ls,
    "verify": _verify,
    "gc": _gc,
}
"""First words and what they do; without one, `run`."""

if __name__ == "__main__":
    main()
