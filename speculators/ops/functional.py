"""RMSNorm, rotary embedding, SiLU-gated product and linear layer, each as one function for every device.

On a CPU, `autograd` and `cpu` compute in one pass over memory what torch computes in several; elsewhere torch's own
operations do. Tensors are packed rows [..., width], without a batch dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speculators.ops import autograd, cpu
from speculators.ops.weights import rounded

ROW_MULTIPLE = 64
"""Rows of a bfloat16 or float16 matrix product on a CPU are padded to a multiple of this."""


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, feeds_matmul: bool = False) -> Tensor:
    """Normalise rows to a root mean square of 1 and multiply by a weight; computed in float32.

    Args:
        hidden_states: [..., H], any floating-point format.
        weight: float32 [H].
        eps: added to the mean square.
        feeds_matmul: the output feeds matrix products only, so under CPU autocast it may have their format.

    Returns: [..., H], float32 unless `feeds_matmul`.
    """
    if kernels := cpu.kernels(hidden_states, weight):
        short = feeds_matmul and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if short else torch.float32
        out: Tensor = autograd.RMSNorm.apply(kernels, hidden_states.contiguous(), weight, eps, dtype)
        return out
    return nn.functional.rms_norm(hidden_states.float(), (hidden_states.shape[-1],), weight, eps)


def rotate_half(x: Tensor) -> Tensor:
    """Swap the halves of the last dimension and negate the new first half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate query or key states [..., heads, D] by their position (Su et al. 2021, arXiv:2104.09864).

    Args:
        states: any floating-point format.
        cos: float32 [..., 1, D], both halves equal.
        sin: as `cos`.

    Returns: float32, of the states' shape.
    """
    if kernels := cpu.kernels(states, cos):
        out: Tensor = autograd.Rotary.apply(kernels, states.contiguous(), cos.contiguous(), sin.contiguous())
        return out
    return states * cos + rotate_half(states) * sin


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for two tensors of one shape and format."""
    if kernels := cpu.kernels(gate, up):
        out: Tensor = autograd.SiluMul.apply(kernels, gate, up)
        return out
    return nn.functional.silu(gate) * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, in the autocast format where autocast is enabled: [..., W] and [V, W] -> [..., V].

    Under CPU autocast the weight is rounded once for every value that it takes (`weights`), and its gradient is
    computed in that format, and stays in it where `weight.grad_dtype` says so.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    dtype = torch.get_autocast_dtype("cpu")
    out: Tensor = autograd.RoundedLinear.apply(padded_rows(rows, dtype), weight, rounded(weight, dtype))
    return (out if len(out) == len(rows) else out[: len(rows)]).unflatten(0, x.shape[:-1])


def padded_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert rows [n, W] to `dtype`, followed by rows of zeros up to `ROW_MULTIPLE` where that is faster.

    On a CPU, oneDNN compiles its bfloat16 and float16 products for every number of rows that it has not met before,
    which takes longer than most of them, and hardly two steps have the same number.
    """
    count, padding = len(x), -len(x) % ROW_MULTIPLE
    if not padding or x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    out = x.new_empty(count + padding, *x.shape[1:], dtype=dtype)
    out[:count] = x
    out[count:] = 0.0
    return out
