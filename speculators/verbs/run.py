"""run: carry a recipe out, tell about it on stderr, print what was measured on stdout."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from speculators import ui
from speculators.config import composed
from speculators.config.fields import to_builtins
from speculators.config.schema import Config
from speculators.errors import StoreError
from speculators.job import write_json
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution, steps_as_json
from speculators.runner.execution.signals import Interrupted
from speculators.runner.planning import checks, lockfile
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import guard
from speculators.runner.store.artifacts import open_store

_FLAGS = (
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
    if "-m" in words or "--multirun" in words:
        from speculators.verbs import sweep

        return sweep.main(words, run_recipe, _fresh_directory)
    if any(word in _FLAGS or word.startswith("--") for word in words):
        from speculators.config import compose

        compose.run_as_hydra_app(words, lambda config: run_recipe(config, words))
    else:
        run_recipe(composed.compose_cached(words, write=True), words)
    return 0


def run_recipe(
    config: Config, words: Sequence[str], *, announce: Callable[[Path], None] | None = None, plain: bool = False
) -> None:
    """Carry out one recipe, tell about it on stderr and print what was measured on stdout.

    `announce` hears of the run directory when it is there; `plain`: other runs share the terminal.
    """
    began = time.monotonic()
    planner = Planner(config, open_store(config.run))
    checks.check_machine(config, planner.graph)
    if config.run.locked:
        lockfile.refuse_if_different(planner)
    directory = _fresh_directory(Path(config.run.dir).expanduser().resolve(), config.recipe)
    (directory / "logs").mkdir()
    if announce is not None:
        announce(directory)
    write_json(directory / "config.json", to_builtins(config))
    status = "failed"
    shown = [name for name, node in planner.graph.items() if not node.lazy]
    with ui.watcher(shown, plain) as watch:
        events = Events(directory / "events.jsonl", [watch])
        process = {"pid": os.getpid(), "start": guard.start_time(os.getpid()), "machine": guard.machine()}
        events.emit("run.started", recipe=config.recipe, run=directory.name, words=list(words), process=process)
        execution = Execution(planner=planner, directory=directory, events=events, argv=list(words))
        try:
            execution.run()
            status = "done"
        except Interrupted:
            status = "interrupted"
            raise
        finally:
            seconds = time.monotonic() - began
            overrides = [word for word in words if "=" in word and not word.startswith("-")]
            ended = {"status": status, "seconds": seconds, "overrides": overrides}
            write_json(directory / "run.json", {**ended, "steps": steps_as_json(execution.steps)})
            events.emit("run.finished", status=status, seconds=seconds)
            events.close()
    for name, step in execution.steps.items():
        if step.node.kind == "evaluate" and step.path:
            print(f"{name}: {step.path}\n\n{ui.evaluation(json.loads((step.path / 'evaluation.json').read_text()))}")
    ui.narrate("done", config.recipe, f"{ui.duration(seconds)}  {directory}")


def _fresh_directory(parent: Path, name: str) -> Path:
    """A new `<time>-<name>`; a second one in the same second gets a number."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = parent / f"{stamp}-{name}"
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
        return directory
    raise StoreError(f"run.dir: a thousand runs started at once in `{base.parent}`", "wait a second")
