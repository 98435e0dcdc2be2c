"""Run the stage on a small world, in a process of its own that a test may kill.

Usage: python run_train.py WORLD WORK SECONDS_BETWEEN_CHECKPOINTS
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny

from speculators.config import Config, Device, Dtype, Eagle3, Target, Train, Vocab
from speculators.job import Job
from speculators.stages.train import main


def make_job(world: Path, work: Path, **train: object) -> Job:
    """A request for the stage, in a world that `tiny` wrote."""
    options = {"epochs": 3, "batch_tokens": 64, "precision": Dtype.float32, "device": Device.cpu, "log_every": 4}
    config = Config(
        target=Target(source="local"),
        data={},
        vocab=Vocab(size=40),
        train=Train(**{**options, **train}),  # type: ignore[arg-type]
        speculator=Eagle3(),
        pipeline={},
    )
    job = Job(
        node="train",
        stage="train",
        key="0" * 64,
        config=config,
        derived={"layer_ids": [1, 3, 4], "capture_layer_ids": [1, 3, 4, 6]},
        inputs={name: world / name for name in ("tokens", "features", "vocab", "target")},
        digests={"target": "t" * 64, "tokens": "k" * 64, "features": "f" * 64, "vocab": "v" * 64},
        services={},
        work=work,
    )
    job.output.mkdir(parents=True, exist_ok=True)
    job.scratch.mkdir(parents=True, exist_ok=True)
    return job


def write_world(directory: Path) -> Path:
    """Target, tokens, features and vocabulary."""
    tiny.write_target(directory / "target")
    tiny.write_corpus(directory)
    tiny.write_vocabulary(directory / "vocab")
    return directory


if __name__ == "__main__":
    main(make_job(Path(sys.argv[1]), Path(sys.argv[2]), checkpoint_seconds=float(sys.argv[3])))
