"""The loss between a draft's predictions and the target's own distributions, fused with the head.

The head of the draft is frozen, so the gradient of the loss with respect to what enters the head can be computed
along with the loss: logits live for one chunk of places and are gone before the next one. Nothing of the size
[tokens, vocabulary] exists. The target's distribution at a place is computed once and used by every step that
predicts it.

Shapes: N predictions; U places that they predict; H width; V draft vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speculators.config import Loss
from speculators.drafts.base import Pack, Predictions, Vocabulary

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist at one time. On a CPU fewer make flat products, which are slow, and more leave its cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The target from its last layer's output on: final norm, head, and what it does to logits."""

    norm_weight: Tensor
    """[H] float32: what is multiplied by, offsets included."""
    norm_eps: float
    head: Tensor
    """[V, H]: rows of the draft's vocabulary."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, last: Tensor, dtype: torch.dtype) -> Tensor:
        """States before the final norm [U, H] -> float32 logits [U, V]; the product is computed in `dtype`."""
        normed = torch.nn.functional.rms_norm(last.float(), (last.shape[-1],), self.norm_weight, self.norm_eps)
        logits = (normed.to(dtype) @ self.head.to(dtype).T).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a pack gave. All [K, R], undefined where not valid, but for the loss."""

    loss: Tensor
    """Scalar; carries the gradient."""
    divergence: Tensor
    """float32: loss of each prediction, not weighted; 0 where not valid."""
    correct: Tensor
    """bool: the draft's most likely token is the target's."""


def distill(
    predictions: Predictions, last: Tensor, head: Tensor, teacher: Teacher, loss: Loss = Loss.kl,
    chunk_elements: int | None = None,
) -> Outcome:  # fmt: skip
    """The loss of every prediction over the draft's vocabulary, weighted and summed.

    Args:
        predictions: of one pack.
        last: the target's states before the final norm, of every place in the pack [T, H].
        head: the draft's head [V, H], float32; frozen.
        teacher: gives the distributions to match.
        loss: what is asked of a prediction.
        chunk_elements: logits that may exist at one time.
    """
    valid = predictions.valid
    rows = predictions.hidden[valid]
    divergence, correct = torch.zeros_like(predictions.weight), torch.zeros_like(valid)
    limit = chunk_elements or CHUNK_ELEMENTS[rows.device.type]
    dtype = torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else torch.float32
    how = _How(teacher, loss, limit, dtype, None if predictions.reweigh is None else partial(_reweigh, predictions))
    total, row_divergence, row_correct = _Distill.apply(
        rows, predictions.target[valid], predictions.weight[valid], last, head, how
    )
    divergence[valid], correct[valid] = row_divergence, row_correct
    return Outcome(loss=total, divergence=divergence, correct=correct)


def _reweigh(predictions: Predictions, divergence_N: Tensor) -> Tensor:
    """The weights of the valid predictions [N], from their losses."""
    assert predictions.reweigh is not None
    divergence = torch.zeros_like(predictions.weight)
    divergence[predictions.valid] = divergence_N
    return predictions.reweigh(divergence)[predictions.valid]


@dataclass(frozen=True, slots=True)
class _How:
    """What `_Distill` needs beside tensors."""

    teacher: Teacher
    loss: Loss
    limit: int
    dtype: torch.dtype
    reweigh: Callable[[Tensor], Tensor] | None
    """Losses [N] -> weights [N]; the weights are given where it is None."""


class _Distill(torch.autograd.Function):
    """Loss and its gradient in one pass over chunks of places."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, target_N: Tensor, weight_N: Tensor, last: Tensor, head: Tensor, how: _How
    ) -> tuple[Tensor, Tensor, Tensor]:
        places_U, which_N = torch.unique(target_N, return_inverse=True)
        order_N = torch.argsort(which_N, stable=True)
        bounds = torch.searchsorted(which_N[order_N], torch.arange(len(places_U) + 1, device=last.device)).tolist()
        gradient = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        divergence, correct = torch.empty_like(weight_N), torch.empty_like(weight_N, dtype=torch.bool)
        head = head.to(how.dtype)
        for begin, end in _chunks(bounds, how.limit // len(head)):
            picked = order_N[bounds[begin] : bounds[end]]
            wanted = how.teacher.logits(last[places_U[begin:end]], how.dtype)
            z = (hidden_NH[picked].to(how.dtype) @ head.T).float()
            against = _divergence if how.loss is Loss.kl else _surprise
            divergence[picked], correct[picked] = against(z, wanted, which_N[picked] - begin, how.dtype)
            if gradient is not None:
                slope = z if how.reweigh else z.mul_(weight_N[picked, None])
                gradient[picked] = (slope.to(how.dtype) @ head).to(gradient.dtype)
        if how.reweigh:
            weight_N = how.reweigh(divergence)
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(weight_N[:, None]) if how.reweigh else gradient)
        ctx.mark_non_differentiable(divergence, correct)
        return (divergence * weight_N).sum(), divergence, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0], *(None,) * 5)


def _divergence(z: Tensor, wanted: Tensor, local: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """KL(target || draft) of logits z [n, V] against those of places `wanted` [u, V], row i against place local[i].

    Returns: the loss [n], and whether the most likely token is the target's [n]. The loss's slope is left in z.
    """
    log_p = wanted.log_softmax(-1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1)
    correct = _wins(z, p.argmax(-1)[local], exact=dtype is torch.float32)
    p_rows = p[local]
    divergence = negative_entropy[local] - torch.linalg.vecdot(p_rows, z) + _softmax_(z)
    z.sub_(p_rows)
    return divergence, correct


def _surprise(z: Tensor, wanted: Tensor, local: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `_divergence`, the cross-entropy against the target's most likely token."""
    label = wanted.argmax(-1)[local][:, None]
    correct = _wins(z, label[:, 0], exact=dtype is torch.float32)
    said = z.gather(1, label)[:, 0]
    surprise = _softmax_(z) - said
    z.scatter_add_(1, label, torch.full_like(z[:, :1], -1.0))
    return surprise, correct


def _wins(z: Tensor, label: Tensor, exact: bool) -> Tensor:
    """Whether each row's largest logit is its label's.

    Rounded logits tie, and then the first one counts, as in a server. Exact ones do not, and finding the largest value
    is many times faster than finding its place.
    """
    return z.gather(1, label[:, None])[:, 0] == z.amax(-1) if exact else z.argmax(-1) == label


def _softmax_(z: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns their log-normaliser [N]."""
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    z.div_(total)
    return (top + total.log()).squeeze(-1)


def _chunks(bounds: list[int], rows: int) -> list[tuple[int, int]]:
    """Cut places into ranges whose predictions and places together number at most `rows`, at least one place each."""
    ranges, begin = [], 0
    for end in range(1, len(bounds)):
        if end > begin + 1 and bounds[end] - bounds[begin] + end - begin > rows:
            ranges.append((begin, end - 1))
            begin = end - 1
    if begin < len(bounds) - 1:
        ranges.append((begin, len(bounds) - 1))
    return ranges


def sayable_next(pack: Pack, vocabulary: Vocabulary) -> Tensor:
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
