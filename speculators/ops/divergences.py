"""What a prediction costs: divergences between the target's distribution p and the draft's q, with their slopes.

One chunk of logits at a time, over the draft's vocabulary, in the precision of the logits, so that a loss needs a
handful of chunks, however many predictions there are.

Every loss L here has a slope of one form: with the pull h = q * dL/dq, dL/dz = h - q * sum(h). So a mixture adds up the
pulls of its parts and is turned into a slope once. The Kullback-Leibler divergence and the cross-entropy, which most
drafts are trained by, have shorter ways to the same numbers when they are alone.

Shapes: n predictions; u places that they predict, u <= n; V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.config.algorithms import Loss

ETA = 3.0
"""Of `lk_hybrid`: how fast the total variation takes over as the distributions come to overlap; the paper's value."""


Cost = tuple[Tensor, Tensor, Tensor]


def cost(z: Tensor, wanted: Tensor, local: Tensor, losses: Mapping[Loss, float], exact: bool) -> Cost:
    """The weighted losses of some predictions.

    Args:
        z: the draft's logits [n, V], which are gone then.
        wanted: the target's logits [u, V].
        local: which of the target's rows each prediction is against, int64 [n].
        losses: at least one, with weights.
        exact: the logits have not been rounded to a shorter format.

    Returns: the loss of each prediction [n]; whether the draft's most likely token is the target's, bool [n]; and the
        slope of each prediction's loss [n, V].
    """
    if losses == {Loss.kl: 1.0}:
        return _kl(z, wanted, local, exact)
    if losses == {Loss.ce: 1.0}:
        return _ce(z, wanted, local, exact)
    return _mixture(z, wanted, local, losses, exact)


def _kl(z: Tensor, wanted: Tensor, local: Tensor, exact: bool) -> Cost:
    log_p = wanted.log_softmax(-1)
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(p, log_p)
    correct, top = _wins(z, wanted.max(-1).indices[local], exact)
    p_rows = p.index_select(0, local)
    q, normaliser = _softmax(z, top)
    divergence = negative_entropy[local] - torch.linalg.vecdot(p_rows, z) + normaliser
    return divergence, correct, q.sub_(p_rows)


def _ce(z: Tensor, wanted: Tensor, local: Tensor, exact: bool) -> Cost:
    label = wanted.max(-1).indices[local]
    correct, top = _wins(z, label, exact)
    q, normaliser = _softmax(z, top)
    said = z.gather(1, label[:, None])[:, 0]
    return normaliser - said, correct, q.scatter_add_(1, label[:, None], torch.full_like(z[:, :1], -1.0))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Both distributions of some predictions, [n, V] each, and the target's most likely tokens [n, 1]."""

    log_p: Tensor
    log_q: Tensor
    q: Tensor
    label: Tensor

    def overlap(self) -> Tensor:
        """log(sum(min(p, q))): the logarithm of the share of samples of the draft that the target accepts [n]."""
        return torch.minimum(self.log_p, self.log_q).logsumexp(-1)

    def lacking(self) -> Tensor:
        """q where the draft gives a token less than the target does, else 0 [n, V]."""
        return self.q * (self.log_q < self.log_p)


def _mixture(z: Tensor, wanted: Tensor, local: Tensor, losses: Mapping[Loss, float], exact: bool) -> Cost:
    log_p = wanted.log_softmax(-1)
    label = wanted.max(-1).indices[local][:, None]
    correct, _ = _wins(z, label[:, 0], exact)
    z.sub_(z.logsumexp(-1, keepdim=True))
    rows = _Rows(log_p.index_select(0, local), z, z.exp(), label)
    pull, total = torch.zeros_like(z), torch.zeros_like(z[:, 0])
    for loss, weight in losses.items():
        total += weight * PARTS[loss](rows, pull, weight)
    return total, correct, torch.addcmul(pull, rows.q, pull.sum(-1, keepdim=True), value=-1.0, out=z)


def _add_kl(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    p = rows.log_p.exp()
    pull.sub_(p, alpha=weight)
    return (p * (rows.log_p - rows.log_q)).sum(-1)


def _add_ce(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    pull.scatter_add_(1, rows.label, torch.full_like(pull[:, :1], -weight))
    return -rows.log_q.gather(1, rows.label)[:, 0]


def _add_rkl(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    each = (rows.log_q - rows.log_p).mul_(rows.q)
    pull.add_(each, alpha=weight)
    return each.sum(-1)


def _add_js(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    log_m = torch.logaddexp(rows.log_p, rows.log_q).sub_(math.log(2.0))
    of_q = (rows.log_q - log_m).mul_(rows.q)
    pull.add_(of_q, alpha=0.5 * weight)
    of_p = torch.sub(rows.log_p, log_m, out=log_m).mul_(rows.log_p.exp())
    return 0.5 * (of_p.sum(-1) + of_q.sum(-1))


def _add_tv(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    pull.sub_(rows.lacking(), alpha=weight)
    return -torch.expm1(rows.overlap())


def _add_nla(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    overlap = rows.overlap()
    # As a difference of logarithms: where nothing overlaps yet, both q and the overlap may be too small for a float.
    share = (rows.log_q - overlap[:, None]).clamp_(max=0.0).exp_().mul_(rows.log_q < rows.log_p)
    pull.sub_(share, alpha=weight)
    return -overlap


def _add_lk_hybrid(rows: _Rows, pull: Tensor, weight: float) -> Tensor:
    overlap = rows.overlap()
    share = torch.exp(-ETA * overlap.exp())[:, None]
    p = rows.log_p.exp()
    pull.addcmul_(p, share, value=-weight).addcmul_(rows.lacking(), 1.0 - share, value=-weight)
    divergence = p.mul_(rows.log_p - rows.log_q).sum(-1)
    return share[:, 0] * divergence - (1.0 - share[:, 0]) * torch.expm1(overlap)


PARTS: dict[Loss, Callable[[_Rows, Tensor, float], Tensor]] = {
    Loss.kl: _add_kl,
    Loss.ce: _add_ce,
    Loss.rkl: _add_rkl,
    Loss.js: _add_js,
    Loss.tv: _add_tv,
    Loss.nla: _add_nla,
    Loss.lk_hybrid: _add_lk_hybrid,
}
"""What adds a loss's pull, times its weight, and gives the loss of each prediction [n], not weighted."""


def _wins(z: Tensor, label: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Whether each row's largest logit is its label's, bool [n], and that logit [n].

    Rounded logits tie, and then the first one counts, as in a server. Exact ones do not, and finding the largest value
    is several times faster than finding its place.
    """
    if exact:
        top = z.amax(-1)
        return z.gather(1, label[:, None])[:, 0] == top, top
    top, place = z.max(-1)
    return place == label, top


def _softmax(z: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, V], and the logarithm of what they are divided by [n]; `top` is each row's largest logit.

    The most likely token's probability is 1 over the sum that a softmax divides by, once `top` is taken off.
    """
    q = z.softmax(-1)
    return q, top - q.amax(-1).log()
