"""Run the stage on a small world, in a process of its own that a test may kill.

Usage: python run_train.py WORLD WORK SECONDS_BETWEEN_CHECKPOINTS ALGORITHM [ENDPOINT.json STATES_DISK_GIB]

With an endpoint, states are drawn from there, and those that are kept are sealed row by row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny

from speculators.config.algorithms import DFlash, Eagle3, Init, Speculator
from speculators.config.choices import Device, Dtype
from speculators.config.fields import select
from speculators.config.schema import Config, Extract, Target, Train, Vocab, from_builtins
from speculators.features import disk_cache
from speculators.job import Endpoint, Job
from speculators.runner.planning.graph import DRAWING, KINDS
from speculators.stages.train import main

SPECULATORS: dict[str, Speculator] = {
    "eagle3": Eagle3(init=Init.induction),
    "dflash": DFlash(num_layers=2, block_size=4, mask_token_id=7, max_anchors=12, init=Init.induction),
}


def make_job(
    world: Path, work: Path, endpoint: Endpoint | None = None, *, algorithm: str = "eagle3", **train: object
) -> Job:
    """A request for the stage, in a world that `tiny` or `states_server` wrote."""
    options = {"epochs": 3, "batch_tokens": 64, "precision": Dtype.float32, "device": Device.cpu, "log_every_steps": 4}
    config = Config(
        # Rows that are counted by what the server was asked for are not to be asked for by the gate too.
        target=Target(
            source="local",
            dtype=Dtype.bfloat16 if endpoint is None else Dtype.float32,
            min_greedy_agreement=0.98 if endpoint is None else 0.0,
        ),
        data={},
        vocab=Vocab(size=40),
        extract=Extract(concurrency=2, retries=1, timeout=20.0),
        train=Train(**{**options, **train}),  # type: ignore[arg-type]
        speculator=SPECULATORS[algorithm],
        pipeline={},
    )
    reads = (*KINDS["train"].reads, *(DRAWING if endpoint else ()))
    job = Job(
        node="train",
        stage="train",
        key="0" * 64,
        config=from_builtins(Config, select(config, reads)),
        derived={
            "layer_ids": [1, 3, 4],
            "capture_layer_ids": [1, 3, 4, 6],
            "verifier": {"name": "org/target", "revision": "abc"},
        },
        inputs={name: world / name for name in ("tokens", "vocab", "target", *(() if endpoint else ("features",)))},
        digests={"target": "t" * 64, "tokens": "k" * 64, "features": "f" * 64, "vocab": "v" * 64},
        services={"target": endpoint} if endpoint else {},
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
    world, work, seconds, algorithm, *drawn = sys.argv[1:]
    options: dict[str, object] = {"checkpoint_seconds": float(seconds)}
    endpoint = None
    if drawn:
        plain = json.loads(Path(drawn[0]).read_text())
        endpoint = Endpoint(**{**plain, "directory": Path(plain["directory"]), "log": Path(plain["log"])})
        options |= {"states_disk_gib": float(drawn[1]), "states_memory_gib": 0.0}
        disk_cache.SET_TOKENS = 1
    main(make_job(Path(world), Path(work), endpoint, algorithm=algorithm, **options))
