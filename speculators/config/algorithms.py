"""The part of the recipe's schema that describes a draft: its options, by algorithm. `config` has the rest."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.config.fields import (
    MISSING,
    Options,
    as_override,
    each,
    if_set,
    non_negative,
    not_empty,
    positive,
    ratio,
    semantic,
)
from speculators.errors import RecipeError, closest


class Loss(enum.Enum):
    """What is asked of a prediction. All over the draft's vocabulary."""

    kl = "kl"
    """The target's distribution: KL(target || draft)."""
    ce = "ce"
    """The target's most likely token: cross-entropy against it."""
    rkl = "rkl"
    """Nothing that the target would not say: KL(draft || target)."""
    js = "js"
    """Jensen-Shannon divergence: half of each of the two, against their mean."""
    tv = "tv"
    """Total variation: the share of its samples that is rejected, 1 - sum(min(target, draft))."""
    nla = "nla"
    """Acceptance as a likelihood: -log(sum(min(target, draft))) (LK losses, arXiv:2602.23881). Its slope is that of
    `tv` over the acceptance, so that it does not vanish where hardly anything is accepted yet."""
    lk_hybrid = "lk_hybrid"
    """From `kl` to `tv` as the acceptance grows: s * kl + (1 - s) * tv, s = exp(-3 * acceptance) taken as a constant
    (LK losses, arXiv:2602.23881)."""


def loss_weights(given: Any) -> dict[Loss, float]:
    """The losses that `speculator.loss_fn` asks for, with their weights: a name, or several as {name: weight}.

    Raises:
        RecipeError: no such loss, or a weight that is not positive.
    """
    weights: dict[Loss, float] = {}
    for name, weight in (given if isinstance(given, Mapping) else {given: 1.0}).items():
        known = name if isinstance(name, Loss) else Loss.__members__.get(str(name))
        if known is None:
            raise RecipeError(f"speculator.loss_fn: there is no loss `{name}`", closest(str(name), Loss.__members__))
        if not isinstance(weight, (int, float)) or not 0.0 < weight < math.inf:
            raise RecipeError(
                f"speculator.loss_fn: the weight of {known.name} is {weight}",
                "give positive numbers: {kl: 0.7, tv: 0.3}",
            )
        weights[known] = float(weight)
    if not weights:
        raise RecipeError("speculator.loss_fn names no loss", f"one of {', '.join(Loss.__members__)}")
    return weights


class DraftArch(enum.Enum):
    """What the draft's decoder layers are like."""

    llama = "llama"
    qwen3 = "qwen3"
    """Queries and keys are normed head by head."""


class Weighting(enum.Enum):
    """What the places of a block weigh in the loss."""

    decay = "decay"
    """exp(-k / `decay_gamma`) for the k-th token that is proposed."""
    dpace = "dpace"
    """D-PACE: how likely it is, by what the draft gives the tokens so far, that a place is reached at all."""


