"""The loss between a draft's predictions and the target's own distributions, fused with the head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.config.algorithms import Loss
from speculators.ops import cpu
from speculators.ops.divergences import cost
from speculators.ops.functional import padded_rows

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits that exist at one time. Fewer make flat products, which are slow."""
PART_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Of those, how many are turned into losses and slopes at one time: on a CPU, what its caches hold beside copies."""


BACK_ROWS = 256
"""See `_back`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The target from its last layer's output on: final norm, head, and what it does to logits."""

    norm_weight: Tensor
    """[H] float32: what is multiplied by, offsets included."""
    norm_eps: float
    head: Tensor
    """[V, H]: rows of the draft's vocabulary."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, last: Tensor, dtype: torch.dtype) -> Tensor:
        """States before the final norm [U, H] -> float32 logits [U, V]; the product is computed in `dtype`."""
        return self.finish(self.through(self.head.to(dtype), last))

    def normed(self, last: Tensor) -> Tensor:
        """States before the final norm [U, H] -> what enters the head, float32."""
        return torch.nn.functional.rms_norm(last.float(), (last.shape[-1],), self.norm_weight, self.norm_eps)

    def through(self, head: Tensor, last: Tensor) -> Tensor:
        """States -> what a head that is in the format of the product already makes of them, in that format [U, V]."""
        return (padded_rows(self.normed(last), head.dtype) @ head.T)[: len(last)]

    @property
    def plain(self) -> bool:
        """Whether logits are what the head makes, and nothing else."""
        return self.scale == 1.0 and self.softcap is None

    def finish(self, product: Tensor) -> Tensor:
        """What the head made [U, V] -> float32 logits."""
        logits = product.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of rows [N, H] from those that are wanted, against the latter's squared length [N]."""
    return (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)


@dataclass(frozen=True, slots=True)
class _How:
    """What `_Distill` needs beside tensors."""

    teacher: Teacher
    losses: Mapping[Loss, float]
    limit: int
    dtype: torch.dtype
    reweigh: Callable[[Tensor], Tensor] | None
    """Losses [N] -> weights [N]; the weights are given where it is None."""


