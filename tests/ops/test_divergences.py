"""Losses by hand, where distributions hardly overlap, and at ties; `test_ops` holds them against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speculators.config.algorithms import Loss, loss_weights
from speculators.errors import RecipeError
from speculators.ops import cpu
from speculators.ops.divergences import TERMS, loss_and_grad


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the C++ kernels, where there are any, and without."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "kernels", lambda *_: None)
    return str(request.param)


def compute(logits: Tensor, target_logits: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, correctness and gradient of each row of logits against the same row of the target's."""
    grad = logits.clone()
    loss, correct = loss_and_grad(grad, target_logits, torch.arange(len(logits)), {name: 1.0})
    return loss, correct, grad


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
    value, _, grad = compute(torch.zeros(1, 2), torch.tensor([[0.0, ln(3)]]), loss.value)
    assert value.item() == pytest.approx(expected[loss], abs=1e-6)
    assert grad.sum().item() == pytest.approx(0.0, abs=1e-7)  # a softmax does not see what all logits have in common


def test_the_likelihood_of_acceptance_keeps_its_gradient_where_nothing_is_accepted() -> None:
    # The draft is sure of token 0, the target of token 1: both terms of the overlap underflow in float32.
    logits, target_logits = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[0.0, 200.0, 0.0]])
    for name in TERMS:
        loss, _, grad = compute(logits, target_logits, name)
        assert torch.cat([loss, grad[0]]).isfinite().all(), name
    loss, _, grad = compute(logits, target_logits, "nla")
    assert loss.item() == pytest.approx(200 - math.log(3))
    assert grad[0].tolist() == pytest.approx([1 / 3, -1 / 3, 0.0], abs=1e-3)


def test_the_losses_of_equal_distributions_are_zero() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    for name in TERMS.keys() - {"ce"}:
        loss, correct, grad = compute(logits, logits, name)
        assert loss.abs().max() < 1e-5, name
        if name not in ("tv", "nla", "lk_hybrid"):  # which have a corner there
            assert grad.abs().max() < 1e-5, name
        assert correct.all()


def test_a_recipes_losses_are_names_with_weights() -> None:
    assert loss_weights("kl") == loss_weights(Loss.kl) == {Loss.kl: 1.0}
    assert loss_weights({"kl": 0.7, "tv": 0.3}) == {Loss.kl: 0.7, Loss.tv: 0.3}


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [("kk", "there is no loss `kk`"), ({"tv": 0}, "the weight of tv is 0"), ({}, "names no loss")],
)
def test_a_loss_that_cannot_be_is_refused(loss_fn: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loss_weights(loss_fn)


def test_of_rounded_logits_that_tie_the_first_one_counts() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    target_logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    assert compute(logits.bfloat16(), target_logits, "kl")[1].tolist() == [True, False, True]
