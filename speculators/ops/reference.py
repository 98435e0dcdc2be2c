"""Every operation of `ops` as its formula, in plain torch, for tests of the fast implementations.

Each function computes in the format of its arguments, float64 in tests, and leaves gradients to autograd. None chooses
an implementation, saves memory, or rounds.

Shapes: T tokens of a packed batch; R queries or blocks; Q query heads; G key-value heads; D head width; B slots of a
block, L of them queries; N predictions; H hidden size; V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Documents = Sequence[tuple[int, int]]
"""First token and length of each document of a packed batch."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (a, b) from the halves of [..., heads, D] by angles [..., 1, D] (Su et al. 2021, arXiv:2104.09864).

    (a, b) becomes (a cos - b sin, b cos + a sin); the halves of `cos` and `sin` are equal.
    """
    (a, b), (cos, _), (sin, _) = x.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""
    return gate * gate.sigmoid() * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., W] and [V, W] -> [..., V]: x @ weight.T."""
    return x @ weight.mT


def attention(query_states: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """softmax(Q K' / sqrt(D)) V over visible keys (Vaswani et al. 2017, arXiv:1706.03762).

    [R, Q, D], [S, G, D] twice, and bool [R, S] -> [R, Q * D]; Q / G query heads share a key-value head.
    """
    heads, width = query_states.shape[1:]
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    scores = torch.einsum("rhd,shd->hrs", query_states, keys) / math.sqrt(width)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hrs,shd->rhd", weights, values).flatten(1)


def causal_attention(
    query_states: Tensor, steps: Sequence[tuple[Tensor, Tensor]], documents: Documents, positions: Tensor
) -> Tensor:
    """Attention of EAGLE-3's unrolled steps (Li et al. 2025, arXiv:2503.01840): [R, Q, D] -> [R, Q * D].

    A query at position p sees step 0 of its document up to p, and of each later step its own key.

    Args:
        query_states: [R, Q, D].
        steps: keys and values of step 0, [T, G, D] each, and of later steps, [R, G, D] each.
        documents: of the packed batch.
        positions: of the queries, int64 [R].
    """
    document, token = _document_of_tokens(documents), torch.arange(sum(length for _, length in documents))
    step_0 = (document == document[positions, None]) & (token <= positions[:, None])
    later = torch.eye(len(positions), dtype=torch.bool)
    visible = torch.cat([step_0, *[later] * (len(steps) - 1)], 1)
    keys, values = (torch.cat(tensors) for tensors in zip(*steps, strict=True))
    return attention(query_states, keys, values, visible)


def anchored_attention(
    query_states: Tensor, context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], documents: Documents,
    anchors: Tensor, is_causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """DFlash's attention of blocks that start at anchors: [R, L, Q, D] -> [R, L, Q * D].

    A block sees its document before its anchor, or the last `window` tokens of that, and its own slots; with
    `is_causal`, a slot sees none after itself.

    Args:
        query_states: of the last L slots of each block.
        context: keys and values of all tokens, [T, G, D] each.
        block: keys and values of the blocks, [R, B, G, D] each.
        documents: of the packed batch.
        anchors: positions, int64 [R].
        is_causal: within a block.
        window: tokens before the anchor, or None for all.
    """
    (count, length), slots = query_states.shape[:2], block[0].shape[1]
    document, token = _document_of_tokens(documents), torch.arange(sum(size for _, size in documents))
    anchor = anchors.repeat_interleave(length)[:, None]
    before = (document == document[anchor]) & (token < anchor)
    if window is not None:
        before &= token >= anchor - window
    query_block, query_slot = (x.flatten()[:, None] for x in _grid(count, range(slots - length, slots)))
    key_block, key_slot = (x.flatten() for x in _grid(count, range(slots)))
    inside = (query_block == key_block) & ((key_slot <= query_slot) | (not is_causal))
    keys, values = (torch.cat([c, b.flatten(0, 1)]) for c, b in zip(context, block, strict=True))
    return attention(query_states.flatten(0, 1), keys, values, torch.cat([before, inside], 1)).view(count, length, -1)


def _document_of_tokens(documents: Documents) -> Tensor:
    """Index of the document of each token [T]."""
    return torch.arange(len(documents)).repeat_interleave(torch.tensor([length for _, length in documents]))


def _grid(blocks: int, slots: range) -> tuple[Tensor, ...]:
    """Block and slot of each element of [blocks, slots]."""
    return torch.meshgrid(torch.arange(blocks), torch.tensor(slots), indexing="ij")


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of distributions [N, V]: [N]."""
    return (p * (p / q).log()).sum(-1)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """sum(min(p, q)), the probability that a sample of q is accepted (Leviathan et al. 2023, arXiv:2211.17192): [N]."""
    return torch.minimum(p, q).sum(-1)


def lk_hybrid(p: Tensor, q: Tensor) -> Tensor:
    """s KL(p || q) + (1 - s) TV(p, q), s = exp(-3 overlap) as a constant (LK losses, arXiv:2602.23881): [N]."""
    s = torch.exp(-3.0 * overlap(p, q).detach())
    return s * kl(p, q) + (1.0 - s) * (1.0 - overlap(p, q))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "ce": lambda p, q: -q.gather(-1, p.argmax(-1, keepdim=True))[:, 0].log(),
    "rkl": lambda p, q: kl(q, p),
    "js": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "tv": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "nla": lambda p, q: -overlap(p, q).log(),
    "lk_hybrid": lk_hybrid,
}
"""Losses between the target's distribution p and the draft's q, [N, V] each -> [N]."""


def losses(logits: Tensor, target_logits: Tensor, terms: Mapping[str, float]) -> Tensor:
    """Sum of weighted `LOSSES` between softmax(target_logits) and softmax(logits), [N, V] each -> [N]."""
    p, q = target_logits.softmax(-1), logits.softmax(-1)
    return sum((weight * LOSSES[name](p, q) for name, weight in terms.items()), torch.zeros_like(p[:, 0]))


def target_logits(
    hidden_states: Tensor, norm_weight: Tensor, norm_eps: float, head: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The target's logits [N, V] from hidden states before its final norm [N, H]: norm, head, scale, soft cap."""
    logits = linear(rms_norm(hidden_states, norm_weight, norm_eps), head) * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def distillation_loss(
    hidden_states: Tensor, head: Tensor, logits_of_target: Tensor, weight: Tensor, terms: Mapping[str, float]
) -> Tensor:
    """Weighted sum of the predictions' losses: [N, H], [V, H], [N, V], [N] -> scalar."""
    return (weight * losses(linear(hidden_states, head), logits_of_target, terms)).sum()


def hidden_state_loss(hidden_states: Tensor, target_hidden_states: Tensor) -> Tensor:
    """|x - y|^2 / |y|^2 (compare EAGLE, Li et al. 2024, arXiv:2401.15077): [N, H] twice -> [N]."""
    return (hidden_states - target_hidden_states).square().sum(-1) / target_hidden_states.square().sum(-1)


def nesterov(momentum: Tensor, grad: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """m = beta m + (1 - beta) g, and Nesterov's direction beta m + (1 - beta) g with the new m."""
    momentum = beta * momentum + (1.0 - beta) * grad
    return momentum, beta * momentum + (1.0 - beta) * grad


def polar_express(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """X = a X + b (XX')X + c (XX')^2 X for each (a, b, c) (Amsel et al. 2025, arXiv:2505.16932): [k, n], k <= n.

    X is divided by its Schatten 8-norm first, so that its singular values are at most 1.
    """
    x = x / torch.linalg.svdvals(x).norm(8)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def zolotarev(x: Tensor, scale: float, weights: Sequence[float], poles: Sequence[float]) -> Tensor:
    """scale * (X + sum(weight * (XX' + pole I)^-1 X)) (Nakatsukasa and Freund 2016): [k, n], k <= n.

    X is divided by its Schatten 4-norm first.
    """
    x = x / torch.linalg.svdvals(x).norm(4)
    identity = torch.eye(len(x), dtype=x.dtype)
    terms = [w * torch.linalg.solve(x @ x.mT + pole * identity, x) for w, pole in zip(weights, poles, strict=True)]
    return scale * sum(terms, x)


def muon_weight(weight: Tensor, update: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Weight after Muon's update, with decoupled decay and AdamW's RMS (Liu et al. 2025, arXiv:2502.16982)."""
    return (1.0 - lr * weight_decay) * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update
