"""The section `speculator` of the recipe's schema: the options of the draft model, by algorithm."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from speculators.config.fields import (
    MISSING,
    Options,
    as_override,
    at_least,
    each,
    if_set,
    non_negative,
    not_empty,
    operational,
    positive,
    ratio,
    semantic,
)
from speculators.errors import RecipeError, closest


class Loss(enum.Enum):
    """Losses between the distributions of target and draft, both over the draft vocabulary."""

    kl = "kl"
    """Kullback-Leibler divergence KL(target || draft)."""
    ce = "ce"
    """Cross-entropy against the target's most likely token."""
    rkl = "rkl"
    """Reverse Kullback-Leibler divergence KL(draft || target)."""
    js = "js"
    """Jensen-Shannon divergence: the mean of both distributions' KL divergences from their average."""
    tv = "tv"
    """Total variation distance, the share of rejected samples: 1 - sum(min(target, draft))."""
    nla = "nla"
    """Negative log of the acceptance rate: -log(sum(min(target, draft))) (LK losses, arXiv:2602.23881). Its gradient is
    that of `tv` divided by the acceptance rate, so that it does not vanish while little is accepted."""
    lk_hybrid = "lk_hybrid"
    """From `kl` to `tv` as the acceptance rate grows: s * kl + (1 - s) * tv with the constant
    s = exp(-3 * acceptance rate) (LK losses, arXiv:2602.23881)."""


def loss_weights(loss_fn: Any) -> dict[Loss, float]:
    """Parse `speculator.loss_fn`, a name or {name: weight}, into the weight of each loss.

    Raises:
        RecipeError: no such loss, a weight that is not positive, or neither a name nor a mapping.
    """
    if isinstance(loss_fn, (list, tuple)):
        raise RecipeError(
            f"speculator.loss_fn={as_override(loss_fn)}: must be the name of a loss, or {{NAME: WEIGHT}}",
            "'speculator.loss_fn={kl:0.7,tv:0.3}', with a weight for each",
        )
    weights: dict[Loss, float] = {}
    for name, weight in (loss_fn if isinstance(loss_fn, Mapping) else {loss_fn: 1.0}).items():
        known = name if isinstance(name, Loss) else Loss.__members__.get(str(name))
        if known is None:
            raise RecipeError(f"speculator.loss_fn: there is no loss `{name}`", closest(str(name), Loss.__members__))
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 < weight < math.inf:
            raise RecipeError(
                f"speculator.loss_fn: the weight of {known.name} is {weight}",
                "give positive numbers: {kl: 0.7, tv: 0.3}",
            )
        weights[known] = float(weight)
    if not weights:
        raise RecipeError("speculator.loss_fn names no loss", f"one of {', '.join(Loss.__members__)}")
    return weights


class Init(enum.Enum):
    """How a draft's weights are initialized."""

    random = "random"
    """From a normal distribution, as the papers do."""
    induction = "induction"
    """Then attention is set to find an earlier occurrence of the last tokens and copy what followed it, by a linear fit
    to training data. Helps when there are few conversations to learn that from (docs/log.md). `eagle3` and `dflash`."""


class DraftArch(enum.Enum):
    """Architectures of the draft's decoder layers."""

    llama = "llama"
    qwen3 = "qwen3"
    """As `llama`, with RMSNorm over each query and key head."""


class Weighting(enum.Enum):
    """Weights of a block's positions in the loss."""

    decay = "decay"
    """exp(-(k - 1) / `decay_gamma`) for the k-th proposed token."""
    dpace = "dpace"
    """D-PACE: the probability that the position is reached, from the draft's probabilities of the tokens before it."""


