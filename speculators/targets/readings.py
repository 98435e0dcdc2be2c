"""From captured states to logits: as training reads a checkpoint, and as it might have been meant instead.

`agreement` says how well a reading gives what a server said; `others` lists the mistakes that are known from practice,
each as the reading that it would take to agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from speculators.targets.checkpoint import FinalNorm, TargetCheckpoint

DEVIATIONS = 3.0
"""Rounding is allowed so many of its standard deviations."""
LOGPROB_SLACK = 1e-3
"""Nats that a log-probability may be off where nothing rounds."""
VOCABULARY_CHUNK = 1 << 14
"""Rows of the head that exist in float32 at one time."""


class GreedyToken(NamedTuple):
    """What the server says after a row's tokens up to and with the one at `position`."""

    row: int
    position: int
    token: int
    """The likeliest token."""
    logprob: float | None
    """Its log-probability, where the server says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One way from what was captured to logits."""

    head: Tensor
    """[V, H], stored dtype."""
    norm: FinalNorm | None
    """None: the states are normed already."""
    centred: bool = False
    """The norm subtracts the mean first, as a LayerNorm does."""
    layer: int = -1
    """Place of the last layer's output among the captured ones."""
    scale: float = 1.0
    softcap: float | None = None

    def normed(self, states: Tensor) -> Tensor:
        """What enters the head, float32 [P, H]; `states` are [P, L, H]."""
        state = states[:, self.layer].float()
        if self.norm is None:
            return state
        state = state - state.mean(-1, keepdim=True) if self.centred else state
        return torch.nn.functional.rms_norm(state, state.shape[-1:], self.norm.weight, self.norm.eps)

    def logits(self, normed: Tensor) -> Tensor:
        """Float32 [P, V]."""
        logits = torch.cat([normed @ rows.float().T for rows in self.head.split(VOCABULARY_CHUNK)], 1) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a reading gives, against what the server said."""

    picks: int
    agree: int
    """Picks that come out, or would but for rounding."""
    off: float
    """Median of how far log-probabilities are from the server's, in nats; 0 where it says none."""
    excess: float
    """The same, less what rounding explains; above 0 something else is done to the logits."""

    def passes(self, least: float) -> bool:
        """Whether a share `least` of the tokens, and the log-probabilities, are the server's."""
        return self.agree >= least * self.picks and self.excess <= 0


def agreement(reading: Reading, states: Tensor, picks: Sequence[GreedyToken], drift: float, unit: float) -> Agreement:
    """Compare `states` [P, L, H] at the places of the picks with these.

    `drift` is the standard deviation of what rounding does to a state, relative to it; `unit` the rounding of a logit.
    """
    normed = reading.normed(states)
    logits = reading.logits(normed)
    top, best = logits.max(-1)
    token = torch.tensor([pick.token for pick in picks])
    said = logits.gather(1, token[:, None])[:, 0]

    def rounding(direction: Tensor) -> Tensor:
        by_state = DEVIATIONS * drift * abs(reading.scale) * torch.linalg.vector_norm(normed * direction, dim=-1)
        return by_state + 2 * unit * top.abs()

    head_said = reading.head[token].float()
    agree = int((top - said <= rounding(reading.head[best].float() - head_said)).sum())
    known = [i for i, pick in enumerate(picks) if pick.logprob is not None]
    if not known:
        return Agreement(len(picks), agree, 0.0, 0.0)
    off = ((said - logits.logsumexp(-1))[known] - torch.tensor([picks[i].logprob for i in known])).abs()
    excess = off - rounding(head_said)[known] - LOGPROB_SLACK
    return Agreement(len(picks), agree, float(off.median()), float(excess.median()))


def checkpoint_reading(target: TargetCheckpoint, head: Tensor | None = None) -> Reading:
    """As training reads the checkpoint, or with another head."""
    return Reading(
        head=target.head() if head is None else head,
        norm=target.final_norm(),
        scale=target.logit_scale,
        softcap=target.logit_softcap,
    )


class AlternativeReading(NamedTuple):
    """A known way of being wrong."""

    name: str
    hint: str
    reading: Reading
    """What agrees with the server if this is the mistake."""


def alternative_readings(target: TargetCheckpoint, layer_ids: Sequence[int]) -> Iterator[AlternativeReading]:
    """What may have been meant instead, of the checkpoint or of the captured layers `layer_ids`."""
    other_head = target.other_head()
    if other_head is not None:
        says = f"config.json says that the head is {'' if target.tied else 'not '}tied to the embeddings, and it is"
        hint = f"set `tie_word_embeddings` to {'false' if target.tied else 'true'} in the target's config.json"
        yield AlternativeReading(f"{says}{' not' if target.tied else ''}", hint, checkpoint_reading(target, other_head))
    if not target.has_head:
        return
    own, kind = checkpoint_reading(target), f"model_type `{target.config['model_type']}`"
    norm = target.final_norm()
    yield AlternativeReading(
        "the states are normed already",
        f"capture layer {layer_ids[-1]}: the last one's output before the final norm",
        replace(own, norm=None),
    )
    offset = "the final norm multiplies by 1 + weight, as Gemma's does, and is read as a plain one"
    plain = "the final norm is a plain one, and is read as one that multiplies by 1 + weight, as Gemma's does"
    yield AlternativeReading(
        plain if norm.unit_offset else offset,
        f"{kind} has its place in UNIT_OFFSET_NORMS of speculators/targets/checkpoint.py, or not",
        replace(own, norm=replace(norm, weight=norm.weight + (-1.0 if norm.unit_offset else 1.0))),
    )
    yield AlternativeReading(
        "the final norm subtracts the mean: it is a LayerNorm",
        f"train for a target whose final norm is an RMSNorm; {kind} has another",
        replace(own, centred=True),
    )
    for place, layer in enumerate(layer_ids[:-1]):
        yield AlternativeReading(
            f"the last layer's output is captured at place {place}, where the input of layer {layer} belongs",
            f"the server has to capture the layers {list(layer_ids)}, in this order",
            replace(own, layer=place),
        )
    yield from _other_logits(own, kind)


def _other_logits(own: Reading, kind: str) -> Iterator[AlternativeReading]:
    if own.softcap is not None:
        hint = "`final_logit_softcapping` of the target's config.json is not what the server serves with"
        yield AlternativeReading(
            "the server does not bound its logits, the config does", hint, replace(own, softcap=None)
        )
    for scale in sorted({1.0, 1 / own.scale} - {own.scale}):
        yield AlternativeReading(
            f"the server multiplies its logits by {scale:g}, and they are read with {own.scale:g}",
            f"`logit_scale` in speculators/targets/checkpoint.py reads {kind} otherwise than the server",
            replace(own, scale=scale),
        )
