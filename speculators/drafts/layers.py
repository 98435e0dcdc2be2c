"""Building blocks that several drafts share: norm, rotary positions, products, MLP.

All of it works on packed rows, [tokens, width], without a batch dimension. On a CPU, `ops.cpu` does in one pass what
torch would do in several.

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
from speculators.ops import cpu
from speculators.ops.cpu import Kernels

ROWS = 64
"""Of a product in a short format on a CPU, the number of rows is a multiple of this."""


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
    """Root-mean-square norm, computed in float32.

    With `for_products`, what it gives goes into products alone, and has their format where native loops make it.
    """

    def __init__(self, width: int, eps: float, for_products: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.for_products = eps, for_products

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of any dtype -> the same shape, in float32 or for products."""
        if loops := cpu.kernels(x, self.weight):
            short = self.for_products and torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if short else torch.float32
            out: Tensor = _Norm.apply(loops, x.contiguous(), self.weight, self.eps, dtype)
            return out
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loops: Kernels, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, inverse = loops.norm(x, weight, eps, dtype)
        ctx.loops = loops
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight = ctx.loops.norm_slopes(slopes[0].contiguous(), *ctx.saved_tensors)
        return None, of_x, of_weight, None, None


def whole_blocks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [n, W] as `dtype`, and behind them rows of zeros up to a multiple of `ROWS` where that is faster.

    On a CPU, oneDNN makes products in short formats, and compiles each for every number of rows that it has not met
    before, which takes longer than most of them. Hardly two steps have the same number.
    """
    count, short = len(x), -len(x) % ROWS
    if not short or x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    out = x.new_empty(count + short, *x.shape[1:], dtype=dtype)
    out[:count] = x
    out[count:] = 0.0
    return out


class Linear(nn.Linear):
    """A product with a matrix, nothing added; see `whole_blocks`.

    On a CPU the matrix is rounded for products in a short format once for every value that it takes (`rounded`). Its
    gradient is made in that format, and kept in it where `weight.grad_dtype` says so.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] -> [..., width_out], in the format that products are to have."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        dtype = torch.get_autocast_dtype("cpu")
        out: Tensor = _Product.apply(whole_blocks(rows, dtype), self.weight, cpu.rounded(self.weight, dtype))
        return (out if len(out) == len(rows) else out[: len(rows)]).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """Rows [n, W] @ matrix.T, which is there in their format too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(rows, rounded)
        return rows @ rounded.T

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,), (rows, rounded) = slopes, ctx.saved_tensors
        of_rows, of_matrix, _ = ctx.needs_input_grad
        return slope @ rounded if of_rows else None, slope.T @ rows if of_matrix else None, None


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
    """Rotate heads [..., heads, D] by their position; cosine and sine are [..., 1, D]. Gives float32."""
    cosine, sine = cosine_sine
    if loops := cpu.kernels(x, cosine):
        out: Tensor = _Rotated.apply(loops, x.contiguous(), cosine.contiguous(), sine.contiguous())
        return out
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loops: Kernels, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.loops, ctx.dtype = loops, x.dtype
        ctx.save_for_backward(cosine, sine)
        return loops.rotate(x, cosine, sine, torch.float32)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return None, ctx.loops.rotate(slopes[0].contiguous(), cosine, -sine, ctx.dtype), None, None


class Attention(nn.Module):
    """Projections around attention; `width_in` is the layer's width, or more for a concatenation.

    With `head_norm`, queries and keys are normed head by head before they are rotated, as in Qwen3.
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

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Project [..., width_in] and split into heads [..., heads, D]."""
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor) -> Tensor:
        """Queries of rows [..., width_in], not rotated yet [..., Q, D]."""
        found = self.heads(self.q_proj, x)
        return found if self.q_norm is None else self.q_norm(found)

    def keys(self, x: Tensor) -> Tensor:
        """Keys of rows [..., width_in], not rotated yet [..., G, D]."""
        found = self.heads(self.k_proj, x)
        return found if self.k_norm is None else self.k_norm(found)

    def values(self, x: Tensor) -> Tensor:
        """Values of rows [..., width_in]: [..., G, D]."""
        return self.heads(self.v_proj, x)


class MLP(nn.Module):
    """Gated feed-forward layer with SiLU.

    With `recompute`, what is inside, several times as wide as the layer, is not kept for the backward pass.
    """

    recompute = False

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        out: Tensor = checkpoint(self._inside, x, use_reentrant=False) if self.recompute else self._inside(x)
        return out

    def _inside(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        loops = cpu.kernels(gate, up)
        out: Tensor = self.down_proj(_Gated.apply(loops, gate, up) if loops else nn.functional.silu(gate) * up)
        return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loops: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, ctx.loops = gate.contiguous(), up.contiguous(), loops
        ctx.save_for_backward(gate, up)
        return loops.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.loops.gated_slopes(slopes[0].contiguous(), *ctx.saved_tensors)


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every linear layer's weight from a normal distribution, in the order in which the modules were made."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std, generator=generator)
