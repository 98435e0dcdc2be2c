"""Losses between a draft's logits and the target's, over the draft's vocabulary, with their gradients.

With p the target's distribution, q = softmax(z) the draft's, and h = q * dL/dq, every loss here has the gradient
dL/dz = h - q * sum(h). A mixture adds up the h of its terms and converts the sum to a gradient once. The
Kullback-Leibler divergence and the cross-entropy have a shorter way to the same numbers when they are alone, and C++
kernels on a CPU. `reference` has the formulas.

Shapes: n predictions; u rows of target logits, u <= n; V draft vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.ops import cpu

ETA = 3.0
"""Decay rate of the Kullback-Leibler term of `lk_hybrid` (arXiv:2602.23881): its weight is exp(-ETA * acceptance)."""
CACHED_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Logits that torch's operations process at a time; on a CPU a few copies of them fit in the cache."""

LossAndGrad = tuple[Tensor, Tensor, Tensor]
"""Loss [n], whether the draft's argmax is the target's, bool [n], and gradient of the logits [n, V]."""


def loss_and_grad(
    logits: Tensor, target_logits: Tensor, target_rows: Tensor, losses: Mapping[str, float],
    weight: Tensor | None = None, with_grad: bool = True, postprocess: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the loss of each prediction, and overwrite the logits with the gradient of the weighted losses.

    Args:
        logits: the draft's, float32 or shorter [n, V]; hold weight * d loss / d logits afterwards if `with_grad`,
            else nothing of use.
        target_logits: the target's, of any format [u, V].
        target_rows: row of `target_logits` for each prediction, ascending, int64 [n].
        losses: at least one of `TERMS`, with the weight of each in the sum.
        weight: of each prediction, float32 [n]; 1 if None.
        with_grad: whether to compute gradients.
        postprocess: maps rows of `target_logits` to float32 logits before they are used.

    Returns: float32 loss of each prediction, without its weight [n]; whether the draft's argmax is the target's, bool
        [n]. Of equal logits the first counts; float32 logits, which hardly ever tie, may count any of them.
    """
    if losses in cpu.LOSSES and (kernels := cpu.kernels(logits)):
        (name,) = losses
        target_logits = target_logits if postprocess is None else postprocess(target_logits)
        return kernels.losses(name, logits, target_logits, target_rows, weight, with_grad)
    exact = logits.dtype is torch.float32
    loss, correct = logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(target_rows, dtype=torch.bool)
    for rows, targets in _row_slices(target_rows, len(target_logits), logits.shape[1]):
        part = target_logits[targets]
        part = part.float() if postprocess is None else postprocess(part)
        local = target_rows[rows] - targets.start
        loss[rows], correct[rows], grad = _by_torch(logits[rows].float(), part, local, losses, exact)
        if with_grad:
            logits[rows] = grad if weight is None else grad.mul_(weight[rows, None])
    return loss, correct


def _row_slices(target_rows: Tensor, targets: int, vocab: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of at most `CACHED_ELEMENTS` logits, with the slice of target rows that they refer to."""
    count, rows = len(target_rows), max(1, CACHED_ELEMENTS[target_rows.device.type] // vocab)
    if count <= rows:
        yield slice(0, count), slice(0, targets)
        return
    indices = target_rows.tolist()
    for begin, end in itertools.pairwise([*range(0, count, rows), count]):
        yield slice(begin, end), slice(indices[begin], indices[end - 1] + 1)


def _by_torch(
    z: Tensor, target_logits: Tensor, target_rows: Tensor, losses: Mapping[str, float], exact: bool
) -> LossAndGrad:
    """Compute loss and gradient with torch's operations; overwrites `z`. `exact`: the logits have not been rounded."""
    if losses == {"kl": 1.0}:
        return _kl(z, target_logits, target_rows, exact)
    if losses == {"ce": 1.0}:
        return _ce(z, target_logits, target_rows, exact)
    return _mixture(z, target_logits, target_rows, losses, exact)


def _kl(z: Tensor, target_logits: Tensor, target_rows: Tensor, exact: bool) -> LossAndGrad:
    log_p = target_logits.log_softmax(-1)
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(p, log_p)
    correct, largest = _matches(z, target_logits.max(-1).indices[target_rows], exact)
    p_rows = p.index_select(0, target_rows)
    q, log_normalizer = _softmax(z, largest)
    divergence = negative_entropy[target_rows] - torch.linalg.vecdot(p_rows, z) + log_normalizer
    return divergence, correct, q.sub_(p_rows)


def _ce(z: Tensor, target_logits: Tensor, target_rows: Tensor, exact: bool) -> LossAndGrad:
    label = target_logits.max(-1).indices[target_rows]
    correct, largest = _matches(z, label, exact)
    q, log_normalizer = _softmax(z, largest)
    label_logit = z.gather(1, label[:, None])[:, 0]
    return log_normalizer - label_logit, correct, q.scatter_add_(1, label[:, None], torch.full_like(z[:, :1], -1.0))


@dataclass(frozen=True, slots=True)
class _Distributions:
    """Both distributions for each prediction [n, V], and the target's argmax [n, 1]."""

    log_p: Tensor
    log_q: Tensor
    q: Tensor
    label: Tensor

    def log_overlap(self) -> Tensor:
        """Compute log(sum(min(p, q))) [n], the logarithm of the probability that a sample of q is accepted."""
        return torch.minimum(self.log_p, self.log_q).logsumexp(-1)

    def undershooting_q(self) -> Tensor:
        """Return q where it is below p, else 0 [n, V]."""
        return self.q * (self.log_q < self.log_p)


def _mixture(
    z: Tensor, target_logits: Tensor, target_rows: Tensor, losses: Mapping[str, float], exact: bool
) -> LossAndGrad:
    log_p = target_logits.log_softmax(-1)
    label = target_logits.max(-1).indices[target_rows][:, None]
    correct, _ = _matches(z, label[:, 0], exact)
    z.sub_(z.logsumexp(-1, keepdim=True))
    both = _Distributions(log_p.index_select(0, target_rows), z, z.exp(), label)
    h, loss = torch.zeros_like(z), torch.zeros_like(z[:, 0])
    for name, weight in losses.items():
        loss += weight * TERMS[name](both, h, weight)
    return loss, correct, torch.addcmul(h, both.q, h.sum(-1, keepdim=True), value=-1.0, out=z)


def _add_kl(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    p = both.log_p.exp()
    h.sub_(p, alpha=weight)
    return (p * (both.log_p - both.log_q)).sum(-1)


def _add_ce(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    h.scatter_add_(1, both.label, torch.full_like(h[:, :1], -weight))
    return -both.log_q.gather(1, both.label)[:, 0]


def _add_rkl(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    terms = (both.log_q - both.log_p).mul_(both.q)
    h.add_(terms, alpha=weight)
    return terms.sum(-1)


def _add_js(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    log_m = torch.logaddexp(both.log_p, both.log_q).sub_(math.log(2.0))
    q_terms = (both.log_q - log_m).mul_(both.q)
    h.add_(q_terms, alpha=0.5 * weight)
    p_terms = torch.sub(both.log_p, log_m, out=log_m).mul_(both.log_p.exp())
    return 0.5 * (p_terms.sum(-1) + q_terms.sum(-1))


def _add_tv(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    h.sub_(both.undershooting_q(), alpha=weight)
    return -torch.expm1(both.log_overlap())


def _add_nla(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    log_overlap = both.log_overlap()
    # As a difference of logarithms: where p and q hardly overlap, q and the overlap may both underflow.
    share = (both.log_q - log_overlap[:, None]).clamp_(max=0.0).exp_().mul_(both.log_q < both.log_p)
    h.sub_(share, alpha=weight)
    return -log_overlap


def _add_lk_hybrid(both: _Distributions, h: Tensor, weight: float) -> Tensor:
    log_overlap = both.log_overlap()
    kl_weight = torch.exp(-ETA * log_overlap.exp())[:, None]
    p = both.log_p.exp()
    h.addcmul_(p, kl_weight, value=-weight).addcmul_(both.undershooting_q(), 1.0 - kl_weight, value=-weight)
    kl = p.mul_(both.log_p - both.log_q).sum(-1)
    return kl_weight[:, 0] * kl - (1.0 - kl_weight[:, 0]) * torch.expm1(log_overlap)


TERMS: dict[str, Callable[[_Distributions, Tensor, float], Tensor]] = {
    "kl": _add_kl,
    "ce": _add_ce,
    "rkl": _add_rkl,
    "js": _add_js,
    "tv": _add_tv,
    "nla": _add_nla,
    "lk_hybrid": _add_lk_hybrid,
}
"""Losses by name: adds weight * h to its second argument, and returns each prediction's loss without weight [n]."""


def _matches(z: Tensor, label: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Return whether each row's largest logit is its label's, bool [n], and that largest logit [n].

    Rounded logits tie, and then the first counts, as in a server. Exact logits hardly ever do, and the largest value
    is found several times faster than its index.
    """
    if exact:
        largest = z.amax(-1)
        return z.gather(1, label[:, None])[:, 0] == largest, largest
    largest, index = z.max(-1)
    return index == label, largest


def _softmax(z: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [n, V] and logsumexp [n]; `largest` is each row's largest logit.

    The largest probability is exp(largest - logsumexp), which gives the logsumexp without another pass over z.
    """
    q = z.softmax(-1)
    return q, largest - q.amax(-1).log()
