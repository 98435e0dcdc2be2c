"""A runner of trivial stages with a fake server: `crash_runner.py WORLD served|plain`, exit codes as the real one's."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from speculators.config.algorithms import Eagle3
from speculators.config.choices import Device
from speculators.config.schema import Config
from speculators.errors import RunError
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.execution.signals import Interrupted
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Kind
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store

FAKE = Path(__file__).parents[1] / "runner" / "fake_server.py"
PLAIN = {"seed": {}, "left": {"uses": "tally", "lines": "seed"}}
SERVED = {"serve": {}, "seed": {}, "asked": {"uses": "query", "lines": "seed", "target": "serve"}}


def declare() -> None:
    """The kinds of stages that these recipes are made of."""
    graph.KINDS["seed"] = Kind(version=1, gives=("lines",), target=False)
    graph.KINDS["tally"] = Kind(version=1, gives=("lines",), takes={"lines": "lines"}, target=False)
    graph.KINDS["query"] = Kind(version=1, gives=("lines",), takes={"lines": "lines"}, serve="generate")


def config(world: Path, pipeline: dict[str, dict[str, str]]) -> Config:
    made = Config(recipe="crash", speculator=Eagle3(), pipeline=pipeline)
    made.target.source = str(world / "checkpoint")
    made.vocab.size = None
    made.hardware.device = Device.cpu
    made.run.retry_wait = 0.05
    made.run.retries = int(os.environ.get("CRASH_RETRIES", "2"))
    return made


def main(world: Path, pipeline: dict[str, dict[str, str]]) -> int:
    declare()
    vllm.engine_version = lambda python: "1.2.3"
    options = shlex.split(os.environ.get("CRASH_SERVER", ""))
    stranger = os.environ.get("CRASH_STRANGER", "")
    vllm.argv = lambda config, *, model, port, **_: [sys.executable, str(FAKE), str(port), stranger or model, *options]
    planner = Planner(config(world, pipeline), Store(world / "store"))
    directory = world / "runs" / f"{time.time_ns()}-{os.getpid()}"
    (directory / "logs").mkdir(parents=True)
    events = Events(directory / "events.jsonl")
    try:
        Execution(planner=planner, directory=directory, events=events, argv=["recipe=crash"]).run()
    except RunError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        return stop.exit_code
    finally:
        events.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), {"plain": PLAIN, "served": SERVED}[sys.argv[2]]))
