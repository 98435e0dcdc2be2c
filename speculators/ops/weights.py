"""Updates of float32 weights, with a copy of each in the format of matrix products that follows its values.

A copy is made once per value of its weight, into the same buffer: `rounded` returns it, and `apply_update` changes a
weight together with its copy. Other code need not know of copies, except code that changes weights without raising
their version counters: it calls `mark_changed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators.ops import cpu

ATTRIBUTE = "speculators_rounded"
"""Attribute of a weight that holds its copy, so that both are freed together."""


@dataclass(slots=True)
class RoundedCopy:
    """A weight in another format."""

    tensor: Tensor
    version: int
    """Version counter of the weight when the copy was made; torch raises it with every change of the weight."""


@torch.no_grad()
def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, without gradient; the weight itself if it has that format."""
    if weight.dtype is dtype:
        return weight.detach()
    copy: RoundedCopy | None = getattr(weight, ATTRIBUTE, None)
    if copy is None or copy.tensor.dtype is not dtype:
        copy = RoundedCopy(weight.detach().to(dtype), weight._version)
        setattr(weight, ATTRIBUTE, copy)
    elif copy.version != weight._version:
        copy.tensor.copy_(weight)
        copy.version = weight._version
    return copy.tensor


def apply_update(weight: Tensor, update: Tensor, keep: float, size: float) -> None:
    """Change a weight in place: weight = keep * weight - size * update, all of one shape."""
    kernels = cpu.kernels(weight, update)
    if kernels is None:
        weight.mul_(keep).add_(update, alpha=-size)
        return
    copy: RoundedCopy | None = getattr(weight, ATTRIBUTE, None)
    current = copy is not None and copy.tensor.dtype is cpu.SHORT and copy.version == weight._version
    short = copy.tensor if copy is not None and current else None
    kernels.apply_update(weight, short, update.contiguous(), keep, size)
    torch.autograd.graph.increment_version(weight)
    if copy is not None and current:
        copy.version = weight._version


def mark_changed(weights: Iterable[Tensor]) -> None:
    """Raise the version counters of weights that were changed by code that does not."""
    torch.autograd.graph.increment_version(list(weights))


def keep_grad_dtype(weight: Tensor, dtype: torch.dtype) -> None:
    """Let a weight's gradient keep the format in which a product computes it, instead of the weight's own."""
    weight.grad_dtype = dtype


def grad_norm(grads: Iterable[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all gradients together: float32 scalar."""
    tensors = list(grads)
    if kernels := cpu.kernels(*tensors):
        return torch.tensor(math.sqrt(sum(kernels.sum_of_squares(grad) for grad in tensors)))
    return nn.utils.get_total_norm(tensors)