class _Distill(torch.autograd.Function):
    """Loss and its gradient in one pass over chunks of places."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, target_N: Tensor, weight_N: Tensor, last: Tensor, head: Tensor, how: _How
    ) -> tuple[Tensor, Tensor, Tensor]:
        walk = _Walk(hidden_NH, target_N, last, head, how)
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        slopes = torch.empty_like(hidden_NH) if wants_hidden else None
        # A sum over all chunks, whatever format the head was handed over in.
        of_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        if of_head is None:  # what a prediction weighs can be multiplied in afterwards
            divergence, correct = walk.costs(None, slopes, None)
            weight_N = how.reweigh(divergence) if how.reweigh else weight_N
            if slopes is not None:
                slopes.mul_(weight_N[:, None])
        else:
            weight_N = how.reweigh(walk.costs(None, None, None)[0]) if how.reweigh else weight_N
            divergence, correct = walk.costs(weight_N, slopes, of_head)
        ctx.save_for_backward(slopes, of_head)
        ctx.mark_non_differentiable(divergence, correct)
        return (divergence * weight_N).sum(), divergence, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes, of_head = (None if g is None else g * upstream[0] for g in ctx.saved_tensors)
        return (slopes, None, None, None, of_head, None)


class _Walk:
    """All predictions, chunk by chunk of the places that they predict."""

    def __init__(self, hidden_NH: Tensor, target_N: Tensor, last: Tensor, head: Tensor, how: _How) -> None:
        self.hidden_NH, self.last, self.how = hidden_NH, last, how
        self.head = head.detach().to(how.dtype)
        own = how.teacher.head.data_ptr() == head.data_ptr()
        self.teacher_head = self.head if own else how.teacher.head.to(how.dtype)
        self.places_U, self.which_N = torch.unique(target_N, return_inverse=True)
        self.order_N = torch.argsort(self.which_N, stable=True)
        starts = torch.arange(len(self.places_U) + 1, device=last.device)
        self.bounds = torch.searchsorted(self.which_N[self.order_N], starts).tolist()

    def costs(self, weight_N: Tensor | None, slopes: Tensor | None, of_head: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss [N] and correctness [N] of each prediction.

        Args:
            weight_N: what slopes are multiplied by; 1 if None.
            slopes: becomes the gradient of what enters the head [N, H].
            of_head: the gradient of the head is added to it [V, H].
        """
        how, bounds = self.how, self.bounds
        divergence = self.hidden_NH.new_empty(len(self.which_N), dtype=torch.float32)
        correct = torch.empty_like(divergence, dtype=torch.bool)
        rows = max(1, how.limit // len(self.head))
        for begin, end in _chunks(bounds, rows):
            product = how.teacher.through(self.teacher_head, self.last[self.places_U[begin:end]])
            # More predictions of one place than fit are computed in turns.
            for picked in self.order_N[bounds[begin] : bounds[end]].split(rows):
                hidden = padded_rows(self.hidden_NH[picked], how.dtype)
                z = hidden @ self.head.T
                weight = None if weight_N is None else weight_N[picked]
                local, sloped = self.which_N[picked] - begin, slopes is not None or of_head is not None
                divergence[picked], correct[picked] = self._turn(z[: len(picked)], product, local, weight, sloped)
                if not sloped:
                    continue
                slope = z
                slope[len(picked) :] = 0.0
                if slopes is not None:
                    slopes[picked] = _back(slope, self.head)[: len(picked)].to(slopes.dtype)
                if of_head is not None:
                    _add_product(of_head, slope.T, hidden)
        return divergence, correct

    def _turn(
        self, z: Tensor, product: Tensor, local: Tensor, weight: Tensor | None, sloped: bool
    ) -> tuple[Tensor, Tensor]:
        """Losses [n] and correctness [n] of logits [n, V], which become their slopes if those are wanted.

        Args:
            z: in the format of products.
            product: what the target's head made [u, V].
            local: of each prediction its row there, ascending int64 [n].
            weight: what slopes are multiplied by [n]; 1 if None.
            sloped: whether they are wanted.
        """
        how = self.how
        if how.losses in cpu.LOSSES and (loops := cpu.kernels(z)):
            wanted = product if how.teacher.plain else how.teacher.finish(product)
            (kind,) = how.losses
            return loops.losses(kind, z, wanted, local, weight, sloped)
        divergence, correct = z.new_empty(len(z), dtype=torch.float32), torch.empty_like(local, dtype=torch.bool)
        for part, places in self._parts(local, len(product)):
            wanted, exact = how.teacher.finish(product[places]), how.dtype is torch.float32
            at = local[part] - places.start
            divergence[part], correct[part], each = cost(z[part].float(), wanted, at, how.losses, exact)
            if sloped:
                z[part] = each if weight is None else each.mul_(weight[part, None])
        return divergence, correct

    def _parts(self, local: Tensor, places: int) -> list[tuple[slice, slice]]:
        """Predictions, and the places that those are of, a few at a time; `local` [n]: of each its place, ascending."""
        few = max(1, PART_ELEMENTS[local.device.type] // len(self.head))
        if len(local) <= few:
            return [(slice(0, len(local)), slice(0, places))]
        of, ends = local.tolist(), [*range(few, len(local), few), len(local)]
        return [(slice(begin, end), slice(of[begin], of[end - 1] + 1)) for begin, end in itertools.pairwise([0, *ends])]


def _back(slope: Tensor, head: Tensor) -> Tensor:
    """slope @ head. On a CPU, oneDNN takes twice as long for a row of it where there are more than `BACK_ROWS`."""
    short = slope.device.type == "cpu" and slope.dtype is not torch.float32 and len(slope) > BACK_ROWS
    return torch.cat([part @ head for part in slope.split(BACK_ROWS)]) if short else slope @ head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 sum."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _chunks(bounds: list[int], rows: int) -> list[tuple[int, int]]:
    """Cut places into ranges whose predictions and places together number at most `rows`, at least one place each."""
    ranges, begin = [], 0
    for end in range(1, len(bounds)):
        if end > begin + 1 and bounds[end] - bounds[begin] + end - begin > rows:
            ranges.append((begin, end - 1))
            begin = end - 1
    if begin < len(bounds) - 1:
        ranges.append((begin, len(bounds) - 1))
    return ranges
