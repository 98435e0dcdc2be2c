"""Processes that share a training: the same result whatever their number, and what happens when one of them fails.

The processes are real, and talk over gloo. Most of their time goes into starting, so those of one test run several
trainings one after the other.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_train import write_world
from trainings import job_of, losses, stop_at

from speculators.config.algorithms import Init
from speculators.config.choices import Optimizer
from speculators.errors import StageError
from speculators.job import Job
from speculators.stages import train
from speculators.training.optim import owners
from speculators.training.ranks import Ranks, process_group

WAYS: list[dict[str, Any]] = [
    {"algorithm": "eagle3"},
    {"algorithm": "eagle3", "gradient_accumulation_steps": 2},
    {"algorithm": "eagle3", "optimizer": Optimizer.adamw, "gradient_accumulation_steps": 2},
    {"algorithm": "dflash"},
    {"algorithm": "dflash", "gradient_accumulation_steps": 2},
]

pytestmark = pytest.mark.usefixtures("one_thread")  # the processes share the cores with other tests


def fit_all(ranks: Ranks, jobs: list[Job]) -> None:
    for job in jobs:
        loop = train.fit(ranks, job)
        if ranks.first:
            train.publish(job, loop)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The loss curves of one process and one pack a step."""
    found = {}
    for way in WAYS:
        plain = {**way, "gradient_accumulation_steps": 1}
        if str(plain) not in found:
            job = job_of(world, tmp_path_factory.mktemp("alone"), **plain)
            train.main(job)
            found[str(plain)] = losses(job)
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_loss_curve_does_not_depend_on_processes_and_packs(
    world: Path, tmp_path: Path, alone: dict[str, list[float]], processes: int
) -> None:
    jobs = [job_of(world, tmp_path / str(n), **way) for n, way in enumerate(WAYS)]
    with process_group(processes, fit_all, jobs) as ranks:
        fit_all(ranks, jobs)
    for job, way in zip(jobs, WAYS, strict=True):
        assert losses(job) == pytest.approx(alone[str({**way, "gradient_accumulation_steps": 1})], abs=1e-5), way


def test_a_run_that_was_stopped_goes_on_with_as_many_processes_bit_by_bit_and_with_fewer_to_1e_5(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"num_processes": 2, "ema": 0.9, "checkpoint_seconds": 0.0}
    straight = job_of(world, tmp_path / "straight", **options)
    train.main(straight)

    stop_at(monkeypatch, 9, job_of(world, tmp_path / "two", **options))
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    two, one = (
        job_of(world, tmp_path / "two", **options),
        job_of(world, tmp_path / "one", **{**options, "num_processes": 1}),
    )
    train.main(two)
    train.main(one)
    for name in ("best/model.safetensors", "last/model.safetensors", "metrics.jsonl", "summary.json"):
        assert (two.output / name).read_bytes() == (straight.output / name).read_bytes(), name
    assert losses(one) == pytest.approx(losses(straight), abs=1e-5)


def test_whichever_process_meets_a_loss_that_is_no_number_its_rows_are_named(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    shard = world / "features" / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-400:] = b"\xff" * 400  # bfloat16 NaN in the states of the shard's last row
    shard.write_bytes(bytes(raw))
    named = []
    for processes in (1, 2):
        job = job_of(world, tmp_path / f"work{processes}", validation_ratio=0.0, num_processes=processes)
        job.config.speculator.init = Init.random  # which is fitted to all states before the first step
        with pytest.raises(StageError, match=r"loss nan.* on rows \d+ \(conversation-?\S* ?\S*\)") as caught:
            train.main(job)
        named.append(set(re.findall(r"\(conversation (\S+)\)", caught.value.message)))
    assert named[1] < named[0], "those of a process's pack, not of the whole step"


def leave(ranks: Ranks, code: int) -> None:
    if ranks.rank == 1:
        os._exit(code)


def test_a_process_that_dies_ends_the_training_and_is_named() -> None:
    with (
        pytest.raises(StageError, match="process 1 of the training ended with exit code 3"),
        process_group(2, leave, 3) as r,
    ):
        r.gather("anybody there?")


def complain(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise StageError("the disk of rank 1 is full", "empty it")


def test_what_a_process_says_of_its_failure_is_what_the_training_says() -> None:
    with pytest.raises(StageError, match="the disk of rank 1 is full"), process_group(2, complain) as ranks:
        ranks.all_gather_object("anybody there?")


def test_matrices_are_shared_out_by_what_they_cost() -> None:
    shapes = {"a": (8, 8), "b": (4, 8), "c": (8, 4), "d": (4, 4)}
    # 512, 128, 128, 64: a | b, c, d
    assert owners(shapes, 2) == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert set(owners(shapes, 1).values()) == {0}
