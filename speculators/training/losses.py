"""What training adds to the loss of `ops.distillation`: weights of steps and positions, and metrics.

A batch's loss is a sum over predictions, weighted by shares of what is supervised. Where several packed batches make
one optimizer step (gradient accumulation, several ranks), `Draft.supervision` of all of them gives the counts that the
shares refer to. Then their losses and gradients add up to those of one large batch, however it is cut.

Shapes: K steps; R rows, that is, positions that propose; T tokens; H hidden size; V draft vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.config.algorithms import Loss
from speculators.drafts.base import Predictions, Vocabulary
from speculators.features.batch import PackedBatch
from speculators.ops.distillation import TargetHead, distillation_loss, hidden_state_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Loss of a packed batch. Except for `loss`, tensors are [K, R] and undefined where the prediction is not valid."""

    loss: Tensor
    """Weighted sum, a scalar that carries the gradient; adds up over the batches of a step that share counts."""
    divergence: Tensor
    """float32: loss of each prediction, without its weight; 0 where not valid."""
    correct: Tensor
    """bool: the draft's argmax is the target's."""


def distill(
    predictions: Predictions, target_hidden_states: Tensor, head: Tensor, target_head: TargetHead,
    loss: Loss | Mapping[Loss, float] = Loss.kl, chunk_elements: int | None = None, counts: Tensor | None = None,
    hidden_loss_weight: float = 0.0,
) -> Outcome:  # fmt: skip
    """Compute the weighted loss of a packed batch's predictions over the draft's vocabulary.

    Args:
        predictions: of one packed batch; their `target_index` indexes `target_hidden_states`.
        target_hidden_states: the target's, before its final norm [T, H].
        head: the draft's head [V, H]: float32 if it is trained, else of any format.
        target_head: the target's final norm and head.
        loss: the loss, or several with their weights.
        chunk_elements: logits that may exist at a time; by default `ops.distillation.CHUNK_ELEMENTS`.
        counts: supervised predictions of each step in the optimizer step, float32 [K]; by default in this batch.
        hidden_loss_weight: weight of `ops.distillation.hidden_state_loss` in the loss.
    """
    valid, weight, reweight = predictions.valid, predictions.weight, predictions.reweight
    share = None
    if counts is not None:
        assert predictions.count is not None
        share = (predictions.count / counts)[:, None]
        weight = weight * share

    def weight_from_losses(losses: Tensor) -> Tensor:
        """Weights of the valid predictions [N] from their losses [N]."""
        assert reweight is not None
        divergence = torch.zeros_like(weight)
        divergence[valid] = losses
        return (reweight(divergence) * (1.0 if share is None else share))[valid]

    hidden_states, target_index = predictions.hidden_states[valid], predictions.target_index[valid]
    losses = {loss.value: 1.0} if isinstance(loss, Loss) else {each.value: factor for each, factor in loss.items()}
    total, valid_divergence, valid_correct = distillation_loss(
        hidden_states, target_index, weight[valid] if reweight is None else weight_from_losses, target_hidden_states,
        head, target_head, losses, chunk_elements,
    )  # fmt: skip
    if hidden_loss_weight:
        error = hidden_state_loss(hidden_states, target_head.norm(target_hidden_states[target_index]))
        total = total + hidden_loss_weight * (weight[valid] * error).sum()
    divergence, correct = torch.zeros_like(weight), torch.zeros_like(valid)
    divergence[valid], correct[valid] = valid_divergence, valid_correct
    return Outcome(loss=total, divergence=divergence, correct=correct)


def next_token_in_vocabulary(pack: PackedBatch, vocabulary: Vocabulary) -> Tensor:
    """Return for each position whether the next token is in the draft's vocabulary, bool [T]; true at document ends."""
    contained = vocabulary.t2d.to(pack.token_ids.device)[pack.token_ids].roll(-1)
    contained[[start + length - 1 for start, length in pack.documents()]] = True
    return contained


def correct_so_far(correct: Tensor) -> Tensor:
    """Return for each prediction whether it and all earlier steps from its position are correct, bool [K, R]."""
    return torch.cumprod(correct.int(), dim=0).bool()


@dataclass(slots=True)
class MetricSums:
    """Sums over predictions, from which losses and accuracies are computed; sums of several batches add up."""

    loss: list[float]
    """Per step, over supervised predictions."""
    count: list[float]
    """Supervised predictions of each step."""
    right: list[float]
    """Of those, the ones that are correct like all earlier steps from the same position."""
    reached: list[float]
    """Of those, the ones whose earlier steps are all correct."""

    @classmethod
    def empty(cls, steps: int) -> MetricSums:
        """Create sums of zeros."""
        return cls(*([0.0] * steps for _ in cls.__slots__))

    @classmethod
    def of(cls, valid: Tensor, outcome: Outcome) -> MetricSums:
        """Sum over one packed batch; `valid` [K, R]."""
        right = correct_so_far(valid & outcome.correct)
        reached = torch.cat([valid[:1], valid[1:] & right[:-1]])
        terms = (outcome.divergence.double() * valid, valid, right, reached)
        return cls(*(term.sum(1, dtype=torch.float64).tolist() for term in terms))

    def add(self, other: MetricSums) -> None:
        """Add other sums, which may have more steps or fewer."""
        for name in self.__slots__:
            values = getattr(self, name)
            values[:] = [a + b for a, b in itertools.zip_longest(values, getattr(other, name), fillvalue=0.0)]

    def metrics(self, step_decay: float = 1.0) -> dict[str, float]:
        """Compute means by name: `loss` over all steps, weighted by step_decay^k, and for each step k from 0

        - `loss_k`: loss of a prediction,
        - `full_acc_k`: share of predictions that are correct up to k,
        - `cond_acc_k`: share that is correct at k, of those correct before k.

        Correct means equal to the target's argmax over the draft's vocabulary.
        """
        means: dict[str, float] = {}
        for k, count in enumerate(self.count):
            means[f"loss_{k}"] = self.loss[k] / max(count, 1.0)
            means[f"full_acc_{k}"] = self.right[k] / max(count, 1.0)
            means[f"cond_acc_{k}"] = self.right[k] / max(self.reached[k], 1.0)
        means["loss"] = sum(step_decay**k * means[f"loss_{k}"] for k in range(len(self.count)))
        return means
