"""Schedules by hand; Muon against singular values; the state of the optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from speculators.config.choices import Dtype, LrSchedule, Optimizer
from speculators.config.schema import Train
from speculators.drafts.layers import Linear
from speculators.ops.muon import FLOOR, _batches, orthogonalize
from speculators.ops.weights import rounded
from speculators.training.optim import Average, Optimizers, rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LrSchedule.linear, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (LrSchedule.constant, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (LrSchedule.cosine, [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        (LrSchedule.wsd, [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_falls_by_the_schedule(schedule: LrSchedule, expected: list[float]) -> None:
    assert [rate(step, 6, 1 / 3, schedule, 1 / 3) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_without_a_warm_up_the_first_step_is_at_full_rate() -> None:
    assert rate(0, 100, 0.0, LrSchedule.linear) == 1.0


def with_singular_values(rows: int, columns: int, least: float) -> torch.Tensor:
    """Draw a matrix whose singular values run from one down to `least`."""
    draw = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=draw), full_matrices=False)
    return (u * torch.logspace(0, math.log10(least), min(rows, columns))) @ v


def orthogonal(*matrices: torch.Tensor, block: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """`orthogonalize` with the matrices as arguments."""
    return orthogonalize(matrices, dtype, block)


TOLERANCE = {torch.float32: 0.1, torch.bfloat16: 0.36}
"""Largest distance from one of a singular value that was above the floor."""


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (96, 96), (24, 96)])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_matrix_becomes_orthogonal_whatever_its_size_and_shape(
    shape: tuple[int, int], size: float, dtype: torch.dtype
) -> None:
    matrix = with_singular_values(*shape, least=4 * FLOOR) * size
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    updates = orthogonal(matrix, dtype=dtype)[0]
    assert torch.linalg.matrix_norm(updates.double() - u @ v, 2) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_directions_that_hardly_move_are_not_blown_up_and_none_is_not_a_number(dtype: torch.dtype) -> None:
    for matrix in (with_singular_values(32, 48, least=1e-9), torch.zeros(32, 48), torch.ones(32, 48), torch.eye(32)):
        norm = torch.linalg.matrix_norm(orthogonal(matrix, dtype=dtype)[0].float(), 2)
        assert norm <= 1.0 + TOLERANCE[dtype]
    assert torch.equal(orthogonal(torch.zeros(8, 9), dtype=dtype)[0], torch.zeros(8, 9))


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16])
def test_small_matrices_stay_numbers_in_every_format(dtype: torch.dtype, block: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-12, 1e-7, 1e6):
        update = orthogonal(size * torch.randn(32, 48, generator=draw), dtype=dtype, block=block)[0]
        assert update.isfinite().all()
        assert torch.linalg.matrix_norm(update.float(), 2) < 1.5 * max(1, block and 32 // block)


@pytest.mark.parametrize("tall", [False, True])
def test_blocks_are_orthogonalised_each_by_itself_down_to_a_last_short_one(tall: bool) -> None:
    matrix = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([orthogonal(matrix[begin : begin + 8])[0] for begin in (0, 8, 16)])
    updates = orthogonal(matrix.T, block=8)[0].T if tall else orthogonal(matrix, block=8)[0]
    torch.testing.assert_close(updates, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(orthogonal(matrix, block=64), orthogonal(matrix))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", [0, 4])
def test_matrices_of_a_shape_and_its_transpose_are_orthogonalised_as_one_batch(dtype: torch.dtype, block: int) -> None:
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=draw) for shape in ((8, 16), (16, 8), (16, 8), (8, 16))]
    one_by_one = [orthogonal(matrix, block=block, dtype=dtype)[0] for matrix in matrices]
    updates = orthogonal(*matrices, block=block, dtype=dtype)
    torch.testing.assert_close(updates, one_by_one, atol=0.2, rtol=0)  # another order of rounding


@pytest.mark.parametrize("columns", [8, 12, 16, 22, 23])
def test_a_single_wide_matrix_is_multiplied_in_parts_of_whatever_width(columns: int) -> None:
    matrix = with_singular_values(8, columns, least=0.1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.linalg.matrix_norm(orthogonal(matrix, dtype=torch.bfloat16)[0].float() - u @ v, 2) < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_size_of_a_matrix_does_not_matter_in_any_format(dtype: torch.dtype, size: float) -> None:
    matrix = with_singular_values(8, 24, least=0.1)
    values = torch.linalg.svdvals(orthogonal(matrix / matrix.norm() * size, dtype=dtype)[0].float())
    assert values.min() > 0.6
    assert values.max() < 1.4


def test_a_batch_of_matrices_fits_in_a_cache() -> None:
    large = (2048, 1536)
    assert _batches([(8, 16), large, (16, 8), large, (4, 4)]) == [[0, 2], [1], [3], [4]]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def train_a_little(net: nn.Sequential, optimizers: Optimizers, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        net(torch.randn(5, 6, generator=draw)).square().mean().backward()
        optimizers.step(0.7)


@pytest.mark.parametrize("name", list(Optimizer))
def test_optimizers_resume_from_their_state_bit_by_bit(name: Optimizer) -> None:
    options = Train(optimizer=name)
    net = model()
    straight = Optimizers(net, options)
    train_a_little(net, straight, 3, seed=1)
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = Optimizers(other, options)
    resumed.load({key: value.clone() for key, value in straight.state().items()})
    train_a_little(net, straight, 3, seed=2)
    train_a_little(other, resumed, 3, seed=2)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    optimizers = Optimizers(model(), Train(optimizer=Optimizer.muon))
    assert sorted(optimizers.matrices) == ["0.weight", "2.weight"]
    assert sorted(optimizers.others) == ["0.bias", "1.bias", "1.weight"]
    assert not Optimizers(model(), Train(optimizer=Optimizer.adamw)).matrices


def test_an_average_follows_the_weights_and_is_applied_only_inside_its_context() -> None:
    p = nn.Parameter(torch.tensor([0.0]))
    average = Average({"p": p}, 0.5)
    for step, value in ((1, 11.0), (2, 8.0), (30, 3.0)):
        p.data.fill_(value)
        average.update(step)
    # decays 2/11, 3/12, 0.5: 0 -> 9 -> 0.25 * 9 + 0.75 * 8 = 8.25 -> 0.5 * 8.25 + 0.5 * 3 = 5.625
    with average.applied():
        assert p.item() == pytest.approx(5.625)
    assert p.item() == 3.0
    other = Average({"p": nn.Parameter(torch.tensor([7.0]))}, 0.5)
    other.load({"p": average.averages["p"].clone()})
    assert torch.equal(other.averages["p"], average.averages["p"])


@pytest.mark.parametrize("optimizer", Optimizer)
def test_whoever_keeps_a_rounded_weight_sees_that_it_has_moved(optimizer: Optimizer) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Linear(6, 8), nn.LayerNorm(8), Linear(8, 3))
    optimizers = Optimizers(net, Train(optimizer=optimizer, lr=0.1, precision=Dtype.bfloat16))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            net(torch.randn(5, 6)).square().mean().backward()
        parts = [part for part in net if isinstance(part, Linear)]
        before = [rounded(part.weight, torch.bfloat16).clone() for part in parts]
        optimizers.step(1.0)
        for part, old in zip(parts, before, strict=True):
            assert torch.equal(rounded(part.weight, torch.bfloat16), part.weight.to(torch.bfloat16))
            assert not torch.equal(rounded(part.weight, torch.bfloat16), old)
