"""The interface of every draft model: construction, forward pass on a packed batch, and checkpoint.

A draft turns a `PackedBatch` into `Predictions`: hidden states for the LM head, and for each the index in the batch
of the position whose target distribution it should match. It does not compute losses: those need the LM head and the
target's last hidden states, take most of the time, and are the same for all algorithms (`training.losses`).

A draft is made by `from_target` or `from_checkpoint`. What varies during training reaches it as a `TrainState`.

The checkpoint is a directory with `config.json` and `model.safetensors` in the speculators format, which vLLM and
upstream's `speculators` package load unchanged.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speculators.config.algorithms import SPECULATORS, Speculator
from speculators.drafts.layers import MLP, Frozen, Trained, init_linear_weights
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch

EMBEDDINGS, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
TARGET_MATRICES = {EMBEDDINGS, LM_HEAD}
"""Tensors that a draft takes over from its target."""
FORMAT_VERSION = "0.9.0"
"""Release of upstream's package whose format is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetParts:
    """What a draft takes over from its target."""

    name: str
    """Hub id or absolute path. The checkpoint's config has it, by which vLLM and upstream load the target."""
    architectures: list[str]
    config: Mapping[str, Any]
    """The target's text config, with its defaults."""
    rope_parameters: Mapping[str, Any]
    """Parameters of rotary embeddings over whole heads."""
    embeddings: Tensor
    """[V, H], stored dtype."""
    head: Tensor
    """[Vd, H], stored dtype: the LM head's rows of the draft vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The draft vocabulary: which of the target's V tokens a draft can propose."""

    d2t: Tensor
    """int64 [Vd]: target token id = index + d2t[index]."""
    t2d: Tensor
    """bool [V]: the target's token is in the draft vocabulary."""

    @property
    def tokens(self) -> Tensor:
        """The target's token ids, ascending, int64 [Vd]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @property
    def reduced(self) -> bool:
        """Whether any token of the target is missing."""
        return len(self.d2t) != len(self.t2d)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """How far training is. What an algorithm varies or draws per step follows from this alone, so that a run that was
    killed continues with the same values."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    seed: int
    """`train.seed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Proposals of K tokens from each of R source positions."""

    hidden_states: Tensor
    """float [K, R, H]: the LM head's input."""
    target_index: Tensor
    """int64 [K, R]: index in the batch of the position whose target distribution the prediction should match."""
    valid: Tensor
    """bool [K, R]: there is such a position, and it is supervised."""
    weight: Tensor
    """float32 [K, R]: share of each prediction in the loss; 0 where not valid."""
    count: Tensor | None = None
    """float32 [K]: number of supervised predictions that the weights are shares of, at least 1; None if the weights are
    no shares."""
    reweight: Callable[[Tensor], Tensor] | None = None
    """Computes the weights [K, R] from the losses of the predictions [K, R] (0 where not valid), which it takes as
    constants; `weight` is ignored then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """What the packed batches of one optimizer step have in common."""

    counts: Tensor
    """float32 [K]: supervised predictions of each draft step in all of them, at least 1."""
    source_mask: Tensor
    """bool [T]: positions that predictions may start from."""


class Draft(nn.Module, ABC):
    """A draft model. `embed_tokens`, `lm_head` and the vocabulary are the target's; everything else is trained.

    Either matrix can be the draft's own copy, which is then trained and stored in the checkpoint.

    Args:
        config: the checkpoint's config.json.
        options: the recipe's `speculator` section.
        embeddings: [V, H], any dtype.
        head: [Vd, H], any dtype.
        vocabulary: which tokens the rows of `head` are.
        stored: names of `TARGET_MATRICES` that the checkpoint holds although they are not trained.
    """

    embed_tokens: Frozen | Trained
    """[V, H]: the target's, stored dtype, or the draft's own, float32."""
    lm_head: Frozen | Trained
    """[Vd, H] float32: the target's rows of the draft vocabulary, or the draft's own."""
    layers: nn.ModuleList
    """Decoder layers."""

    algorithm: ClassVar[str]
    """Name in `DRAFTS`, and `speculators_model_type` in the checkpoint."""
    architecture: ClassVar[str]
    """Upstream's class name of the same model."""

    def __init__(
        self, config: Mapping[str, Any], options: Speculator, embeddings: Tensor, head: Tensor,
        vocabulary: Vocabulary, stored: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.options, self.vocabulary = dict(config), options, vocabulary
        self.embed_tokens = Trained(embeddings) if options.embed_requires_grad else Frozen(embeddings)
        self.lm_head = Trained(head) if options.train_lm_head else Frozen(head.float())
        trained = {EMBEDDINGS: options.embed_requires_grad, LM_HEAD: options.train_lm_head}
        self.own_matrices = stored | {name for name, is_trained in trained.items() if is_trained}

    @classmethod
    @abstractmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        """The algorithm's own fields of config.json, `transformer_layer_config` among them."""

    @abstractmethod
    def forward(self, batch: PackedBatch, state: TrainState | None = None) -> Predictions:
        """Predict from the batch's supervised positions.

        Args:
            batch: rows, one after the other.
            state: None in validation and inference, where every draft step and every source position is computed.
        """

    @abstractmethod
    def supervision(self, batch: PackedBatch, state: TrainState | None = None) -> Supervision:
        """The supervision of one optimizer step, from all its rows in one batch, whose hidden states are not read."""

    def omitted_tensors(self) -> set[str]:
        """Tensors that the checkpoint does not hold, because its readers take them from the target."""
        return set()

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Buffers by name that an initialiser has set from data and that no step changes. The checkpoint does not hold
        them; `folded` merges them into its weights."""
        return {}

    def folded(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with which a draft without `fitted_tensors` computes the same."""
        return weights

    def enable_activation_checkpointing(self) -> None:
        """Recompute the MLPs' activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, MLP):
                module.activation_checkpointing = True

    @classmethod
    def from_target(
        cls, parts: TargetParts, options: Speculator, vocabulary: Vocabulary, layer_ids: list[int], seed: int
    ) -> Self:
        """A draft for a target, its weights drawn at random."""
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": options.trained_tokens(),
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
        draft = cls(config, options, parts.embeddings, parts.head, vocabulary)
        std = config.get("transformer_layer_config", {}).get("initializer_range", 0.02)
        init_linear_weights(draft, std, torch.Generator().manual_seed(seed))
        return draft

    def save(self, directory: Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint, floating-point tensors as `dtype`. The same draft gives the same bytes.

        `weights`, by name, replace the draft's own, of which a rank may hold a shard only.
        """
        directory.mkdir(parents=True, exist_ok=True)
        state_dict = self.folded(self.state_dict() | dict(weights or {}))
        omitted = self.omitted_tensors()
        tensors = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in state_dict.items()
            if name not in omitted
        }
        if self.vocabulary.reduced:
            tensors |= {"d2t": self.vocabulary.d2t.cpu(), "t2d": self.vocabulary.t2d.cpu()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "dtype": str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_checkpoint(
        cls, directory: Path, embeddings: Tensor | None = None, head: Tensor | None = None,
        options: Speculator | None = None,
    ) -> Self:  # fmt: skip
        """Read a checkpoint, ours or upstream's.

        Args:
            directory: with `config.json` and `model.safetensors`.
            embeddings: the target's [V, H], for a checkpoint without them.
            head: the target's rows of the draft vocabulary [Vd, H], for a checkpoint without them.
            options: to continue training with; those `of_checkpoint` if None.

        Raises:
            ContractError: the checkpoint is of another algorithm, or its tensors do not fit its config.
        """
        config = json.loads((directory / "config.json").read_text())
        algorithm = config.get("speculators_model_type")
        if algorithm != cls.algorithm:
            raise ContractError(
                f"{directory} holds a draft of algorithm `{algorithm}`, not `{cls.algorithm}`",
                "name the checkpoint's own algorithm",
            )
        with safe_open(directory / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        stored = frozenset(TARGET_MATRICES & set(tensors))
        for name, matrix in ((EMBEDDINGS, embeddings), (LM_HEAD, head)):
            if name not in tensors and matrix is not None:
                tensors[name] = matrix
            if name not in tensors:
                raise ContractError(f"{directory} does not hold {name}", "pass it from the draft's target")
        vocab_size = len(tensors[EMBEDDINGS])
        vocabulary = Vocabulary(
            d2t=tensors.pop("d2t", torch.zeros(vocab_size, dtype=torch.int64)),
            t2d=tensors.pop("t2d", torch.ones(vocab_size, dtype=torch.bool)),
        )
        options = options or SPECULATORS[cls.algorithm].of_checkpoint(config)
        draft = cls(config, options, tensors[EMBEDDINGS], tensors[LM_HEAD], vocabulary, stored)
        keys = draft.load_state_dict(tensors, strict=False)
        if keys.missing_keys or keys.unexpected_keys:
            raise ContractError(
                f"{directory} lacks the tensors {keys.missing_keys} and has the unknown {keys.unexpected_keys}",
                "config.json and model.safetensors have to be of one draft",
            )
        return draft


def hash_to_int(label: str) -> int:
    """A pseudo-random integer of 56 bits that depends on the label alone."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")


HEAD_WIDTH, POSITIONS = 128, 32768
"""Shape of a draft's layers where the target has none: a state-space model has neither heads nor a last position."""


def layer_config(parts: TargetParts, options: Speculator, model_type: str = "llama") -> dict[str, Any]:
    """`transformer_layer_config` of Llama or Qwen3 layers with full attention, in the target's shape where the options
    name no other."""
    target = parts.config
    heads = int(target.get("num_attention_heads") or max(1, target["hidden_size"] // HEAD_WIDTH))
    groups = options.num_key_value_heads or target.get("num_key_value_heads") or heads
    # A target with experts has no single MLP width.
    is_dense = not any(target.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    mlp_width = (target.get("intermediate_size") if is_dense else None) or 3 * target["hidden_size"]
    return {
        "model_type": model_type,
        "hidden_size": target["hidden_size"],
        "intermediate_size": options.intermediate_size or mlp_width,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads or heads,
        "num_key_value_heads": groups,
        "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": target.get("rms_norm_eps") or 1e-6,
        "initializer_range": target.get("initializer_range") or 0.02,
        "max_position_embeddings": target.get("max_position_embeddings") or POSITIONS,
        "rope_parameters": dict(parts.rope_parameters),
        "vocab_size": target["vocab_size"],
        "layer_types": ["full_attention"] * options.num_layers,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if model_type == "llama" else {}),
        "tie_word_embeddings": False,
    }
