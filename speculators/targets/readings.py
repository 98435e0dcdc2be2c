"""Readings: the ways in which a last-layer hidden state may become logits.

Training computes the target's logits from its last-layer hidden state, by the final norm, the head, and a scale or a
softcap that config.json names: the checkpoint's reading. A greedy token is the token with the largest logit at a
position, as the server reported it. `agreement` counts the greedy tokens that a reading reproduces.

`alternative_readings` lists the mistakes that are known from practice, such as a norm whose weight lacks an offset of
1, or hidden states that are normed already, each as the reading that would be right if that were the mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.targets.checkpoint import FinalNorm, TargetCheckpoint

DEVIATIONS = 3.0
"""Standard deviations of the rounding error that are tolerated."""
LOGPROB_SLACK = 1e-3
"""Difference of two log-probabilities that is tolerated without any rounding, in nats."""
VOCABULARY_CHUNK = 1 << 14
"""Rows of the head that exist in float32 at one time."""


class GreedyToken(NamedTuple):
    """The server's greedy next token after the tokens of a row up to and including `position`."""

    row: int
    position: int
    token: int
    logprob: float | None
    """Log-probability of the token; None where the server does not report it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One way to compute logits from the captured hidden states."""

    head: Tensor
    """[V, H], stored dtype."""
    norm: FinalNorm | None
    """None: the hidden states are normed already."""
    subtract_mean: bool = False
    """The norm subtracts the mean first, as a LayerNorm does."""
    layer: int = -1
    """Index of the last layer's output among the captured layers."""
    scale: float = 1.0
    softcap: float | None = None

    def normed(self, hidden_states: Tensor) -> Tensor:
        """Apply the norm to the last layer of `hidden_states` [P, L, H]; returns the head's input, float32 [P, H]."""
        last = hidden_states[:, self.layer].float()
        if self.norm is None:
            return last
        last = last - last.mean(-1, keepdim=True) if self.subtract_mean else last
        return torch.nn.functional.rms_norm(last, last.shape[-1:], self.norm.weight, self.norm.eps)

    def logits(self, normed: Tensor) -> Tensor:
        """Apply head, scale and softcap to normed hidden states [P, H]; returns float32 [P, V]."""
        logits = torch.cat([normed @ rows.float().T for rows in self.head.split(VOCABULARY_CHUNK)], 1) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a reading reproduces the server's greedy tokens."""

    compared: int
    """Greedy tokens that were compared."""
    equal: int
    """Greedy tokens that the reading reproduces, or misses by no more than rounding explains."""
    logprob_error: float
    """Median difference of log-probabilities from the server's, in nats; 0 where the server reports none."""
    excess: float
    """Median of that difference less what rounding explains; above 0, the server computes its logits otherwise."""

    def passes(self, min_agreement: float) -> bool:
        """Whether at least this share of the tokens, and the log-probabilities, are the server's."""
        return self.equal >= min_agreement * self.compared and self.excess <= 0


def agreement(
    reading: Reading, hidden_states: Tensor, tokens: Sequence[GreedyToken], drift: float, unit: float
) -> Agreement:
    """Compare a reading of hidden states with the server's greedy tokens.

    Args:
        reading: how logits are computed.
        hidden_states: [P, L, H], at the positions of the tokens.
        tokens: the P greedy tokens.
        drift: standard deviation of the rounding error of a hidden state, relative to its norm.
        unit: relative rounding error of a logit.
    """
    normed = reading.normed(hidden_states)
    logits = reading.logits(normed)
    largest, argmax = logits.max(-1)
    token_ids = torch.tensor([token.token for token in tokens])
    server_logits = logits.gather(1, token_ids[:, None])[:, 0]

    def rounding(direction: Tensor) -> Tensor:
        by_drift = DEVIATIONS * drift * abs(reading.scale) * torch.linalg.vector_norm(normed * direction, dim=-1)
        return by_drift + 2 * unit * largest.abs()

    server_rows = reading.head[token_ids].float()
    equal = int((largest - server_logits <= rounding(reading.head[argmax].float() - server_rows)).sum())
    known = [i for i, token in enumerate(tokens) if token.logprob is not None]
    if not known:
        return Agreement(len(tokens), equal, 0.0, 0.0)
    logprobs = (server_logits - logits.logsumexp(-1))[known]
    error = (logprobs - torch.tensor([tokens[i].logprob for i in known])).abs()
    excess = error - rounding(server_rows)[known] - LOGPROB_SLACK
    return Agreement(len(tokens), equal, float(error.median()), float(excess.median()))


def checkpoint_reading(target: TargetCheckpoint, head: Tensor | None = None) -> Reading:
    """The reading that training uses, or the same with another head [V, H]."""
    return Reading(
        head=target.head() if head is None else head,
        norm=target.final_norm(),
        scale=target.logit_scale,
        softcap=target.logit_softcap,
    )


class AlternativeReading(NamedTuple):
    """A known mistake, and the reading that agrees with the server if it was made."""

    mistake: str
    hint: str
    reading: Reading


def alternative_readings(target: TargetCheckpoint, layer_ids: Sequence[int]) -> Iterator[AlternativeReading]:
    """List the known mistakes in reading this checkpoint, or in capturing the layers `layer_ids`."""
    other_head = target.other_head()
    if other_head is not None:
        config = f"config.json says that the head is {'' if target.tied else 'not '}tied to the embeddings, and it is"
        hint = f"set `tie_word_embeddings` to {'false' if target.tied else 'true'} in the target's config.json"
        mistake = f"{config}{' not' if target.tied else ''}"
        yield AlternativeReading(mistake, hint, checkpoint_reading(target, other_head))
    if not target.has_head:
        return
    reading, kind = checkpoint_reading(target), f"model_type `{target.config['model_type']}`"
    norm = target.final_norm()
    yield AlternativeReading(
        "the hidden states are normed already",
        f"capture layer {layer_ids[-1]}: the last one's output before the final norm",
        replace(reading, norm=None),
    )
    yield AlternativeReading(
        "the final norm multiplies by weight, and is computed with 1 + weight, as Gemma's is"
        if norm.unit_offset
        else "the final norm multiplies by 1 + weight, as Gemma's does, and is computed with weight",
        f"{'remove' if norm.unit_offset else 'add'} {kind} in UNIT_OFFSET_NORMS of speculators/targets/checkpoint.py",
        replace(reading, norm=replace(norm, weight=norm.weight + (-1.0 if norm.unit_offset else 1.0))),
    )
    yield AlternativeReading(
        "the final norm subtracts the mean: it is a LayerNorm",
        f"train for a target whose final norm is an RMSNorm; {kind} has another",
        replace(reading, subtract_mean=True),
    )
    for index, layer in enumerate(layer_ids[:-1]):
        yield AlternativeReading(
            f"the last layer's output is captured at index {index}, where the input of layer {layer} belongs",
            f"the server has to capture the layers {list(layer_ids)}, in this order",
            replace(reading, layer=index),
        )
    if reading.softcap is not None:
        hint = "`final_logit_softcapping` of the target's config.json is not what the server serves with"
        yield AlternativeReading("the server has no softcap, the config has", hint, replace(reading, softcap=None))
    for scale in sorted({1.0, 1 / reading.scale} - {reading.scale}):
        yield AlternativeReading(
            f"the server multiplies its logits by {scale:g}, the checkpoint is read with {reading.scale:g}",
            f"correct `logit_scale` in speculators/targets/checkpoint.py for {kind}",
            replace(reading, scale=scale),
        )
