"""The fused loss: cut in any way it is the same sum, and a head that is trained gets its gradient by chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speculators.config.algorithms import Loss, Weighting
from speculators.drafts.base import Draft, Predictions
from speculators.drafts.dflash import DFlashDraft
from speculators.features.batch import PackedBatch
from speculators.ops.distillation import TargetHead
from speculators.ops.divergences import CACHED_ELEMENTS
from speculators.training.losses import distill

LENGTHS = [20, 33, 9, 14]
STATE = tiny.state_at(3)


def gradients(
    draft: Draft, target_head: TargetHead, batches: list[PackedBatch], **how: Any
) -> tuple[float, list[torch.Tensor]]:
    """Sum the losses of packed batches, and their gradients."""
    total = 0.0
    draft.zero_grad()
    for pack in batches:
        outcome = distill(
            draft(pack, STATE), pack.last_hidden_states, draft.lm_head.weight, target_head, tiny.losses_of(draft), **how
        )
        outcome.loss.backward()
        total += outcome.loss.item()
    return total, [p.grad.clone() for p in draft.parameters() if p.grad is not None]


def documents_of(pack: PackedBatch, chosen: torch.Tensor) -> list[PackedBatch]:
    """Every document by itself."""
    return [
        replace(
            pack,
            rows=[i],
            lengths=[n],
            token_ids=pack.token_ids[begin : begin + n],
            loss_mask=pack.loss_mask[begin : begin + n],
            hidden_states=pack.hidden_states[begin : begin + n],
            last_hidden_states=pack.last_hidden_states[begin : begin + n],
            anchor_mask=chosen[begin : begin + n],
        )
        for i, (begin, n) in enumerate(pack.documents())
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda directory: tiny.make_draft(directory, ttt_step_decay=0.7, loss_fn={"kl": 0.4, "tv": 0.6}),
        lambda directory: tiny.make_dflash(directory, max_anchors=19),
        lambda directory: tiny.make_dflash(directory, max_anchors=19, loss_fn="lk_hybrid", weighting=Weighting.decay),
    ],
    ids=["eagle3, by steps", "dflash, by confidence", "dflash, fixed weights"],
)
def test_losses_of_the_documents_of_a_step_sum_to_that_of_the_full_batch(tmp_path: Path, make: Any) -> None:
    draft, target_head = make(tiny.write_target(tmp_path))
    full = tiny.make_pack(LENGTHS)
    loss, expected = gradients(draft, target_head, [full], hidden_loss_weight=0.3)
    step = draft.supervision(replace(full, hidden_states=torch.empty(len(full.token_ids), 0, 0)), STATE)
    loss_by_document, grads_by_document = gradients(
        draft, target_head, documents_of(full, step.source_mask), counts=step.counts, hidden_loss_weight=0.3
    )
    assert loss_by_document == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(grads_by_document, expected, atol=1e-6, rtol=1e-4)
    apart, _ = gradients(draft, target_head, documents_of(full, step.source_mask), hidden_loss_weight=0.3)
    assert apart != pytest.approx(loss, rel=0.1)  # shares of each part alone


def test_the_hidden_loss_is_zero_at_the_targets_normed_hidden_states(tmp_path: Path) -> None:
    draft, target_head = tiny.make_draft(tiny.write_target(tmp_path))
    pack = tiny.make_pack(LENGTHS)
    last, predictions = pack.last_hidden_states, draft(pack)
    without = distill(predictions, last, draft.lm_head.weight, target_head)
    expected = target_head.norm(last)[predictions.target_index]
    error = (predictions.hidden_states - expected).square().sum(-1) / expected.square().sum(-1)
    both = distill(predictions, last, draft.lm_head.weight, target_head, hidden_loss_weight=0.5)
    assert both.loss.item() == pytest.approx((without.loss + 0.5 * (predictions.weight * error).sum()).item(), rel=1e-5)
    assert torch.equal(both.divergence, without.divergence)
    perfect = distill(
        replace(predictions, hidden_states=expected), last, draft.lm_head.weight, target_head, hidden_loss_weight=9.0
    )
    assert perfect.loss.item() == pytest.approx(0.0, abs=1e-5)


def test_a_part_without_supervision_adds_nothing(tmp_path: Path) -> None:
    for make in (tiny.make_draft, tiny.make_dflash):
        draft, target_head = make(tiny.write_target(tmp_path))
        silent = tiny.make_pack([12])
        silent.loss_mask[:] = False
        counts = draft.supervision(tiny.make_pack([30]), STATE).counts
        loss, grads = gradients(draft, target_head, [silent], counts=counts)
        assert loss == 0.0
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("weighting", [Weighting.decay, Weighting.dpace])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_a_head_that_wants_its_gradient_gets_it(tmp_path: Path, weighting: Weighting, chunk: int) -> None:
    draft, target_head = tiny.make_dflash(tiny.write_target(tmp_path), weighting=weighting)
    assert isinstance(draft, DFlashDraft)
    pack = tiny.make_pack(LENGTHS)
    predictions = draft(pack)
    hidden = predictions.hidden_states.detach().requires_grad_()
    head = draft.lm_head.weight.clone().requires_grad_()
    outcome = distill(
        replace(predictions, hidden_states=hidden),
        pack.last_hidden_states,
        head,
        target_head,
        Loss.ce,
        chunk_elements=chunk,
    )
    (2.0 * outcome.loss).backward()

    expected_hidden, expected_head = (
        predictions.hidden_states.detach().requires_grad_(),
        draft.lm_head.weight.clone().requires_grad_(),
    )
    label = target_head.logits(pack.last_hidden_states, torch.float32).argmax(-1)[predictions.target_index]
    each = -(expected_hidden @ expected_head.T).log_softmax(-1).gather(-1, label[..., None])[..., 0]
    weight = (
        predictions.weight if predictions.reweight is None else predictions.reweight(each.detach() * predictions.valid)
    )
    (2.0 * (each * weight).sum()).backward()
    assert outcome.loss.item() == pytest.approx((each * weight).sum().item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.grad, expected_head.grad, atol=1e-5, rtol=1e-4)


def test_a_frozen_head_costs_no_gradient_and_mixed_precision_keeps_it_close(tmp_path: Path) -> None:
    draft, target_head = tiny.make_draft(tiny.write_target(tmp_path))
    pack = tiny.make_pack(LENGTHS)
    predictions = draft(pack)
    grads = []
    for mixed in (False, True):
        head = draft.lm_head.weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            distill(predictions, pack.last_hidden_states, head, target_head).loss.backward(retain_graph=True)
        assert head.grad is not None
        assert head.grad.dtype is torch.float32
        grads.append(head.grad)
    assert draft.lm_head.weight.grad is None
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


class Largest(TorchDispatchMode):
    """Sees the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for each in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return outputs


