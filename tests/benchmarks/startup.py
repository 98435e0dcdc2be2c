"""What it costs to say nothing new, and to plan a lot. `python tests/benchmarks/startup.py [STORE]`.

Wall time of `--help`, `plan` and, with a store in which the demo is finished, of a run that finds everything; beside
importing hydra in a bare interpreter. Then planning 1 000 stages side by side and 10 000 in a chain.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from speculators import recipe
from speculators.runner import graph
from speculators.runner.plan import Planner
from speculators.runner.store import Store

RECIPE = "recipe=smollm2_eagle3"
TRIVIAL = graph.Kind(version=1, gives=("thing",), takes={"thing": "thing"}, target=False)
FIRST = graph.Kind(version=1, gives=("thing",), target=False)


def wall(*command: str, times: int = 10) -> str:
    """Median and range of a command's wall time."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(times + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=directory, check=True, capture_output=True)
            found.append(time.perf_counter() - began)
    found = found[1:]
    return f"{statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"


def planned(pipeline: dict[str, dict[str, str]]) -> float:
    """Seconds to plan a pipeline of trivial stages in an empty store."""
    config = recipe.compose([RECIPE])
    config.pipeline = pipeline
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(graph.KINDS, first=FIRST, trivial=TRIVIAL):
        began = time.perf_counter()
        assert len(Planner(config, Store(Path(root))).plan()) == len(pipeline)
        return time.perf_counter() - began


def main(store: str = "") -> None:
    """Print it all."""
    cli = ("-m", "speculators.cli")
    print("import hydra ", wall("-c", "import hydra"))
    print("--help       ", wall(*cli, "--help"))
    if store:
        print("plan         ", wall(*cli, "plan", RECIPE, f"run.store={store}"))
        print("run, all hits", wall(*cli, RECIPE, f"run.store={store}"))
    wide = {"one": {"uses": "first"}} | {f"n{i}": {"uses": "trivial", "thing": "one"} for i in range(999)}
    print(f"1 000 stages side by side: {planned(wide):.2f} s")
    chain = {"n0": {"uses": "first"}} | {f"n{i}": {"uses": "trivial", "thing": f"n{i - 1}"} for i in range(1, 10_000)}
    print(f"10 000 stages in a chain:  {planned(chain):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
