"""What a person reads in a terminal, at 80 and at 120 columns, without colour: a text file each in `captures/`."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from speculators import cli, live
from speculators.config import compose
from speculators.runner import history
from speculators.runner.planning import estimate
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store
from speculators.verbs import run as run_verb
from tests.conftest import EVALUATION, ROW, publish_all
from tests.runner.machines import machine, pretend
from tests.runner.pasts import trained

DIRECTORY = Path(__file__).with_name("captures")
DEMO = "recipe=smollm2_eagle3"
RUN = "20261130-160935-smollm2_eagle3"
LONG_NAME = f"{RUN}_with_answers_of_its_own"
CHANGED = ["prompts.seed=1", "train.lr=1e-3", "train.seed=7", "train.epochs=3", "train.warmup_ratio=0.1"]
KEY = "0123abcd" * 8
HOME = "/home/me/speculations"
"""What stands for the temporary directory, whose name is as long, so that lines wrap alike."""


class Terminal(io.StringIO):
    """Text of a terminal."""

    def isatty(self) -> bool:
        return True


def captures() -> dict[str, str]:
    """All captures, by the name of their file."""
    texts = {}
    for columns in (80, 120):
        for name, capture in CAPTURES.items():
            directory = tempfile.TemporaryDirectory(dir="/tmp", prefix="capture-")
            with pytest.MonkeyPatch.context() as patch, directory as at:
                patch.chdir(at)
                for variable, value in {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}.items():
                    patch.setenv(variable, value)
                patch.setenv("SPECULATORS_STORE", f"{at}/store")
                pretend(patch, machine(0, cores=8, memory_gib=32.0))
                patch.setattr(estimate, "free_bytes", lambda root: 50 * 2**30)
                texts[f"{name}_{columns}.txt"] = capture(columns).replace(at, HOME)
    return texts


def update() -> None:
    """Write them anew."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in captures().items():
        (DIRECTORY / name).write_text(text)


def _printed(*commands: list[str]) -> str:
    """Commands and what they print."""
    shown = []
    for command in commands:
        terminal = Terminal()
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            assert cli._guarded(command) == 0, terminal.getvalue()
        shown.append(f"$ speculators-run {' '.join(command)}\n{terminal.getvalue()}")
    return "\n".join(shown)


def _finish_run(name: str) -> None:
    """Leave the artifacts of a run of the demo."""
    store = Store(Path("store"))
    publish_all(store, Planner(compose.compose([DEMO]), store), name)


def plan_of_an_empty_store(columns: int) -> str:
    """The first command of a newcomer."""
    return _printed(["plan", DEMO])


def plan_after_a_run(columns: int) -> str:
    """The same, and with changed options."""
    _finish_run(RUN)
    return _printed(["plan", DEMO], ["plan", DEMO, *CHANGED])


def queries_of_the_store(columns: int) -> str:
    """What is there, and why a stage is not."""
    _finish_run(LONG_NAME)
    return _printed(["explain", "train", DEMO], ["explain", "train", DEMO, *CHANGED[1:]], ["ls"], ["gc", "days=0"])


def end_of_a_run(columns: int) -> str:
    """Results, and what to do next; then `show`."""
    many = {**ROW, "num_speculative_tokens": 7, "per_position": [0.31, 0.15, 0.05, 0.02, 0.01, 0.004, 0.001]}
    evaluated = {**EVALUATION, "datasets": {name: {"measurements": [many]} for name in ("human_eval", "sharegpt")}}
    shown = []
    for name, results in ((RUN, EVALUATION), (f"{RUN}-1", evaluated)):
        path = trained(Path("runs"), name, Store(Path("store")), evaluated=results, argv=[DEMO, *CHANGED])
        finished = history.read_run(path)
        assert finished is not None
        terminal = Terminal()
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            run_verb.report(finished)
        shown.append(terminal.getvalue())
    return "\n".join([*shown, _printed(["show", RUN], ["show", RUN, "train"], ["runs"])])


def _events() -> Iterator[tuple[float, dict[str, Any]]]:
    """Seconds since the one before, and the event, of a run."""
    stages = ["prompts", "regenerate", "tokenize", "vocab", "extract", "train", "evaluate"]
    expected = dict.fromkeys(stages, 10.0) | {"regenerate": 900.0, "train": 600.0, "evaluate": 240.0}
    yield 0, {"event": "run.estimated", "seconds": expected}

    def stage(
        node: str, steps: Sequence[tuple[float, int]] = (), total: int = 1, unit: str = "", **note: Any
    ) -> Iterator[tuple[float, dict[str, Any]]]:
        yield 1, {"event": "stage.decided", "node": node, "state": "run", "reason": "new", "key": KEY}
        yield 0, {"event": "stage.started", "node": node, "log": "", "phase": 0, "phases": 1, "attempt": 1}
        for seconds, done in steps:
            progress = {"done": done, "total": total, "unit": unit, "note": note}
            yield seconds, {"event": "stage.progress", "node": node, **progress}
        yield 2, {"event": "stage.finished", "node": node, "seconds": 75.0, "record": {}, "key": KEY}

    def cached(node: str) -> tuple[float, dict[str, Any]]:
        reason = f"made by {LONG_NAME}"
        return 0, {"event": "stage.decided", "node": node, "state": "cached", "reason": reason, "key": KEY}

    yield cached("dataset.sharegpt")
    yield from stage("target", [(1, 60), (9, 200)], 270, "MiB")
    yield from stage("prompts")
    server = {"service": "a", "mode": "extract", "log": ""}
    yield 1, {"event": "service.starting", **server}
    yield 36, {"event": "service.ready", **server, "seconds": 36.2}
    conversations = [(5.0, 8), (20.0, 40), (30.0, 130)]
    yield from stage("regenerate", conversations, 384, "conversations", tokens_per_second=140)
    yield 1, {"event": "service.stopped", **server}
    for name in ("tokenize", "vocab", "extract"):
        yield from stage(name)
    figures = {"acceptance_length": 1.523, "loss": 2.71, "tokens_per_second": 1140}
    yield from stage("train", [(10, 20), (40, 110), (30, 200)], 480, "steps", **figures)
    yield from stage("evaluate", [(10, 5), (20, 20)], 64, "prompts of human_eval")
    yield 1, {"event": "run.finished", "status": "done", "seconds": 400.0}


def live_table(columns: int) -> str:
    """The table at the start, in the middle of each stage with progress, and at the end."""
    nodes = list(Planner(compose.compose([DEMO]), Store(Path("store"))).graph)
    now = 0.0
    console = Console(file=io.StringIO(), width=columns, height=40)
    table = live.Live(nodes, console, lambda: now, lazy=[name for name in nodes if name.startswith("dataset.")])
    shown, latest = [], ""

    def draw(title: str) -> None:
        with console.capture() as capture:
            console.print(table.draw())
        shown.append(f"--- {title}\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))

    draw("at first")
    for seconds, event in _events():
        now += seconds
        if event["event"] == "stage.finished" and latest == "stage.progress":
            draw(f"in {event['node']}")
        latest = event["event"]
        table(event)
        if latest in ("service.starting", "run.finished"):
            draw(latest)
    return "\n".join(shown)


CAPTURES: dict[str, Callable[[int], str]] = {
    "plan_of_an_empty_store": plan_of_an_empty_store,
    "plan_after_a_run": plan_after_a_run,
    "queries_of_the_store": queries_of_the_store,
    "end_of_a_run": end_of_a_run,
    "live_table": live_table,
}
