"""The kernels of `cpu` as differentiable functions: each class pairs a forward kernel with its backward kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.ops.cpu import Kernels, KeyRanges


class RMSNorm(torch.autograd.Function):
    """See `functional.rms_norm`."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, inverse = kernels.rms_norm(x, weight, eps, dtype)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.kernels.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return None, grad_x, grad_weight, None, None


class Rotary(torch.autograd.Function):
    """See `functional.apply_rotary`."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.kernels, ctx.dtype = kernels, x.dtype
        ctx.save_for_backward(cos, sin)
        return kernels.apply_rotary(x, cos, sin, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # the transpose of a rotation is the rotation back
        return None, ctx.kernels.apply_rotary(grads[0].contiguous(), cos, -sin, ctx.dtype), None, None


class SiluMul(torch.autograd.Function):
    """See `functional.silu_mul`."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, ctx.kernels = gate.contiguous(), up.contiguous(), kernels
        ctx.save_for_backward(gate, up)
        return kernels.silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernels.silu_mul_backward(grads[0].contiguous(), *ctx.saved_tensors)


class RoundedLinear(torch.autograd.Function):
    """Rows [n, W] @ weight.T, computed with a copy of the weight that has their format already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(rows, rounded)
        return rows @ rounded.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, rounded) = grads, ctx.saved_tensors
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return grad @ rounded if needs_rows else None, grad.T @ rows if needs_weight else None, None


def ranged_attention(
    kernels: Kernels, ranges: KeyRanges, query_states: Tensor,
    context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """As `Kernels.attention`, differentiable; the arguments may have any format and layout."""
    tensors = (x.float().contiguous() for x in (query_states, *context, *own))
    out: Tensor = _Attention.apply(kernels, ranges, *tensors)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, ranges: KeyRanges, *tensors: Tensor) -> Tensor:
        out, logsumexp = kernels.attention(ranges, *tensors)
        ctx.kernels, ctx.ranges = kernels, ranges
        ctx.save_for_backward(out, logsumexp, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, logsumexp, *tensors = ctx.saved_tensors
        grad = grads[0].contiguous()
        return None, None, *ctx.kernels.attention_backward(grad, out, logsumexp, ctx.ranges, *tensors)
