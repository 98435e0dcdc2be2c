"""Building blocks that several drafts share: norm, rotary positions, attention over unrolled steps, MLP.

All of it works on packed rows, [tokens, width], without a batch dimension. Attention follows the documents of the
pack: it computes scores within each document only, block of queries by block, and no mask over the whole pack exists.

Shapes: T tokens of the pack; R rows that ask (queries), R <= T; H width; G key-value heads; Q query heads; D head
width; L queries of a block; S keys that the block sees; K unrolled steps so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speculators.errors import ContractError

QUERY_BLOCK = 256
"""Queries whose scores exist at one time; keys after the block's last query are not computed at all."""


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
    def from_plain(cls, plain: Mapping[str, Any]) -> LayerConfig:
        """Take what a layer needs out of `transformer_layer_config`, whatever else stands there."""
        return cls(**{name: plain[name] for name in cls.__slots__})


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of any dtype -> the same shape in float32."""
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class Frozen(nn.Module):
    """A matrix of the target that a draft carries but does not train; `state_dict` names it like a layer's weight."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), the two halves of a head rotated against each other."""

    frequencies: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        frequencies, self.scale = _frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 [R] -> cosine and sine, each [R, 1, D]."""
        angles = positions.float()[:, None] * self.frequencies[None, :]
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
    plain = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](plain, torch.device("cpu"))
    return frequencies.float(), float(scale)


def rotate(x: Tensor, cosine_sine: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [R, heads, D] by their position."""
    cosine, sine = cosine_sine
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cosine + turned * sine


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of one document that are computed together."""

    queries: slice
    """Their places among the rows that ask."""
    keys: slice
    """The document's tokens up to the last of them, as places in the pack."""
    future: Tensor
    """bool [L, S]: key comes after query."""


def causal_blocks(documents: Sequence[tuple[int, int]], asking: Tensor) -> list[Block]:
    """Cut the queries of a pack into blocks.

    Args:
        documents: (first token, length) of each document in the pack, in order.
        asking: ascending places in the pack of the rows that ask, int64 [R].
    """
    blocks = []
    bounds = torch.tensor([start + length for start, length in documents], device=asking.device)
    ends = torch.searchsorted(asking, bounds).tolist()
    first = 0
    for (start, _), end in zip(documents, ends, strict=True):
        for begin in range(first, end, QUERY_BLOCK):
            places = asking[begin : min(begin + QUERY_BLOCK, end)]
            keys = slice(start, int(places[-1]) + 1)
            order = torch.arange(keys.start, keys.stop, device=asking.device)
            blocks.append(Block(slice(begin, begin + len(places)), keys, order[None, :] > places[:, None]))
        first = end
    return blocks


@dataclass(slots=True)
class KeyValues:
    """What one layer's queries may see: every token of step 0, and of each later step the query's own place."""

    keys: Tensor
    """[T, G, D]"""
    values: Tensor
    """[T, G, D]"""
    own: list[tuple[Tensor, Tensor]]
    """Keys and values of steps 1, 2, ..., each [R, G, D]."""


def unrolled_attention(q: Tensor, cache: KeyValues, blocks: Sequence[Block]) -> Tensor:
    """Causal attention inside documents over step 0, plus each query's own entries of the later steps.

    Args:
        q: queries [R, Q, D], rotated.
        cache: the layer's keys (rotated) and values.
        blocks: of the same R rows.

    Returns: [R, Q * D].
    """
    _, heads, width = q.shape
    groups = cache.keys.shape[1]
    scaled = q * (1.0 / math.sqrt(width))
    keys, values = cache.keys.transpose(0, 1), cache.values.transpose(0, 1)  # [G, T, D]
    out = []
    for block in blocks:
        length, seen = block.future.shape
        # Query heads of one group become rows of one product with the group's keys.
        asked = scaled[block.queries].view(length, groups, heads // groups, width).permute(1, 2, 0, 3)
        rows = asked.reshape(groups, -1, width)
        scores = (rows @ keys[:, block.keys].transpose(1, 2)).view(groups, -1, length, seen)
        scores = scores.masked_fill(block.future, float("-inf"))
        own_k = [k[block.queries].transpose(0, 1)[:, None] for k, _ in cache.own]  # [G, 1, L, D]
        own_scores = [(asked * k).sum(-1, keepdim=True) for k in own_k]
        shares = torch.cat([scores, *own_scores], dim=-1).float().softmax(-1).to(values.dtype)
        mixed = shares[..., :seen].reshape(groups, -1, seen) @ values[:, block.keys]
        mixed = mixed.view(groups, -1, length, width)
        for step, (_, v) in enumerate(cache.own):
            mixed = mixed + shares[..., seen + step, None] * v[block.queries].transpose(0, 1)[:, None]
        out.append(mixed.permute(2, 0, 1, 3).reshape(length, heads * width))
    return torch.cat(out) if out else q.new_zeros(0, heads * width)


class Attention(nn.Module):
    """Projections around `unrolled_attention`; `width_in` is the layer's width, or more for a concatenation."""

    def __init__(self, config: LayerConfig, width_in: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width_in, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width_in, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width_in, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Project [R, width_in] and split into heads [R, heads, D]."""
        return projection(x).view(x.shape[0], -1, self.head_dim)


class MLP(nn.Module):
    """Gated feed-forward layer with SiLU."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every linear layer's weight from a normal distribution, in the order in which the modules were made."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std, generator=generator)
