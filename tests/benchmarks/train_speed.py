"""Speed of training steps in this tree and in an earlier one, in turns on one machine.

    python -m tests.benchmarks.train_speed STORE TREE RECIPE [KEY=VALUE ...] [-- KEY=VALUE ...]

STORE holds the artifacts that TREE, a checkout of an earlier commit, made by `speculators-run recipe=RECIPE
until=train` with the overrides after `--`, in the names that TREE has for them; this tree gets the overrides before.
Both train on the same inputs. Prints tokens per second of each turn, as the stage records them, and the ratio of the
medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from speculators.runner.servers import threads
from tests.benchmarks.same_bytes import Stages

TURNS = 6
ROOT = Path(__file__).parents[2]


def speed_here(store: str, recipe: str, *overrides: str) -> float:
    """Tokens per second of this tree, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        job, _ = Stages(store, recipe, list(overrides), Path(scratch)).run("train")
        return float(job.record["tokens_per_second"])


def python(tree: Path, *arguments: str) -> str:
    """Output of a Python process that imports a tree."""
    command = [sys.executable, *arguments]
    libraries = threads.openmp_environment(Path(sys.executable)) | threads.allocator_environment()  # as workers have
    environment = {**os.environ, **libraries, "PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def speed_of_tree(store: str, tree: Path, recipe: str, overrides: list[str]) -> float:
    """Tokens per second of the earlier tree's own command line."""
    with tempfile.TemporaryDirectory() as own:
        stores = [f"run.store={own}", f"run.stores_read=[{Path(store).absolute()}]"]
        options = [f"recipe={recipe}", "until=train", "force=train", *overrides, *stores]
        python(tree, "-m", "speculators.cli", *options)
        (artifact,) = Path(own).glob("artifacts/train/*/*/artifact.json")
        return float(json.loads(artifact.read_text())["record"]["tokens_per_second"])


def speed_of_this_tree(store: str, recipe: str, overrides: list[str]) -> float:
    """Tokens per second of this tree, in a process of its own."""
    arguments = ["--once", str(Path(store).absolute()), recipe, *overrides]
    return float(python(ROOT, "-m", "tests.benchmarks.train_speed", *arguments).split()[-1])


def main(store: str, tree: str, recipe: str, *overrides: str) -> None:
    """Print the speeds of all turns, and the ratio."""
    split = overrides.index("--") if "--" in overrides else len(overrides)
    ours, theirs = list(overrides[:split]), list(overrides[split + 1 :])
    measures = {
        "before": lambda: speed_of_tree(store, Path(tree).absolute(), recipe, theirs),
        "now": lambda: speed_of_this_tree(store, recipe, ours),
    }
    speeds: dict[str, list[float]] = {side: [] for side in measures}
    for turn in range(TURNS):
        # In alternating order, so that a machine that slows down or speeds up favours neither.
        for side in list(measures)[:: 1 if turn % 2 == 0 else -1]:
            speeds[side].append(measures[side]())
        print(f"before {speeds['before'][-1]:.1f}, now {speeds['now'][-1]:.1f} tokens/s", flush=True)
    ratio = statistics.median(speeds["now"]) / statistics.median(speeds["before"])
    print(f"{recipe}: {ratio:.3f}x, medians of {TURNS} turns")


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        print(speed_here(*sys.argv[2:]))
    else:
        main(*sys.argv[1:])
