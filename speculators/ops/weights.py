"""Copies of float32 weights in the format that matrix products are computed in, kept up to date by their values.

A copy is made once for every value of its weight, in memory that is used again: `rounded` gives it, and
`apply_update` changes a weight together with its copy. Nothing else needs to know that copies exist, except code that
changes weights where torch does not count it: that calls `mark_changed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Give a weight in `dtype`, of its shape and without gradient; the weight itself if it has that format."""
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
    follows = copy is not None and copy.tensor.dtype is cpu.SHORT and copy.version == weight._version
    kernels.apply_update(weight, copy.tensor if copy is not None and follows else None, update.contiguous(), keep, size)
    torch.autograd.graph.increment_version(weight)
    if copy is not None and follows:
        copy.version = weight._version


def mark_changed(weights: Iterable[Tensor]) -> None:
    """Say that weights were changed by something that does not raise their version counters."""
    torch.autograd.graph.increment_version(list(weights))
