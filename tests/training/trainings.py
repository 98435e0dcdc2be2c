"""What several tests do with a training: run it without its gate, stop it somewhere, read its curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_train import make_job

from speculators.job import Job
from speculators.stages import train


def job_of(world: Path, work: Path, **options: Any) -> Job:
    """Logs every step, and has no gate, which is tested elsewhere and takes its time."""
    job = make_job(world, work, **{"log_every_steps": 1, "batch_tokens": 96, **options})
    job.config.target.max_reference_gib = 0.0
    return job


def metrics(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]


def losses(job: Job) -> list[float]:
    """Of every step that was logged, and of every validation."""
    return [line.get("validation", line)["loss"] for line in metrics(job)]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, job: Job) -> None:
    """Train, and be interrupted after a step."""

    def stop_there(self: Job, done: float, total: float, unit: str, **note: object) -> None:
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Job, "progress", stop_there)
        with pytest.raises(KeyboardInterrupt):
            train.main(job)
