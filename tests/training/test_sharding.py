"""Weights that are divided among processes: the same result as whole ones, from less memory, and just as resumable.

The processes are real, and talk over gloo. Most of their time goes into starting, so those of one test run several
trainings one after the other.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from trainings import job_of, losses, stop_at

from speculators.config.choices import Dtype, Optimizer
from speculators.config.schema import Train
from speculators.job import Job
from speculators.stages import train
from speculators.training.ranks import Ranks, process_group, rows
from speculators.training.sharding import ShardedWeights, trained_weights

WAYS: list[dict[str, Any]] = [
    {"algorithm": "eagle3"},
    {"algorithm": "eagle3", "optimizer": Optimizer.adamw, "gradient_accumulation_steps": 2, "own": True},
    {"algorithm": "dflash", "gradient_accumulation_steps": 2},
    {"algorithm": "dflash", "own": True, "precision": Dtype.bfloat16},
]
Counts = tuple[int, int]

pytestmark = pytest.mark.usefixtures("one_thread")  # the processes share the cores with other tests


def divided(world: Path, work: Path, own: bool = False, **options: Any) -> Job:
    """`own`: embeddings and head are trained too."""
    job = job_of(world, work, **{"epochs": 1, "fsdp": True, **options})
    job.config.speculator.embed_requires_grad = job.config.speculator.train_lm_head = own
    return job


def fit_all(ranks: Ranks, jobs: list[Job]) -> list[list[Counts]]:
    """Of each training, numbers of each rank: elements of weights, and of the optimisers' state."""
    counts = []
    for job in jobs:
        loop = train.fit(ranks, job)
        held = sum(p.numel() for p in loop.weights.local.values())
        if isinstance(loop.weights, ShardedWeights):  # nor does the draft itself hold more
            assert held == sum(p.to_local().numel() for p in loop.weights.sharded.values()) + sum(
                p.numel() for p in loop.draft.parameters() if p.ndim < 2
            )
        counts.append(ranks.all_gather_object((held, sum(t.numel() for t in loop.optimizers.state().values()))))
        if ranks.first:
            train.publish(job, loop)
    return counts


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Job, Counts]]:
    """The same trainings by one process."""
    jobs = [
        divided(world, tmp_path_factory.mktemp("alone"), **{**way, "gradient_accumulation_steps": 1}) for way in WAYS
    ]
    return [(job, counts[0]) for job, counts in zip(jobs, fit_all(Ranks(), jobs), strict=True)]


@pytest.mark.parametrize("processes", [2, 4])
def test_divided_weights_train_as_whole_ones_do_and_each_process_has_its_share(
    world: Path, tmp_path: Path, alone: list[tuple[Job, Counts]], processes: int
) -> None:
    jobs = [divided(world, tmp_path / str(n), **way) for n, way in enumerate(WAYS)]
    with process_group(processes, fit_all, jobs) as ranks:
        counts = fit_all(ranks, jobs)
    for job, way, (whole, total), parts in zip(jobs, WAYS, alone, counts, strict=True):
        rounded = "precision" in way
        assert losses(job) == pytest.approx(losses(whole), **({"rel": 1e-2} if rounded else {"abs": 1e-5})), way
        mine, theirs = (load_file(one.output / "last" / "model.safetensors") for one in (job, whole))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # what is written is bfloat16: rounding may fall to the other side
            near = {"rtol": 2**-6, "atol": 2e-2 if rounded else 5e-4}
            assert torch.allclose(mine[name].float(), tensor.float(), **near), (way, name)
        for held, everything in zip(zip(*parts, strict=True), total, strict=True):
            assert sum(held) >= everything
            assert max(held) < 1.15 * everything / processes, "vectors are whole everywhere"


def test_a_divided_run_that_was_stopped_goes_on_bit_by_bit_and_to_1e_5_with_another_number_of_processes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(name: str, processes: int) -> Job:
        return divided(world, tmp_path / name, num_processes=processes, ema=0.9, checkpoint_seconds=0.0)

    stop_at(monkeypatch, 3, work("two", 2))
    stop_at(monkeypatch, 3, work("more", 1))
    (sealed,) = (tmp_path / "two" / "scratch").glob("step-*")
    assert sorted(path.name for path in sealed.iterdir()) == [
        "sealed.json", "state-1.safetensors", "state.json", "state.safetensors",
    ]  # fmt: skip
    shutil.copytree(tmp_path / "two", tmp_path / "fewer")
    straight, two, more, fewer = work("straight", 2), work("two", 2), work("more", 2), work("fewer", 1)
    with process_group(2, fit_all, [straight, two, more]) as ranks:
        fit_all(ranks, [straight, two, more])
    train.main(fewer)
    for name in ("best/model.safetensors", "last/model.safetensors", "metrics.jsonl", "summary.json"):
        assert (two.output / name).read_bytes() == (straight.output / name).read_bytes(), name
    assert losses(more) == pytest.approx(losses(straight), abs=1e-5)
    assert losses(fewer) == pytest.approx(losses(straight), abs=1e-5)


@pytest.mark.parametrize(("count", "size"), [(8, 2), (5, 2), (5, 4), (2, 4)])
def test_rows_are_dealt_out_as_torch_cuts_them(count: int, size: int) -> None:
    whole = torch.arange(count)
    cut = [whole[rows(count, rank, size)].tolist() for rank in range(size)]
    chunks = [chunk.tolist() for chunk in whole.chunk(size)]
    assert cut == chunks + [[]] * (size - len(chunks))


@pytest.mark.parametrize(
    ("options", "ranks", "short"),
    [
        ({}, Ranks(), True),
        ({"gradient_accumulation_steps": 2}, Ranks(), False),
        ({}, Ranks(0, 2), False),
        ({"precision": Dtype.float32}, Ranks(), False),
    ],
    ids=["one pack", "two packs", "two processes", "float32"],
)
def test_gradients_stay_in_the_format_of_their_products_where_nothing_is_added_to_them(
    tmp_path: Path, options: dict[str, Any], ranks: Ranks, short: bool
) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path))
    trained_weights(draft, Train(**{"precision": Dtype.bfloat16, **options}), ranks, torch.device("cpu"))
    kinds = {p.ndim: p.grad_dtype for p in draft.parameters()}
    assert kinds == {1: torch.float32, 2: torch.bfloat16 if short else torch.float32}
