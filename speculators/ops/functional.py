"""RMSNorm, rotary embedding, SiLU-gated multiplication and linear layer: one function each, for every device.

On a CPU, C++ kernels compute in one pass over memory what torch computes in several, where they compile; elsewhere
torch's operations do. Tensors are packed rows [..., width], without a batch dimension. `ops.reference` has the
formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speculators.ops import autograd, cpu
from speculators.ops.weights import rounded

ROW_MULTIPLE = 64
"""Rows of a bfloat16 or float16 matrix multiplication on a CPU are padded to a multiple of this."""


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, feeds_matmul: bool = False) -> Tensor:
    """Normalise rows to a root mean square of 1 and multiply by a weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    Computed in float32.

    Args:
        hidden_states: [..., H], any floating-point format.
        weight: float32 [H].
        eps: added to the mean square.
        feeds_matmul: the output feeds matrix multiplications only, so it may have their dtype.

    Returns: [..., H], float32; autocast's dtype if `feeds_matmul`, under CPU autocast, with the C++ kernels.
    """
    if kernels := cpu.kernels(hidden_states, weight):
        short = feeds_matmul and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if short else torch.float32
        out: Tensor = autograd.RMSNormFunction.apply(kernels, hidden_states.contiguous(), weight, eps, dtype)
        return out
    return nn.functional.rms_norm(hidden_states.float(), (hidden_states.shape[-1],), weight, eps)


def rotate_half(x: Tensor) -> Tensor:
    """Swap the halves of the last dimension and negate the new first half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their position (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: [..., heads, D], any floating-point format.
        cos: float32 [..., 1, D], both halves equal.
        sin: as `cos`.

    Returns: float32, of x's shape.
    """
    if kernels := cpu.kernels(x, cos):
        out: Tensor = autograd.RotaryFunction.apply(kernels, x.contiguous(), cos.contiguous(), sin.contiguous())
        return out
    return x * cos + rotate_half(x) * sin


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up for two tensors of one shape and format (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""
    if kernels := cpu.kernels(gate, up):
        out: Tensor = autograd.SiluMulFunction.apply(kernels, gate, up)
        return out
    return nn.functional.silu(gate) * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight.T, in autocast's dtype where autocast is enabled: [..., W] and [V, W] -> [..., V].

    Under CPU autocast, the copy of the weight in that dtype is cached until the weight changes (`weights.rounded`). Its
    gradient is computed in that dtype, and cast to the weight's unless `weights.keep_grad_dtype` was called.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    dtype = torch.get_autocast_dtype("cpu")
    out: Tensor = autograd.RoundedLinearFunction.apply(padded_rows(rows, dtype), weight, rounded(weight, dtype))
    return (out if len(out) == len(rows) else out[: len(rows)]).unflatten(0, x.shape[:-1])


def padded_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert rows [n, W] to `dtype`, and append rows of zeros up to a multiple of `ROW_MULTIPLE` where that is faster.

    On a CPU, oneDNN compiles a bfloat16 or float16 kernel for each number of rows, which takes longer than most of the
    multiplications, and the number changes nearly every step.
    """
    count, padding = len(x), -len(x) % ROW_MULTIPLE
    if not padding or x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    out = x.new_empty(count + padding, *x.shape[1:], dtype=dtype)
    out[:count] = x
    out[count:] = 0.0
    return out
