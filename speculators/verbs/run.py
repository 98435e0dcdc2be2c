"""run: carry a recipe out, tell about it on stderr, print what was measured on stdout."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path

from speculators import recipe, ui
from speculators.config import Config
from speculators.errors import StoreError
from speculators.job import write_json
from speculators.runner import executors
from speculators.runner.events import Events
from speculators.runner.execute import Execution, as_json, resolved
from speculators.runner.plan import Planner
from speculators.runner.store import Store, store_root

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


def main(words: list[str]) -> int:
    """`run RECIPE ...`; as a Hydra app where one of its flags is there."""
    if any(word in _FLAGS or word.startswith("--") for word in words):
        recipe.run_as_hydra_app(words, lambda config: run_recipe(config, words))
    else:
        run_recipe(recipe.compose(words), words)
    return 0


def run_recipe(config: Config, words: Sequence[str]) -> None:
    """Carry out one recipe, tell about it on stderr and print what was measured on stdout."""
    began = time.monotonic()
    planner = Planner(config, Store(store_root(config.run.store)))
    executors.check(config, planner.graph)
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