@dataclass(kw_only=True, slots=True, repr=False)
class Speculator(Options):
    """The draft model, as far as every algorithm has it."""

    algorithm: str = MISSING
    """A name in `speculators.drafts.DRAFTS`."""
    num_layers: int = semantic(1, positive())
    """Decoder layers of the draft."""
    target_layer_ids: list[int] | None = semantic(None, not_empty(), each(non_negative()))
    """Target layers whose input the draft reads; derived from the target's depth if null."""
    num_attention_heads: int | None = if_set(None, positive())
    """Query heads of the draft's layers, of the target's width each; as many as the target has if null."""
    num_key_value_heads: int | None = if_set(None, positive())
    """Heads that the draft's keys and values have; as many as the target has if null."""
    intermediate_size: int | None = if_set(None, positive())
    """Width inside the draft's MLPs; the target's if null, three times the hidden size where that has experts."""
    num_speculative_tokens: int = semantic(3, positive())
    """Tokens proposed in one step: what is written into the checkpoint, and what evaluation serves with."""
    loss_fn: Any = if_set("kl")
    """What is asked of a prediction: a name of `Loss`, or several with their weights: `{kl: 0.7, tv: 0.3}`."""
    hidden_loss_weight: float = if_set(0.0, non_negative())
    """Weight, beside that loss, of how far what enters the draft's head is from what enters the target's (EAGLE, Li et
    al. 2024, arXiv:2401.15077): it says more of each token than which token follows, where there are few."""
    train_lm_head: bool = if_set(False)
    """Train the draft's own copy of the target's head, from the target's values on."""
    embed_requires_grad: bool = if_set(False)
    """Train the draft's own copy of the target's embeddings, from the target's values on; of a target whose head is
    its embeddings (tied), the draft's two copies are apart."""

    # What the package has to know of an algorithm without its model. An algorithm overrides what differs.

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """Layers of a target of `depth` layers whose input the draft reads where the recipe names none, ascending."""
        return sorted({min(2, depth - 1), depth // 2, max(0, depth - 3)})

    def needs_mask_token(self) -> bool:
        """Whether the draft needs a mask token that the recipe leaves to be found in the target's tokenizer."""
        return False

    def step_decay(self) -> float:
        """Factor from the weight of one proposed token's loss to the next one's."""
        return 1.0

    def vllm_method(self) -> str:
        """The `method` under which vLLM serves the checkpoint."""
        return self.algorithm

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """Options of the draft that have to fit each other: (they do, what is wrong, what to give instead)."""
        return iter(())


@dataclass(kw_only=True, slots=True, repr=False)
class Eagle3(Speculator):
    """EAGLE-3 (Li et al. 2025, arXiv:2503.01840)."""

    algorithm: str = "eagle3"
    ttt_steps: int = semantic(3, positive())
    """Steps of the train-time test: how often the draft is fed its own output in training."""
    ttt_warmup_ratio: float = semantic(0.0, ratio())
    """Share of the training, from its beginning, in which one step only is unrolled: it costs less."""
    ttt_random_steps: bool = if_set(False)
    """Each step of the training unrolls a number of steps that is drawn anew, from 1 to `ttt_steps`."""
    ttt_step_decay: float = semantic(1.0, positive())
    """Weight of step k in the loss is this to the power k."""
    norm_before_residual: bool = True
    """The residual stream of the first layer starts from the normed features."""
    norm_before_fc: bool = True
    """RMSNorm over the concatenated target states before they are projected."""
    fc_norm: bool = if_set(False)
    """RMSNorm over each of the target's states before they are concatenated (EAGLE-3.1); instead of
    `norm_before_fc`."""
    norm_output: bool = True
    """Feed the normed output back into the next step (EAGLE-3.1)."""
    induction: bool = True
    """Begin with attention that finds where the last token stood before and copies what followed it there."""
    draft_arch: DraftArch = if_set(DraftArch.llama)
    """What the decoder layers are like."""

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """A low, a middle and a high layer, as in the paper."""
        return sorted({min(2, depth - 1), depth // 2, max(0, depth - 3)})

    def step_decay(self) -> float:
        """See `ttt_step_decay`."""
        return self.ttt_step_decay

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """RMSNorm comes in one of two places."""
        yield (
            not (self.fc_norm and self.norm_before_fc),
            "speculator.fc_norm=true: excludes speculator.norm_before_fc=true",
            "speculator.norm_before_fc=false",
        )


@dataclass(kw_only=True, slots=True, repr=False)
class DFlash(Speculator):
    """DFlash (block diffusion): a block is the last token and one mask for each token that is proposed."""

    algorithm: str = "dflash"
    num_layers: int = semantic(5, positive())
    """Decoder layers of the draft."""
    num_speculative_tokens: int = semantic(15, positive())
    """Tokens proposed in one step; the block is one longer."""
    target_layers: int = semantic(5, positive())
    """Layers of the target that are read, spread over its depth, where `target_layer_ids` is null."""
    mask_token_id: int | None = semantic(None, non_negative())
    """Token whose embedding stands for a place to be filled in; if null, found for the target: the tokenizer's mask
    token, the first row of the embeddings that the tokenizer does not use, or its token for padding."""
    causal: bool = False
    """A place of a block sees only those before it; otherwise all of them see each other."""
    sliding_window: int | None = semantic(None, positive())
    """Tokens before the block that are seen; null: all of its document."""
    loss_fn: Any = "ce"
    """What is asked of a prediction, as everywhere. `dpace` needs `ce` or `nla`, alone."""
    weighting: Weighting = Weighting.dpace
    """What the places of a block weigh in the loss."""
    decay_gamma: float = semantic(4.0, positive())
    """Of `weighting: decay`, in tokens."""
    dpace_alpha: float = semantic(0.5, ratio())
    """Of `weighting: dpace`: share of its confidence that a place has whatever the draft says, 0 to 1."""
    induction: bool = if_set(False)
    """Begin with attention that finds where the last token stood before and copies what followed it there; takes two
    layers, and pays where there are few conversations to learn it from (docs/log.md)."""
    max_anchors: int = semantic(512, positive())
    """Blocks that a step trains on, at most; which ones is drawn anew in every step."""

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """`target_layers` of them at equal distances, from the output of layer 1 to that of the third before the last.

        A shallow target has fewer.
        """
        lowest = min(1, depth - 1)
        if self.target_layers == 1:
            return inputs_after([depth // 2])
        distance = (max(lowest, depth - 3) - lowest) / (self.target_layers - 1)
        return inputs_after(sorted({round(lowest + i * distance) for i in range(self.target_layers)}))

    def needs_mask_token(self) -> bool:
        """See `mask_token_id`."""
        return self.mask_token_id is None

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """D-PACE takes a confidence from the loss."""
        yield (
            self.weighting is not Weighting.dpace or loss_weights(self.loss_fn) in ({Loss.ce: 1.0}, {Loss.nla: 1.0}),
            "speculator.weighting=dpace: takes the cross-entropy for the draft's confidence, or the likelihood of "
            f"acceptance, not speculator.loss_fn={as_override(self.loss_fn)}",
            "speculator.loss_fn=ce, speculator.loss_fn=nla or speculator.weighting=decay",
        )


def inputs_after(outputs: list[int]) -> list[int]:
    """Layer ids by their input, from layer ids by their output: the output of layer i is the input of layer i + 1.

    This package, vLLM and upstream's package count inputs; DFlash's authors count outputs.
    """
    return [layer + 1 for layer in outputs]


SPECULATORS: dict[str, type[Speculator]] = {"eagle3": Eagle3, "dflash": DFlash}
"""Schemas by algorithm; a test holds this list, `drafts.DRAFTS` and `conf/speculator/` together."""
