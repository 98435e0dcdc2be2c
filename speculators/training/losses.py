"""The loss between a draft's predictions and the target's own distributions, fused with the head.

The gradient of the loss with respect to what enters the head, and to the head where that is trained, is computed along
with the loss: logits live for one chunk of places and are gone before the next one. Nothing of the size
[tokens, vocabulary] exists. The target's distribution at a place is computed once and used by every step that
predicts it; at places that nobody predicts, it is not computed.

A loss is a sum of weighted predictions, and the weights are shares of what is supervised. Where one step of the
optimiser is made of several packs, on one device after the other or on several, `Draft.supervision` of all of them
together gives the counts to take the shares of: then the packs' losses, and their gradients, add up to those of one
large pack, however it is cut.

Shapes: N predictions; U places that they predict; K steps; H width; V draft vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from speculators.config.algorithms import Loss
from speculators.drafts.base import Predictions, Vocabulary
from speculators.features.batch import PackedBatch
from speculators.ops.distillation import CHUNK_ELEMENTS, Teacher, _Distill, _How, distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a pack gave. All [K, R], undefined where not valid, but for the loss."""

    loss: Tensor
    """Scalar; carries the gradient. Those of the packs of one optimiser step add up where they have the same counts."""
    divergence: Tensor
    """float32: loss of each prediction, not weighted; 0 where not valid."""
    correct: Tensor
    """bool: the draft's most likely token is the target's."""


def distill(
    predictions: Predictions, last: Tensor, head: Tensor, teacher: Teacher,
    loss: Loss | Mapping[Loss, float] = Loss.kl, chunk_elements: int | None = None, counts: Tensor | None = None,
    regression: float = 0.0,
) -> Outcome:  # fmt: skip
    """The loss of every prediction over the draft's vocabulary, weighted and summed.

    Args:
        predictions: of one pack; their `target` says which of `last`.
        last: the target's states before the final norm [U, H].
        head: the draft's head [V, H]: float32 if it wants a gradient, else in the format of products or any other.
        teacher: gives the distributions to match.
        loss: what is asked of a prediction; several with their weights.
        chunk_elements: logits that may exist at one time.
        counts: supervised predictions of each step, over everything that one step of the optimiser is made of, which
            the weights become shares of, float32 [K]; those of this pack alone if None.
        regression: weight, in the loss alone, of how far what enters the draft's head is from what enters the target's
            (EAGLE, Li et al. 2024, arXiv:2401.15077).
    """
    valid, weight, reweigh = predictions.valid, predictions.weight, predictions.reweigh
    if counts is not None:
        assert predictions.count is not None
        share = (predictions.count / counts)[:, None]
        weight, reweigh = weight * share, None if reweigh is None else partial(_times, reweigh, share)
    rows = predictions.hidden[valid]
    divergence, correct = torch.zeros_like(weight), torch.zeros_like(valid)
    limit = chunk_elements or CHUNK_ELEMENTS[rows.device.type]
    dtype = torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else torch.float32
    losses = {loss: 1.0} if isinstance(loss, Loss) else loss
    how = _How(teacher, losses, limit, dtype, None if reweigh is None else partial(_reweigh, reweigh, valid))
    total, row_divergence, row_correct = _Distill.apply(rows, predictions.target[valid], weight[valid], last, head, how)
    if regression:
        total = (
            total + regression * (weight[valid] * distance(rows, teacher.normed(last[predictions.target[valid]]))).sum()
        )
    divergence[valid], correct[valid] = row_divergence, row_correct
    return Outcome(loss=total, divergence=divergence, correct=correct)


def _times(reweigh: Callable[[Tensor], Tensor], share: Tensor, divergence: Tensor) -> Tensor:
    return reweigh(divergence) * share


def _reweigh(reweigh: Callable[[Tensor], Tensor], valid: Tensor, divergence_N: Tensor) -> Tensor:
    """The weights of the valid predictions [N], from their losses."""
    divergence = torch.zeros(valid.shape, dtype=divergence_N.dtype, device=valid.device)
    divergence[valid] = divergence_N
    return reweigh(divergence)[valid]


def sayable_next(pack: PackedBatch, vocabulary: Vocabulary) -> Tensor:
    """bool [T]: the token after each place is in the draft's vocabulary; true where the document ends."""
    inside = vocabulary.t2d.to(pack.token_ids.device)[pack.token_ids].roll(-1)
    inside[[start + length - 1 for start, length in pack.documents()]] = True
    return inside


def run(correct: Tensor) -> Tensor:
    """bool [K, R]: correct at this step and at all before it."""
    return torch.cumprod(correct.int(), dim=0).bool()


@dataclass(slots=True)
class Tally:
    """Sums over predictions, from which losses and accuracies are made. Adding tallies adds what they counted."""

    loss: list[float]
    """Per step, summed over supervised predictions."""
    count: list[float]
    """Supervised predictions of each step."""
    right: list[float]
    """Of those, the ones that are right and all earlier steps from the same place too."""
    reached: list[float]
    """Of those, the ones whose earlier steps are all right."""

    @classmethod
    def empty(cls, steps: int) -> Tally:
        """A tally of nothing."""
        return cls(*([0.0] * steps for _ in cls.__slots__))

    @classmethod
    def of(cls, valid: Tensor, outcome: Outcome) -> Tally:
        """Count one pack; `valid` [K, R]."""
        right = run(valid & outcome.correct)
        reached = torch.cat([valid[:1], valid[1:] & right[:-1]])
        sums = (outcome.divergence.double() * valid, valid, right, reached)
        return cls(*(s.sum(1, dtype=torch.float64).tolist() for s in sums))

    def add(self, other: Tally) -> None:
        """Count `other` too, which may have counted more steps or fewer."""
        for name in self.__slots__:
            mine = getattr(self, name)
            mine[:] = [a + b for a, b in itertools.zip_longest(mine, getattr(other, name), fillvalue=0.0)]

    def metrics(self, step_decay: float = 1.0) -> dict[str, float]:
        """Means, by name.

        `loss`: steps weighted and summed. For step k, `loss_k`; `full_k`: right up to k, of all; `cond_k`: right at
        k, of those right before: both by the target's distribution over the draft's vocabulary.
        """
        found: dict[str, float] = {}
        for k, n in enumerate(self.count):
            found[f"loss_{k}"] = self.loss[k] / max(n, 1.0)
            found[f"full_{k}"] = self.right[k] / max(n, 1.0)
            found[f"cond_{k}"] = self.right[k] / max(self.reached[k], 1.0)
        steps = range(len(self.count))
        found["loss"] = sum(step_decay**k * found[f"loss_{k}"] for k in steps)
        return found