@pytest.mark.parametrize("size", [3000, 9000])
@pytest.mark.parametrize("losses", [{Loss.kl: 1.0}, {Loss.ce: 1.0}, {Loss.kl: 0.5, Loss.lk_hybrid: 0.5}])
def test_no_tensor_is_larger_than_a_chunk_whatever_the_vocabulary(size: int, losses: dict[Loss, float]) -> None:
    draw = torch.Generator().manual_seed(0)
    head, last, chunk = torch.randn(size, 4, generator=draw), torch.randn(8, 4, generator=draw), 40_000
    hidden = torch.randn(20, 8, 4, generator=draw).requires_grad_()  # more predictions of a target than a chunk has
    target = torch.arange(8).expand(20, 8)
    predictions = Predictions(hidden_states=hidden, target_index=target, valid=target >= 0, weight=torch.ones(20, 8))
    target_head = TargetHead(norm_weight=torch.ones(4), norm_eps=1e-6, head=head)
    with Largest() as seen:
        distill(predictions, last, head, target_head, losses, chunk_elements=chunk).loss.backward()
    assert size <= seen.elements <= chunk


@pytest.mark.parametrize("loss", [Loss.kl, Loss.ce, Loss.js])
def test_how_many_logits_a_cache_holds_changes_no_loss_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, loss: Loss
) -> None:
    draw = torch.Generator().manual_seed(2)
    head, last = torch.randn(50, 6, generator=draw), torch.randn(30, 6, generator=draw)
    hidden, target = torch.randn(3, 40, 6, generator=draw), torch.randint(0, 30, (3, 40), generator=draw)
    target_head = TargetHead(norm_weight=torch.ones(6), norm_eps=1e-6, head=head)
    results = []
    for few in (CACHED_ELEMENTS["cpu"], 7 * len(head), 1):
        monkeypatch.setitem(CACHED_ELEMENTS, "cpu", few)
        x, trained_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        every = torch.ones(3, 40, dtype=torch.bool)
        predictions = Predictions(
            hidden_states=x, target_index=target, valid=every, weight=torch.rand(3, 40, generator=draw.manual_seed(3))
        )
        outcome = distill(predictions, last, trained_head, target_head, loss)
        outcome.loss.backward()
        results.append([outcome.loss.detach(), outcome.divergence, outcome.correct, x.grad, trained_head.grad])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
