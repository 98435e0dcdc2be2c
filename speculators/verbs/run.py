"""run: run a recipe, with progress on stderr and the evaluation on stdout."""

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

_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--resolve", "-p", "--package")


def run(argv: list[str]) -> int:
    """`run recipe=NAME ...`; Hydra handles the command line if it contains one of Hydra's flags."""
    if "-m" in argv or "--multirun" in argv:
        from speculators.verbs.sweep import sweep

        return sweep(argv, run_recipe, _fresh_directory)
    if any(argument in _FLAGS or argument.startswith("--") for argument in argv):
        from speculators.config import compose

        compose.run_as_hydra_app(argv, lambda config: run_recipe(config, argv))
    else:
        run_recipe(composed.compose_cached(argv, write=True), argv)
    return 0


def run_recipe(
    config: Config, argv: Sequence[str], *, announce: Callable[[Path], None] | None = None, lines_only: bool = False
) -> None:
    """Run a recipe, with progress on stderr and the evaluation on stdout.

    `argv` is recorded in the run directory, whose path `announce` is called with; `lines_only` if other runs share the
    terminal.
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
    stages = [name for name, node in planner.graph.items() if not node.lazy]
    with ui.watcher(stages, lines_only) as watch:
        events = Events(directory / "events.jsonl", [watch])
        process = {"pid": os.getpid(), "start": guard.start_time(os.getpid()), "machine": guard.machine()}
        events.emit("run.started", recipe=config.recipe, run=directory.name, words=list(argv), process=process)
        execution = Execution(planner=planner, directory=directory, events=events, argv=list(argv))
        try:
            execution.run()
            status = "done"
        except Interrupted:
            status = "interrupted"
            raise
        finally:
            seconds = time.monotonic() - began
            overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
            ended = {"status": status, "seconds": seconds, "overrides": overrides}
            write_json(directory / "run.json", {**ended, "steps": steps_as_json(execution.steps)})
            events.emit("run.finished", status=status, seconds=seconds)
            events.close()
    for name, step in execution.steps.items():
        if step.node.kind == "evaluate" and step.path:
            print(f"{name}: {step.path}\n\n{ui.evaluation(json.loads((step.path / 'evaluation.json').read_text()))}")
    ui.narrate("done", config.recipe, f"{ui.duration(seconds)}  {directory}")


def _fresh_directory(parent: Path, name: str) -> Path:
    """Create the directory `<time>-<name>`, with a number if it exists."""
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
                f"run.dir: cannot create `{directory}` ({error.strerror})",
                "name a writable directory: run.dir=PATH",
            ) from None
        return directory
    raise StoreError(
        f"run.dir: a thousand runs started at once in `{base.parent}`", "run the same command again in a second"
    )
