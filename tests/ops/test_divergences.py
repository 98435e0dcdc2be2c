"""Divergences: their values and slopes against autograd in float64, by hand, and where distributions hardly meet."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speculators.config.algorithms import Loss, loss_weights
from speculators.errors import RecipeError
from speculators.ops.divergences import TERMS
from speculators.ops.divergences import _by_torch as cost


def plain(loss: Loss, z: Tensor, wanted: Tensor) -> Tensor:
    """The textbook's formula, for autograd."""
    p, q = wanted.softmax(-1), z.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    if loss is Loss.kl:
        return (p * (p / q).log()).sum(-1)
    if loss is Loss.ce:
        return -z.log_softmax(-1).gather(1, wanted.argmax(-1, keepdim=True))[:, 0]
    if loss is Loss.rkl:
        return (q * (q / p).log()).sum(-1)
    if loss is Loss.js:
        m = (p + q) / 2
        return 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    if loss is Loss.tv:
        return 0.5 * (p - q).abs().sum(-1)
    if loss is Loss.nla:
        return -overlap.log()
    share = torch.exp(-3.0 * overlap.detach())
    return share * plain(Loss.kl, z, wanted) + (1.0 - share) * (1.0 - overlap)


MIXTURES: list[dict[Loss, float]] = [
    *({loss: 1.0} for loss in Loss),
    *({loss: 2.5} for loss in Loss),
    {Loss.kl: 0.7, Loss.tv: 0.3},
    {Loss.ce: 0.1, Loss.tv: 0.9},
    {loss: 0.1 * (i + 1) for i, loss in enumerate(Loss)},
]


@pytest.mark.parametrize("losses", MIXTURES, ids=lambda m: "+".join(f"{w:.1f}{loss.name}" for loss, w in m.items()))
def test_value_and_slope_equal_autograd_in_float64(losses: dict[Loss, float]) -> None:
    draw = torch.Generator().manual_seed(0)
    z = 3.0 * torch.randn(9, 50, generator=draw, dtype=torch.float64)
    wanted = 3.0 * torch.randn(4, 50, generator=draw, dtype=torch.float64)
    local = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    z[0], z[3] = wanted[0] + 0.1 * z[0], wanted[1] + 0.01 * z[3]  # some that nearly agree
    free = z.clone().requires_grad_()
    expected = sum(weight * plain(loss, free, wanted[local]) for loss, weight in losses.items())
    assert isinstance(expected, Tensor)
    expected.sum().backward()
    found, correct, slope = cost(z, wanted, local, {loss.value: w for loss, w in losses.items()}, exact=True)
    torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(slope, free.grad, atol=1e-12, rtol=1e-10)
    assert torch.equal(correct, free.argmax(-1) == wanted.argmax(-1)[local])
    assert 0 < correct.sum() < 9


@pytest.mark.parametrize("loss", list(Loss))
def test_every_loss_by_hand(loss: Loss) -> None:
    # p = 1/4, 3/4; q = 1/2, 1/2; m = 3/8, 5/8; min(p, q) sums to 3/4.
    ln = math.log
    tv, kl = 0.25, 0.25 * ln(0.5) + 0.75 * ln(1.5)
    share = math.exp(-3 * 0.75)
    js = 0.5 * (0.25 * ln(2 / 3) + 0.75 * ln(6 / 5) + 0.5 * ln(4 / 3) + 0.5 * ln(4 / 5))
    expected = {
        Loss.kl: kl,
        Loss.ce: ln(2),
        Loss.rkl: 0.5 * ln(2) + 0.5 * ln(2 / 3),
        Loss.js: js,
        Loss.tv: tv,
        Loss.nla: -ln(0.75),
        Loss.lk_hybrid: share * kl + (1 - share) * tv,
    }
    z, wanted = torch.zeros(1, 2), torch.tensor([[0.0, ln(3)]])
    found, _, slope = cost(z, wanted, torch.zeros(1, dtype=torch.int64), {loss.value: 1.0}, exact=True)
    assert found.item() == pytest.approx(expected[loss], abs=1e-6)
    assert slope.sum().item() == pytest.approx(0.0, abs=1e-7)  # a softmax does not see what all logits have in common


def test_the_likelihood_of_acceptance_keeps_its_slope_where_nothing_is_accepted() -> None:
    # The draft is sure of token 0, the target of token 1: both shares of the overlap are below what a float32 holds.
    z, wanted = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    nothing = torch.zeros(1, dtype=torch.int64)
    for loss in TERMS:
        found, _, slope = cost(z.clone(), wanted, nothing, {loss: 1.0}, exact=True)
        assert torch.cat([found, slope[0]]).isfinite().all(), loss
    found, _, slope = cost(z.clone(), wanted, nothing, {"nla": 1.0}, exact=True)
    assert found.item() == pytest.approx(200 - math.log(3))
    assert slope[0].tolist() == pytest.approx([1 / 3, -1 / 3, 0.0], abs=1e-3)


def test_the_losses_of_equal_distributions_are_zero() -> None:
    wanted = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    for loss in set(Loss) - {Loss.ce}:
        found, correct, slope = cost(wanted.clone(), wanted, torch.arange(3), {loss.value: 1.0}, exact=True)
        assert found.abs().max() < 1e-5, loss
        if loss not in (Loss.tv, Loss.nla, Loss.lk_hybrid):  # which have a corner there
            assert slope.abs().max() < 1e-5, loss
        assert correct.all()


def test_a_recipes_losses_are_names_with_weights() -> None:
    assert loss_weights("kl") == loss_weights(Loss.kl) == {Loss.kl: 1.0}
    assert loss_weights({"kl": 0.7, "tv": 0.3}) == {Loss.kl: 0.7, Loss.tv: 0.3}


@pytest.mark.parametrize(
    ("given", "said"),
    [("kk", "there is no loss `kk`"), ({"tv": 0}, "the weight of tv is 0"), ({}, "names no loss")],
)
def test_a_loss_that_cannot_be_is_refused(given: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        loss_weights(given)


def test_of_rounded_logits_that_tie_the_first_one_counts() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    wanted = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    local = torch.arange(3)
    assert cost(z.clone(), wanted, local, {"kl": 1.0}, exact=False)[1].tolist() == [True, False, True]
    assert cost(z.clone(), wanted, local, {"kl": 1.0}, exact=True)[1].tolist() == [True, True, True]
