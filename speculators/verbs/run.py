"""run: run a recipe, with progress on stderr and the evaluation on stdout."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speculators import live, ui
from speculators.config import composed
from speculators.config.fields import to_builtins
from speculators.config.schema import Config
from speculators.errors import RecipeError, StoreError
from speculators.job import write_json
from speculators.runner import history, products
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.execution.signals import Interrupted
from speculators.runner.history import Run
from speculators.runner.planning import checks, datasets, lockfile, trackers
from speculators.runner.planning.plan import Planner, steps_as_json
from speculators.runner.servers import guard
from speculators.runner.store.artifacts import no_space, open_store
from speculators.verbs import usage

_HYDRA = ("--cfg", "--info", "--hydra-help")
"""Flags that Hydra carries out."""


def run(argv: list[str]) -> int:
    """`run recipe=NAME ...`; Hydra handles the command line if it contains one of Hydra's flags."""
    arguments = usage.parse("run", argv)
    if len(actions := [flag for flag in ("--multirun", *_HYDRA) if flag in arguments.flags]) > 1:
        raise RecipeError(f"{' and '.join(actions)} exclude each other", f"leave all but one out: {actions[0]}")
    if "--cfg" not in arguments.flags and arguments.flags.keys() & {"--resolve", "--package"}:
        raise RecipeError("--resolve and --package need --cfg", "add --cfg job")
    if "--multirun" in arguments.flags:
        from speculators.verbs.sweep import sweep

        return sweep(argv, run_recipe, _fresh_directory)
    if actions:
        from speculators.config import compose

        compose.show_by_hydra(argv)
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
    planner.refuse_unresolved()
    checks.check_machine(config, planner.graph)
    steps = planner.plan()
    trackers.check_trackers(config, steps)
    datasets.check_datasets(config, steps)
    if config.run.locked:
        lockfile.refuse_if_different(planner)
    for note in planner.notes:
        ui.narrate("note", note)
    directory = _fresh_directory(Path(config.run.dir).expanduser().resolve(), config.recipe)
    if announce is not None:
        announce(directory)
    status = "failed"
    lazy = {name for name, node in planner.graph.items() if node.lazy}
    started: list[str] = []
    with _full_disk_reported(directory), live.watcher(planner.graph, lines_only, lazy) as watch:
        (directory / "logs").mkdir()
        write_json(directory / "config.json", to_builtins(config))
        events = Events(directory / "events.jsonl", [watch, lambda event: _note_start(event, started)])
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
            # A full disk must not hide what ended the run.
            with contextlib.nullcontext() if status == "done" else contextlib.suppress(OSError):
                events.emit("run.finished", status=status, seconds=seconds)
                events.close()
                write_json(directory / "run.json", {**ended, "steps": steps_as_json(execution.steps)})
                if status == "done":
                    write_json(directory / products.LOCK, lockfile.lock_contents(planner))
    finished = history.read_run(directory)
    assert finished is not None
    kept = bool(started) or announce is not None
    if kept:
        products.link_results(finished)
    else:
        shutil.rmtree(directory)  # a list of runs shows what ran
    report(finished, "" if kept else str(planner.store.root))


def report(run: Run, cached_in: str = "") -> None:
    """Print the results of a run, then where they are and what to do next.

    `cached_in` is the store, if all stages were cached and the run has no directory any more.
    """
    _print_results(run)
    if cached_in:
        ui.narrate("done", run.recipe, f"{ui.duration(run.seconds)}  all stages were cached, nothing ran")
        ui.narrate("", "", f"artifacts: {cached_in}")
    else:
        ui.narrate("done", run.recipe, f"{ui.duration(run.seconds)}  {run.path}")
    if lines := ui.labelled(products.next_steps(run), ui.width(sys.stderr)):
        print(f"\n{lines}", file=sys.stderr)


def _note_start(event: Mapping[str, Any], started: list[str]) -> None:
    """Add the node of an event that starts a worker."""
    if event["event"] == "stage.started":
        started.append(event["node"])


@contextlib.contextmanager
def _full_disk_reported(directory: Path) -> Iterator[None]:
    """Convert the error of a full disk of the run directory to that of a full store."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_space(error, error.filename or directory) from error


def _print_results(run: Run) -> None:
    """Print the evaluations of a run, and of drafts that it did not evaluate what training measured."""
    for product in products.of_run(run):
        if product.evaluation is None:
            summary = json.loads((product.training / "summary.json").read_text())
            print(f"{product.node}: {product.training}\n\n{ui.training(summary)}\n")
    for name, stage in run.stages.items():
        if stage.kind == "evaluate" and stage.path:
            results = json.loads((Path(stage.path) / "evaluation.json").read_text())
            print(f"{name}: {stage.path}\n\n{ui.evaluation(results)}\n")
    sys.stdout.flush()


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
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(error, directory) from error
            raise StoreError(
                f"run.dir: cannot create `{directory}` ({error.strerror})",
                "name a writable directory: run.dir=PATH",
            ) from None
        return directory
    raise StoreError(
        f"run.dir: a thousand runs started at once in `{base.parent}`", "run the same command again in a second"
    )
