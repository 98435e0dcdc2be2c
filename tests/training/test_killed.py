"""A training that is killed at ten random moments, one after the other, ends in the same bytes as one that is not.

The attempts are forks of a process that has imported everything, so that what takes the time is the training.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from run_train import make_job, write_world

from speculators.job import Job
from speculators.stages import train

KILLS = 10


def attempt(world: Path, work: Path, options: dict[str, Any], kill_at: int | None, delay: float) -> None:
    """Train until `delay` seconds after step `kill_at`: in a step, in a validation, or while the state is written."""
    import torch

    torch.set_num_threads(1)
    job = make_job(world, work, checkpoint_seconds=0.0, **options)
    job.config.target.max_reference_gib = 0.0
    asked = threading.Event()

    def progress(self: Job, done: float, total: float, unit: str, **note: object) -> None:
        if kill_at is not None and done >= kill_at and not asked.is_set():
            asked.set()
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    Job.progress = progress  # type: ignore[method-assign]
    train.main(job)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "eagle3"},
        {"algorithm": "dflash", "ema": 0.9, "gradient_accumulation_steps": 2, "save_every_epochs": 2},
    ],
    ids=["eagle3", "dflash"],
)
def test_ten_kills_at_random_moments_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["speculators.stages.train", "run_train", "test_killed"])
    world = write_world(tmp_path / "world")

    def run(work: Path, kill_at: int | None, delay: float) -> int:
        process = forks.Process(target=attempt, args=(world, work, options, kill_at, delay))
        process.start()
        process.join(250)
        assert process.exitcode is not None
        return process.exitcode

    assert run(tmp_path / "straight", None, 0.0) == 0
    expected = files(tmp_path / "straight" / "data")
    steps = len([line for line in expected["metrics.jsonl"].splitlines() if b'"lr"' in line]) * 4
    draw = random.Random(os.environ.get("KILL_SEED", "7"))
    for kill_at in sorted(draw.sample(range(1, steps - 4), KILLS)):
        assert run(tmp_path / "killed", kill_at, draw.uniform(0.0, 0.03)) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "data" / "summary.json").exists()
    assert run(tmp_path / "killed", None, 0.0) == 0
    found = files(tmp_path / "killed" / "data")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
