"""Autograd functions of the kernels in `cpu`: each pairs a forward kernel with its backward kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculators.ops.cpu import Kernels, KeyRanges


class RMSNormFunction(torch.autograd.Function):
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


class RotaryFunction(torch.autograd.Function):
    """See `functional.apply_rotary`."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.kernels, ctx.dtype = kernels, x.dtype
        ctx.save_for_backward(cos, sin)
        return kernels.apply_rotary(x, cos, sin, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # the transpose of a rotation is the inverse rotation
        return None, ctx.kernels.apply_rotary(grads[0].contiguous(), cos, -sin, ctx.dtype), None, None


class SiluMulFunction(torch.autograd.Function):
    """See `functional.silu_mul`."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, ctx.kernels = gate.contiguous(), up.contiguous(), kernels
        ctx.save_for_backward(gate, up)
        return kernels.silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernels.silu_mul_backward(grads[0].contiguous(), *ctx.saved_tensors)


class RoundedLinearFunction(torch.autograd.Function):
    """Computes x @ weight.T for x [n, W] with a copy of the weight in x's format; the gradients have that format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded_weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, rounded_weight)
        return x @ rounded_weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, rounded_weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return grad @ rounded_weight if needs_x else None, grad.T @ x if needs_weight else None, None


class AttentionFunction(torch.autograd.Function):
    """See `ranged_attention`."""

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


def ranged_attention(
    kernels: Kernels, ranges: KeyRanges, query_states: Tensor,
    context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Compute `Kernels.attention` differentiably, for keys and values of any format and layout; float32 output."""
    tensors = (x.float().contiguous() for x in (query_states, *context, *block))
    out: Tensor = AttentionFunction.apply(kernels, ranges, *tensors)
    return out
