"""Jobs as the worker would hand them to a stage, with the options that the stage declared and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speculators.config.fields import select
from speculators.config.schema import Config, from_builtins
from speculators.job import Job
from speculators.runner.planning.graph import KINDS


def make_job(stage: str, work: Path, config: Config, **inputs: Path) -> Job:
    """A job in `work`; an input `dataset__name` is called `dataset.name`."""
    job = Job(
        node=stage,
        stage=stage,
        key="0" * 64,
        config=from_builtins(Config, select(config, KINDS[stage].reads)),
        derived={},
        inputs={name.replace("__", "."): path for name, path in inputs.items()},
        digests={},
        services={},
        work=work,
    )
    job.output.mkdir(parents=True, exist_ok=True)
    job.scratch.mkdir(exist_ok=True)
    return job


def lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
