"""Modules that several drafts share: RMSNorm, linear layer, rotary embedding, attention projections, MLP.

All of them work on packed rows, [tokens, width], without a batch dimension, and compute by the functions of `ops`.

Shapes: R rows; H width; G key-value heads; Q query heads; D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speculators.errors import ContractError
from speculators.ops import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """One decoder layer, as `transformer_layer_config` of a checkpoint describes it."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    initializer_range: float
    rope_parameters: Mapping[str, Any]
    max_position_embeddings: int

    @classmethod
    def from_dict(cls, layer_config: Mapping[str, Any]) -> LayerConfig:
        """Take what a layer needs out of `transformer_layer_config`, whatever else stands there."""
        return cls(**{name: layer_config[name] for name in cls.__slots__})


class RMSNorm(nn.Module):
    """Root-mean-square norm; `feeds_matmul` as in `functional.rms_norm`."""

    def __init__(self, width: int, eps: float, feeds_matmul: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.feeds_matmul = eps, feeds_matmul

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., width] of any format -> the same shape, float32 unless the output feeds matrix products only."""
        return functional.rms_norm(hidden_states, self.weight, self.eps, self.feeds_matmul)


class Linear(nn.Linear):
    """Linear layer without bias, computed by `functional.linear`."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] -> [..., width_out]."""
        return functional.linear(x, self.weight)


class Frozen(nn.Module):
    """A matrix of the target that a draft carries but does not train; `state_dict` names it like a layer's weight."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class Trained(nn.Module):
    """The draft's own copy of a matrix of the target, float32, that is trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))


class Rotary(nn.Module):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864): cosines and sines for `functional.apply_rotary`."""

    frequencies: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        frequencies, self.scale = _frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 [R] -> cos and sin, each float32 [R, 1, D]."""
        angles = position_ids.float()[:, None] * self.frequencies[None, :]
        angles = torch.cat([angles, angles], dim=-1)[:, None, :]
        return angles.cos() * self.scale, angles.sin() * self.scale


def _frequencies(config: LayerConfig) -> tuple[Tensor, float]:
    rope = dict(config.rope_parameters)
    kind, theta, width = rope.get("rope_type", "default"), float(rope["rope_theta"]), config.head_dim
    if kind == "default":
        exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        return 1.0 / theta**exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise ContractError(
            f"rope_type `{kind}` is not known", f"there is: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    llama_config = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](llama_config, torch.device("cpu"))
    return frequencies.float(), float(scale)


class Attention(nn.Module):
    """Projections of an attention layer; `width_in` is the layer's width, or more for a concatenation.

    With `head_norm`, an RMSNorm is applied to queries and keys, head by head, before they are rotated, as in Qwen3.
    """

    def __init__(self, config: LayerConfig, width_in: int, head_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(width_in, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(width_in, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(width_in, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if head_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if head_norm else None

    def heads(self, projection: nn.Linear, hidden_states: Tensor) -> Tensor:
        """Project [..., width_in] and split into heads [..., heads, D]."""
        return projection(hidden_states).unflatten(-1, (-1, self.head_dim))

    def queries(self, hidden_states: Tensor) -> Tensor:
        """Query states of rows [..., width_in], not rotated yet [..., Q, D]."""
        query_states = self.heads(self.q_proj, hidden_states)
        return query_states if self.q_norm is None else self.q_norm(query_states)

    def keys(self, hidden_states: Tensor) -> Tensor:
        """Key states of rows [..., width_in], not rotated yet [..., G, D]."""
        key_states = self.heads(self.k_proj, hidden_states)
        return key_states if self.k_norm is None else self.k_norm(key_states)

    def values(self, hidden_states: Tensor) -> Tensor:
        """Value states of rows [..., width_in]: [..., G, D]."""
        return self.heads(self.v_proj, hidden_states)


class MLP(nn.Module):
    """SiLU-gated MLP: down_proj(silu(gate_proj(x)) * up_proj(x)).

    With `activation_checkpointing`, its activations are computed again in the backward pass instead of being kept.
    """

    activation_checkpointing = False

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        if not self.activation_checkpointing:
            return self._compute(hidden_states)
        out: Tensor = checkpoint(self._compute, hidden_states, use_reentrant=False)
        return out

    def _compute(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        out: Tensor = self.down_proj(functional.silu_mul(gate, up))
        return out


def init_linear_weights(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every linear layer's weight from a normal distribution, in the order in which the layers were registered."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Linear):
            nn.init.normal_(submodule.weight, std=std, generator=generator)
