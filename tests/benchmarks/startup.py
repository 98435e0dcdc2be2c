"""What it costs to say nothing new, and to plan a lot. `python -m tests.benchmarks.startup [STORE [KEY=VALUE ...]]`.

Wall time of `--help`, of a tab completion, of `plan` where Hydra has to compose, and, with a store in which the demo is
finished with these overrides, of a run that finds everything and of `plan` after it; next to importing hydra in a bare
interpreter. Then what an executed stage costs next to an interpreter that does nothing, and planning 1 000 stages side
by side and 10 000 in a chain.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import speculators
from speculators.config import compose
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.planning import graph
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store

RECIPE = "recipe=smollm2_eagle3"
TRIVIAL = graph.Kind(version=1, gives=("thing",), takes={"thing": "thing"}, target=False)
FIRST = graph.Kind(version=1, gives=("thing",), target=False)


def wall(*command: str, times: int = 10) -> list[float]:
    """Seconds that a command takes, each time but the first."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(times + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=directory, check=True, capture_output=True)
            found.append(time.perf_counter() - began)
    return found[1:]


def told(found: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"


def executed(stages: int = 20) -> list[float]:
    """Seconds of each stage in a chain of stages that write a line: from the end of the one before to its own."""
    config = compose.compose([RECIPE])
    config.pipeline = {"n0": {"uses": "first"}}
    config.pipeline |= {f"n{i}": {"uses": "trivial", "thing": f"n{i - 1}"} for i in range(1, stages)}
    with tempfile.TemporaryDirectory() as temporary, mock.patch.dict(graph.KINDS, first=FIRST, trivial=TRIVIAL):
        root = Path(temporary)
        (root / "logs").mkdir()
        for name in ("first", "trivial"):
            (root / f"{name}.py").write_text("def main(job):\n    (job.output / 'thing').write_text(job.key)\n")
        joined = f"import speculators.stages\nspeculators.stages.__path__.append({str(root)!r})\n"
        (root / "sitecustomize.py").write_text(joined)
        path = os.pathsep.join([str(root), str(Path(speculators.__file__).parents[1])])
        ends: list[float] = []

        def ended(event: Mapping[str, Any]) -> None:
            if event["event"] == "stage.finished":
                ends.append(time.perf_counter())

        with mock.patch.dict(os.environ, PYTHONPATH=path):
            planner = Planner(config, Store(root / "store"))
            Execution(planner=planner, directory=root, events=Events(root / "events", [ended]), argv=[]).run()
        assert len(ends) == stages
        return [after - before for before, after in itertools.pairwise(ends)]


def planned(pipeline: dict[str, dict[str, str]]) -> float:
    """Seconds to plan a pipeline of trivial stages in an empty store."""
    config = compose.compose([RECIPE])
    config.pipeline = pipeline
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(graph.KINDS, first=FIRST, trivial=TRIVIAL):
        began = time.perf_counter()
        assert len(Planner(config, Store(Path(root))).plan()) == len(pipeline)
        return time.perf_counter() - began


def main(store: str = "", *overrides: str) -> None:
    """Print it all."""
    cli = ("-m", "speculators.cli")
    print("import hydra ", told(wall("-c", "import hydra")))
    print("--help       ", told(wall(*cli, "--help")))
    print("tab completion", told(wall(*cli, "completion", "candidates", RECIPE, "train.")))
    with tempfile.TemporaryDirectory() as own, mock.patch.dict(os.environ, SPECULATORS_STORE=f"{own}/store"):
        print("plan, of what no run has composed", told(wall(*cli, "plan", RECIPE, f"run.store={store}")))
        if store:
            steps = Planner(compose.compose([RECIPE, *overrides]), Store(Path(store))).plan()
            missing = [step.node.name for step in steps if step.artifact is None and not step.node.lazy]
            assert not missing, f"the store lacks {missing}: this would make them"
            print("run, all hits", told(wall(*cli, RECIPE, *overrides, f"run.store={store}")))
            print("plan, of the same", told(wall(*cli, "plan", RECIPE, *overrides, f"run.store={store}")))
    print("python       ", told(wall("-c", "pass")))
    print("imports of a stage's process", told(wall("-c", "import speculators.worker")))
    print("a stage      ", told(executed()))
    wide = {"one": {"uses": "first"}} | {f"n{i}": {"uses": "trivial", "thing": "one"} for i in range(999)}
    print(f"1 000 stages side by side: {planned(wide):.2f} s")
    chain = {"n0": {"uses": "first"}} | {f"n{i}": {"uses": "trivial", "thing": f"n{i - 1}"} for i in range(1, 10_000)}
    print(f"10 000 stages in a chain:  {planned(chain):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