@dataclass(kw_only=True, slots=True, repr=False)
class Speculator(Options):
    """The draft model: options that every algorithm has."""

    algorithm: str = MISSING
    """Algorithm of the draft model, a name in `speculators.drafts.DRAFTS`."""
    num_layers: int = semantic(1, positive())
    """Decoder layers of the draft."""
    target_layer_ids: list[int] | None = semantic(None, not_empty(), each(non_negative()))
    """Target layers whose input the draft reads; null: derived from the target's depth."""
    num_attention_heads: int | None = if_set(None, positive())
    """Query heads of the draft's layers, each as wide as the target's; null: as many as the target has."""
    num_key_value_heads: int | None = if_set(None, positive())
    """Key and value heads of the draft's layers; null: as many as the target has."""
    intermediate_size: int | None = if_set(None, positive())
    """Width inside the draft's MLPs; null: the target's, or 3 * hidden size if the target has experts."""
    init: Init = if_set(Init.random)
    """How the draft's weights are initialized."""
    num_speculative_tokens: int | None = operational(None, positive())
    """Tokens that the trained draft proposes in one step where it is used; null: as many as the training supervises.
    Operational, because the training does not depend on it, and the key of `evaluate` holds the resolved value."""
    loss_fn: Any = if_set("kl")
    """Loss: a name of `Loss`, or several with their weights: `{kl: 0.7, tv: 0.3}`."""
    hidden_loss_weight: float = if_set(0.0, non_negative())
    """Weight of an additional loss, the distance between the hidden states that enter the heads of draft and target
    (EAGLE, Li et al. 2024, arXiv:2401.15077); helps when there is little data."""
    train_lm_head: bool = if_set(False)
    """Train the draft's copy of the target's head, starting from the target's values."""
    embed_requires_grad: bool = if_set(False)
    """Train the draft's copy of the target's embeddings, starting from the target's values. If the target ties head and
    embeddings, the draft has a separate copy for each."""

    # Properties of an algorithm that the package needs without importing its model; algorithms override them.

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """Ascending ids of the layers, of a target with `depth` layers, whose input the draft reads by default."""
        return sorted({min(2, depth - 1), depth // 2, max(0, depth - 3)})

    def needs_mask_token(self) -> bool:
        """Whether the draft needs a mask token that must be looked up in the target's tokenizer."""
        return False

    def step_decay(self) -> float:
        """Ratio of the loss weights of one proposed token and the one before."""
        return 1.0

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """The options of a checkpoint with this config.json: those that it determines, else defaults."""
        return cls()

    @classmethod
    def is_native(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json outside the speculators format is that of a draft of this algorithm for vLLM."""
        return False

    def trained_tokens(self) -> int:
        """Tokens of a proposal that the training supervises; the checkpoint names this number."""
        return 1

    def max_tokens(self) -> int | None:
        """Most tokens that the trained draft can propose in one step; None: any number."""
        return None

    def vllm_method(self) -> str:
        """The `method` of vLLM's speculative config for the checkpoint."""
        return self.algorithm

    def initializers(self) -> tuple[Init, ...]:
        """The values of `init` that the algorithm has."""
        return (Init.random,)

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """Check options against each other: (whether they fit, the error, the options to set instead)."""
        longest = self.max_tokens()
        tokens = self.num_speculative_tokens
        yield (
            longest is None or tokens is None or tokens <= longest,
            f"speculator.num_speculative_tokens={tokens}: must be at most {longest}, what a step of "
            f"speculator={self.algorithm} proposes",
            f"speculator.num_speculative_tokens={longest}",
        )
        yield (
            self.init in self.initializers(),
            f"speculator.init={self.init.name}: not available for speculator={self.algorithm}",
            f"speculator.init={self.initializers()[0].name}",
        )


@dataclass(kw_only=True, slots=True, repr=False)
class Eagle3(Speculator):
    """EAGLE-3 (Li et al. 2025, arXiv:2503.01840)."""

    algorithm: str = "eagle3"
    ttt_steps: int = semantic(3, positive())
    """Steps of the test-time training (TTT), in which the draft reads its own output of the step before."""
    ttt_warmup_ratio: float = semantic(0.0, ratio())
    """Share of the training, from its start, with a single TTT step, which is cheaper."""
    ttt_random_steps: bool = if_set(False)
    """Draw the number of TTT steps anew for each optimizer step, from 1 to `ttt_steps`."""
    ttt_step_decay: float = semantic(1.0, positive())
    """The loss of TTT step k, from 0, has the weight `ttt_step_decay` ** k."""
    norm_before_residual: bool = True
    """Start the residual stream of the first layer from the normalized input instead of the input."""
    norm_before_fc: bool = True
    """RMSNorm over the target's concatenated hidden states before the projection."""
    fc_norm: bool = if_set(False)
    """RMSNorm over each of the target's hidden states before they are concatenated (EAGLE-3.1); excludes
    `norm_before_fc`."""
    norm_output: bool = True
    """Pass the normalized output to the next TTT step (EAGLE-3.1)."""
    draft_arch: DraftArch = if_set(DraftArch.llama)
    """Architecture of the decoder layers."""

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """A low, a middle and a high layer, as in the paper."""
        return sorted({min(2, depth - 1), depth // 2, max(0, depth - 3)})

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        return cls(ttt_steps=proposed_tokens(config) or cls().ttt_steps)

    @classmethod
    def is_native(cls, config: Mapping[str, Any]) -> bool:
        """By its architecture, or by a draft vocabulary: some have the plain name of their layers' architecture."""
        has_own_vocabulary = "draft_vocab_size" in config and "block_size" not in config
        return has_own_vocabulary or any("Eagle3" in name for name in config.get("architectures") or [])

    def step_decay(self) -> float:
        """See `ttt_step_decay`."""
        return self.ttt_step_decay

    def trained_tokens(self) -> int:
        return self.ttt_steps

    def initializers(self) -> tuple[Init, ...]:
        return tuple(Init)

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """Check that at most one RMSNorm comes before the projection."""
        yield from Speculator.check(self)
        yield (
            not (self.fc_norm and self.norm_before_fc),
            "speculator.fc_norm=true: excludes speculator.norm_before_fc=true",
            "speculator.norm_before_fc=false",
        )


@dataclass(kw_only=True, slots=True, repr=False)
class DFlash(Speculator):
    """DFlash (block diffusion): a block is the last token and one mask token for each proposed token.

    Fewer tokens than a block's can be served, more cannot.
    """

    algorithm: str = "dflash"
    num_layers: int = semantic(5, positive())
    """Decoder layers of the draft."""
    block_size: int = semantic(16, at_least(2))
    """Positions of a block: one more than the tokens proposed in one step."""
    target_layers: int = semantic(5, positive())
    """Number of target layers that the draft reads, spread over its depth, if `target_layer_ids` is null."""
    mask_token_id: int | None = semantic(None, non_negative())
    """Token whose embedding stands for a token to be predicted; null: the tokenizer's mask token, else the first
    embedding that the tokenizer does not use, else its padding token."""
    causal: bool = False
    """Positions of a block attend only to earlier ones of the block, instead of to all."""
    sliding_window: int | None = semantic(None, positive())
    """Tokens before the block that it attends to; null: all of its document."""
    loss_fn: Any = "ce"
    """Loss, as for every algorithm; `weighting: dpace` needs `ce` or `nla`, alone."""
    weighting: Weighting = Weighting.dpace
    """Weights of a block's positions in the loss; see `Weighting`."""
    decay_gamma: float = semantic(4.0, positive())
    """Decay length of `weighting: decay`, in tokens."""
    dpace_alpha: float = semantic(0.5, ratio())
    """Of `weighting: dpace`: share of a position's confidence that does not depend on the draft, 0 to 1."""
    max_anchors: int = semantic(512, positive())
    """Most blocks that an optimizer step trains on, drawn anew for every step."""

    def default_target_layer_ids(self, depth: int) -> list[int]:
        """`target_layers` ids at equal distances, from the output of layer 1 to that of layer `depth` - 3.

        A shallow target has fewer.
        """
        lowest = min(1, depth - 1)
        if self.target_layers == 1:
            return inputs_after([depth // 2])
        distance = (max(lowest, depth - 3) - lowest) / (self.target_layers - 1)
        return inputs_after(sorted({round(lowest + i * distance) for i in range(self.target_layers)}))

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        # An anchor that proposes a token itself adds one to the mask tokens' proposals.
        return cls(block_size=config["block_size"] + bool(config.get("sample_from_anchor")))

    @classmethod
    def is_native(cls, config: Mapping[str, Any]) -> bool:
        return "block_size" in config and any("DFlash" in name for name in config.get("architectures") or [])

    def needs_mask_token(self) -> bool:
        """See `mask_token_id`."""
        return self.mask_token_id is None

    def trained_tokens(self) -> int:
        return self.block_size - 1

    def max_tokens(self) -> int | None:
        """See `block_size`."""
        return self.block_size - 1

    def initializers(self) -> tuple[Init, ...]:
        return tuple(Init)

    def check(self) -> Iterator[tuple[bool, str, str]]:
        """Check that the loss yields a probability, which D-PACE needs."""
        yield from Speculator.check(self)
        yield (
            self.init is not Init.induction or self.num_layers > 1,
            f"speculator.init=induction: needs two layers, not speculator.num_layers={self.num_layers}",
            "speculator.num_layers=2",
        )
        yield (
            self.weighting is not Weighting.dpace or loss_weights(self.loss_fn) in ({Loss.ce: 1.0}, {Loss.nla: 1.0}),
            "speculator.weighting=dpace: needs a loss that is a negative log-probability, not "
            f"speculator.loss_fn={as_override(self.loss_fn)}",
            "speculator.loss_fn=ce, speculator.loss_fn=nla or speculator.weighting=decay",
        )


def inputs_after(outputs: list[int]) -> list[int]:
    """Convert layer ids from outputs to inputs: the output of layer i is the input of layer i + 1.

    This package, vLLM and upstream's package count inputs; DFlash's authors count outputs.
    """
    return [layer + 1 for layer in outputs]


def proposed_tokens(config: Mapping[str, Any]) -> int | None:
    """Tokens of a proposal that a config.json in the speculators format names; None if it names no number."""
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    tokens = methods[0].get("speculative_tokens")
    return tokens if isinstance(tokens, int) else None


SPECULATORS: dict[str, type[Speculator]] = {"eagle3": Eagle3, "dflash": DFlash}
"""Schemas by algorithm. A test checks that `drafts.DRAFTS` and `conf/speculator/` have the same names."""
SERVED_ONLY: dict[str, dict[str, Any]] = {
    "peagle": {"method": "eagle3", "parallel_drafting": True},
    "dflash2": {"method": "dflash"},
    "dspark": {"method": "dspark"},
}
"""Algorithms of the PyPI package speculators that vLLM serves and this package does not train: vLLM's speculative
config of each, but for draft and number of tokens."""
