"""What every draft is: built from a target, called on packs, written and read as a speculators checkpoint.

A draft turns a `PackedBatch` into `Predictions`: rows that go through the head, and for each the place in the pack
whose target distribution it should match. It knows nothing of losses: those need the head and the target's last states,
take most of the time, and are the same for all algorithms (`training.losses`).

The checkpoint is a directory with `config.json` and `model.safetensors` in the speculators format, which vLLM and
upstream's `speculators` package load as it is.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speculators.config.algorithms import Loss, Speculator, loss_weights
from speculators.drafts.layers import Frozen, Trained
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch

TARGETS = {"embed_tokens.weight", "lm_head.weight"}
"""Tensors that a draft takes over from its target."""
FORMAT_VERSION = "0.9.0"
"""Release of upstream's package whose format is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetParts:
    """What a draft takes over from its target."""

    name: str
    """What the target calls itself; a label, nothing is loaded from it here."""
    architectures: list[str]
    config: Mapping[str, Any]
    """The target's text config, defaults filled in."""
    rope_parameters: Mapping[str, Any]
    """Rotary positions for whole heads."""
    embeddings: Tensor
    """[V, H], stored dtype."""
    head: Tensor
    """[Vd, H]: the head's rows of the draft's vocabulary, stored dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Which of the target's V tokens a draft can propose."""

    d2t: Tensor
    """int64 [Vd]: token of the target = index + d2t[index]."""
    t2d: Tensor
    """bool [V]: the target's token is in the draft's vocabulary."""

    @property
    def tokens(self) -> Tensor:
        """The target's tokens, ascending, int64 [Vd]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @property
    def reduced(self) -> bool:
        """Whether any token of the target is missing."""
        return len(self.d2t) != len(self.t2d)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Proposals of K tokens from each of R places."""

    hidden: Tensor
    """float [K, R, H]: what goes into the head."""
    target: Tensor
    """int64 [K, R]: place in the pack whose target distribution the prediction should match."""
    valid: Tensor
    """bool [K, R]: there is such a place, and it is supervised."""
    weight: Tensor
    """float32 [K, R]: share of each prediction in the loss; 0 where it is not valid."""
    count: Tensor | None = None
    """float32 [K]: supervised predictions of which the weights are shares, at least 1; None: they are no shares."""
    reweigh: Callable[[Tensor], Tensor] | None = None
    """Where the weights follow from the losses themselves, taken as constants: loss of each prediction [K, R], 0 where
    it is not valid, -> weights [K, R]. `weight` is not looked at then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """What the packs that one step of the optimiser is split into have in common."""

    counts: Tensor
    """float32 [K]: supervised predictions of each step over all of them, at least 1."""
    chosen: Tensor
    """bool [T]: places that are trained from."""


class Draft(nn.Module, ABC):
    """A draft model: `embed_tokens`, `lm_head` and the vocabulary are the target's, the rest is trained.

    Of the two matrices the draft may have copies of its own, which are trained too; they are in the checkpoint then.
    """

    embed_tokens: Frozen | Trained
    """[V, H]: the target's, stored dtype, or the draft's own, float32."""
    lm_head: Frozen | Trained
    """[Vd, H] float32: the target's rows of the draft's vocabulary, or the draft's own."""

    algorithm: ClassVar[str]
    """Name in `DRAFTS` and `speculators_model_type` in the checkpoint."""
    architecture: ClassVar[str]
    """Class name that upstream gives the same model."""

    def __init__(self, config: Mapping[str, Any], embeddings: Tensor, head: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = dict(config)
        self.embed_tokens = Frozen(embeddings)
        self.lm_head = Frozen(head.float())
        self.own: set[str] = set()
        """Of `embed_tokens.weight` and `lm_head.weight`, those that are not the target's."""
        self.vocabulary = vocabulary
        self.measured: dict[str, Tensor] = {}
        """What `prepare` has found, which no step changes and `folded` takes into the weights of the checkpoint."""
        self.regression = 0.0
        """Weight of the distance between what enters this head and the target's; no part of the checkpoint either."""
        self.loss = {Loss.kl: 1.0}
        """What is asked of a prediction, with weights; part of the training, not of the checkpoint."""

    @classmethod
    @abstractmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        """The algorithm's own fields of config.json, `transformer_layer_config` among them."""

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Draw the trained weights."""

    def prepare(self, packs: Iterable[PackedBatch], seed: int) -> None:
        """Fit what was drawn to the target's states, before the first step. Most algorithms have nothing to fit."""
        return

    def folded(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a draft that computes the same, and knows nothing of `measured`."""
        return weights

    def advance(self, step: int, total: int) -> None:
        """Say which step comes next, from 0; `total` where the training is over, and for every validation.

        What an algorithm changes on the way or draws anew in each step, it takes from here: never from what it has
        seen, so that a run that was killed goes on as it would have.
        """
        return

    @abstractmethod
    def configure(self, options: Speculator) -> None:
        """Take over the options of training that are no part of the checkpoint."""

    @abstractmethod
    def forward(self, pack: PackedBatch) -> Predictions:
        """Predict from every place of the pack that supervision asks for."""

    @abstractmethod
    def supervision(self, whole: PackedBatch) -> Supervision:
        """What is supervised in all packs of one step together. Their states are not read, and may be empty."""

    def left_out(self) -> set[str]:
        """Tensors that the checkpoint does not hold: whoever loads it takes them from the target."""
        return set()

    @classmethod
    def build(
        cls, parts: TargetParts, options: Speculator, vocabulary: Vocabulary, layer_ids: list[int], seed: int
    ) -> Self:
        """A fresh draft for a target."""
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": options.num_speculative_tokens,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        config = {
            "architectures": [cls.architecture],
            "speculators_model_type": cls.algorithm,
            "speculators_version": FORMAT_VERSION,
            "speculators_config": {
                "algorithm": cls.algorithm,
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": parts.name, "architectures": parts.architectures},
            },
            "draft_vocab_size": len(vocabulary.d2t),
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            **cls.describe(parts, options, layer_ids),
        }
        draft = cls(config, parts.embeddings, parts.head, vocabulary)
        if options.embed_requires_grad:
            draft.embed_tokens = Trained(parts.embeddings)
            draft.own.add("embed_tokens.weight")
        if options.train_lm_head:
            draft.lm_head = Trained(parts.head)
            draft.own.add("lm_head.weight")
        draft.loss, draft.regression = loss_weights(options.loss_fn), options.hidden_loss_weight
        draft.initialise(seed)
        draft.configure(options)
        return draft

    def save(self, directory: Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint; floating-point tensors as `dtype`. The same draft gives the same bytes.

        `weights`, by name, take the place of the draft's own, which may be there in part only.
        """
        directory.mkdir(parents=True, exist_ok=True)
        own = self.folded(self.state_dict() | dict(weights or {}))
        kept = {name: value for name, value in own.items() if name not in self.left_out()}
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in kept.items()}
        if self.vocabulary.reduced:
            tensors |= {"d2t": self.vocabulary.d2t.cpu(), "t2d": self.vocabulary.t2d.cpu()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "dtype": str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, directory: Path, embeddings: Tensor | None = None, head: Tensor | None = None) -> Self:
        """Read a checkpoint, ours or upstream's, for training on or for computing with it.

        Args:
            directory: with `config.json` and `model.safetensors`.
            embeddings: the target's [V, H], for a checkpoint without.
            head: the target's rows of the draft's vocabulary [Vd, H], for a checkpoint without.

        Raises:
            ContractError: it is of another algorithm, or its tensors are not those that its config asks for.
        """
        config = json.loads((directory / "config.json").read_text())
        kind = config.get("speculators_model_type")
        if kind != cls.algorithm:
            raise ContractError(
                f"{directory} holds a draft of the kind `{kind}`, not `{cls.algorithm}`",
                "name the checkpoint's own algorithm",
            )
        with safe_open(directory / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        own = TARGETS & set(tensors)
        for name, given in (("embed_tokens.weight", embeddings), ("lm_head.weight", head)):
            if name not in tensors and given is not None:
                tensors[name] = given
            if name not in tensors:
                hint = "give it from the target that the draft was trained for"
                raise ContractError(f"{directory} does not hold {name}", hint)
        embeddings, head = tensors["embed_tokens.weight"], tensors["lm_head.weight"]
        size = len(embeddings)
        vocabulary = Vocabulary(
            d2t=tensors.pop("d2t", torch.zeros(size, dtype=torch.int64)),
            t2d=tensors.pop("t2d", torch.ones(size, dtype=torch.bool)),
        )
        draft = cls(config, embeddings, head, vocabulary)
        draft.own = own
        trouble = draft.load_state_dict(tensors, strict=False)
        if trouble.missing_keys or trouble.unexpected_keys:
            raise ContractError(
                f"{directory} lacks {trouble.missing_keys} and has {trouble.unexpected_keys} too many",
                "config.json and model.safetensors have to be of one draft",
            )
        return draft


def draw(what: str) -> int:
    """A number of 56 bits that depends on these words alone, and looks random."""
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")


def layer_config(parts: TargetParts, options: Speculator, model_type: str = "llama") -> dict[str, Any]:
    """`transformer_layer_config` of Llama or Qwen3 layers with full attention: the target's shape, or what is asked."""
    target = parts.config
    heads = int(target["num_attention_heads"])
    groups = options.num_key_value_heads or target.get("num_key_value_heads") or heads
    # A target with experts has no single MLP width.
    dense = not any(target.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    inside = target["intermediate_size"] if dense else 3 * target["hidden_size"]
    return {
        "model_type": model_type,
        "hidden_size": target["hidden_size"],
        "intermediate_size": options.intermediate_size or inside,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads or heads,
        "num_key_value_heads": groups,
        "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": target.get("rms_norm_eps") or 1e-6,
        "initializer_range": target.get("initializer_range") or 0.02,
        "max_position_embeddings": target["max_position_embeddings"],
        "rope_parameters": dict(parts.rope_parameters),
        "vocab_size": target["vocab_size"],
        "layer_types": ["full_attention"] * options.num_layers,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if model_type == "llama" else {}),
        "tie_word_embeddings": False,
    }
