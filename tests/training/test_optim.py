"""Schedules by hand; Muon against the textbook iteration; the state of the optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from speculators.config import Optimizer, Schedule, Train
from speculators.training.optim import POLYNOMIAL, Average, Optimizers, orthogonalise, rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.linear, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (Schedule.constant, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.cosine, [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        (Schedule.wsd, [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]),
    ],
)
def test_the_rate_rises_over_the_warm_up_and_falls_as_asked(schedule: Schedule, expected: list[float]) -> None:
    assert [rate(step, 6, 1 / 3, schedule, 1 / 3) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_without_a_warm_up_the_first_step_is_at_full_rate() -> None:
    assert rate(0, 100, 0.0, Schedule.linear) == 1.0


def iterated(matrix: torch.Tensor) -> torch.Tensor:
    """Newton and Schulz as they are written in the paper, for a wide matrix."""
    a, b, c = POLYNOMIAL
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_orthogonalising_on_the_gram_matrix_equals_iterating_on_the_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = iterated(matrix) if shape[0] <= shape[1] else iterated(matrix.T).T
    torch.testing.assert_close(orthogonalise(matrix), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tall", [False, True])
def test_blocks_are_orthogonalised_each_by_itself_down_to_a_last_short_one(tall: bool) -> None:
    matrix = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([iterated(matrix[:8]), iterated(matrix[8:16]), iterated(matrix[16:])])
    found = orthogonalise(matrix.T, 8).T if tall else orthogonalise(matrix, 8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(orthogonalise(matrix, 64), orthogonalise(matrix))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def train_a_little(net: nn.Sequential, optimizers: Optimizers, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        net(torch.randn(5, 6, generator=draw)).square().mean().backward()
        optimizers.step(0.7)


@pytest.mark.parametrize("name", list(Optimizer))
def test_optimisers_go_on_from_their_state_bit_by_bit(name: Optimizer) -> None:
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


def test_an_average_follows_the_weights_and_is_there_only_while_it_is_asked_for() -> None:
    p = nn.Parameter(torch.tensor([0.0]))
    average = Average({"p": p}, 0.5)
    for step, value in ((1, 11.0), (2, 8.0), (30, 3.0)):
        p.data.fill_(value)
        average.update(step)
    # decays 2/11, 3/12, 0.5: 0 -> 9 -> 0.25 * 9 + 0.75 * 8 = 8.25 -> 0.5 * 8.25 + 0.5 * 3 = 5.625
    with average.in_place():
        assert p.item() == pytest.approx(5.625)
    assert p.item() == 3.0
    other = Average({"p": nn.Parameter(torch.tensor([7.0]))}, 0.5)
    other.load({"p": average.averages["p"].clone()})
    assert torch.equal(other.averages["p"], average.averages["p"])
