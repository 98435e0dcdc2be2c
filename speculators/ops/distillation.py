"""Distillation loss fused with the draft's head: loss and gradients in one pass, without logits for all tokens.

The gradients of the hidden states that enter the head, and of the head if it is trained, are computed along with the
loss, for one chunk of target positions at a time, whose logits are freed before the next chunk: no tensor of [tokens,
vocabulary] exists (compare Wijmans et al. 2024, arXiv:2411.09009). The target's distribution at a position is computed
once for all predictions of it, and not at all where nothing predicts it.

Shapes: N predictions; T target positions; U of them that are predicted; H hidden size; V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.ops.divergences import loss_and_grad
from speculators.ops.functional import padded_rows

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits that exist at a time, by device. Smaller chunks multiply matrices of few rows, which is slow."""
GRAD_ROWS = 256
"""Rows of a product that `_hidden_grad` computes at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetHead:
    """The target's final norm and head, with the scale and soft cap of its logits."""

    norm_weight: Tensor
    """Weight of the final RMSNorm, float32 [H]; with the 1 added for a model that multiplies by 1 + weight."""
    norm_eps: float
    head: Tensor
    """The LM head's rows of the draft vocabulary [V, H]."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute float32 logits [T, V] from hidden states before the final norm [T, H]; multiplies in `dtype`."""
        return self.postprocess(self.project(self.head.to(dtype), hidden_states))

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm: [T, H] of any format -> float32 [T, H]."""
        width = (hidden_states.shape[-1],)
        return torch.nn.functional.rms_norm(hidden_states.float(), width, self.norm_weight, self.norm_eps)

    def project(self, head: Tensor, hidden_states: Tensor) -> Tensor:
        """Apply the final norm to hidden states [T, H], and multiply by a head: [T, V] in the head's dtype."""
        return (padded_rows(self.norm(hidden_states), head.dtype) @ head.T)[: len(hidden_states)]

    @property
    def is_linear(self) -> bool:
        """Whether the logits are the projection alone."""
        return self.scale == 1.0 and self.softcap is None

    def postprocess(self, projection: Tensor) -> Tensor:
        """Scale and cap a projection [T, V]: float32 logits."""
        logits = projection.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def distillation_loss(
    hidden_states: Tensor, target_index: Tensor, weight: Tensor | Callable[[Tensor], Tensor],
    target_hidden_states: Tensor, head: Tensor, target_head: TargetHead, losses: Mapping[str, float],
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the weighted sum of the losses of all predictions; differentiable in `hidden_states` and `head`.

    Matrices are multiplied in autocast's dtype where autocast is enabled, else in float32.

    Args:
        hidden_states: what enters the draft's head [N, H].
        target_index: row of `target_hidden_states` that each prediction has to match, int64 [N].
        weight: of each prediction, float32 [N], or a function from the losses to the weights, both float32 [N]; it is
            called once, and its result is a constant to the gradient.
        target_hidden_states: the target's, before its final norm [T, H].
        head: the draft's [V, H]: float32 if it needs a gradient, else of any format.
        target_head: the target's final norm and LM head.
        losses: names of `divergences.TERMS` with their weights.
        chunk_elements: logits that may exist at a time; by default `CHUNK_ELEMENTS` of the device.

    Returns: scalar loss; float32 loss of each prediction [N]; whether the draft's argmax is the target's, bool [N].
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    options = _Options(target_head, losses, chunk_elements or CHUNK_ELEMENTS[device], dtype, weight)
    loss, each, correct = _DistillationFunction.apply(hidden_states, target_index, target_hidden_states, head, options)
    return loss, each, correct


def hidden_state_loss(hidden_states: Tensor, target_hidden_states: Tensor) -> Tensor:
    """Squared distance of rows from the target's, relative to the target's squared length: [N, H] twice -> [N].

    EAGLE trains on a loss of the hidden states besides that of the tokens (Li et al. 2024, arXiv:2401.15077).
    """
    error = (hidden_states - target_hidden_states).square().sum(-1)
    return error / target_hidden_states.square().sum(-1).clamp(min=1e-12)


@dataclass(frozen=True, slots=True)
class _Options:
    """Arguments of `_DistillationFunction` that are no tensors with gradients."""

    target_head: TargetHead
    losses: Mapping[str, float]
    chunk_elements: int
    dtype: torch.dtype
    """Of the products."""
    weight: Tensor | Callable[[Tensor], Tensor]


class _DistillationFunction(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, target_N: Tensor, target_hidden_TH: Tensor, head: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks, weight = _Chunks(hidden_NH, target_N, target_hidden_TH, head, options), options.weight
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        # Summed over chunks in float32, whatever the head's format.
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        if grad_head is None:  # a prediction's weight can be multiplied in afterwards
            loss_N, correct_N = chunks.compute(None, grad_hidden, None)
            weight_N = weight if isinstance(weight, Tensor) else weight(loss_N)
            if grad_hidden is not None:
                grad_hidden.mul_(weight_N[:, None])
        else:
            weight_N = weight if isinstance(weight, Tensor) else weight(chunks.compute(None, None, None)[0])
            loss_N, correct_N = chunks.compute(weight_N, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(loss_N, correct_N)
        return (loss_N * weight_N).sum(), loss_N, correct_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = (None if saved is None else saved * grads[0] for saved in ctx.saved_tensors)
        return grad_hidden, None, None, grad_head, None


class _Chunks:
    """All predictions, ordered by target position and cut into chunks of positions."""

    def __init__(
        self, hidden_NH: Tensor, target_N: Tensor, target_hidden_TH: Tensor, head: Tensor, options: _Options
    ) -> None:
        self.hidden_NH, self.target_hidden_TH, self.options = hidden_NH, target_hidden_TH, options
        self.head = head.detach().to(options.dtype)
        shared = options.target_head.head.data_ptr() == head.data_ptr()
        self.target_head = self.head if shared else options.target_head.head.to(options.dtype)
        self.positions_U, self.row_N = torch.unique(target_N, return_inverse=True)
        self.order_N = torch.argsort(self.row_N, stable=True)
        starts = torch.arange(len(self.positions_U) + 1, device=target_N.device)
        self.bounds = torch.searchsorted(self.row_N[self.order_N], starts).tolist()

    def compute(
        self, weight_N: Tensor | None, grad_hidden: Tensor | None, grad_head: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return loss and correctness of each prediction [N].

        Args:
            weight_N: factor of each prediction's gradient; 1 if None.
            grad_hidden: overwritten with the gradient of the hidden states [N, H].
            grad_head: the gradient of the head is added to it [V, H].
        """
        target_head, bounds = self.options.target_head, self.bounds
        loss_N = self.hidden_NH.new_empty(len(self.row_N), dtype=torch.float32)
        correct_N = torch.empty_like(loss_N, dtype=torch.bool)
        with_grad = grad_hidden is not None or grad_head is not None
        postprocess = None if target_head.is_linear else target_head.postprocess
        rows = max(1, self.options.chunk_elements // len(self.head))
        for begin, end in _position_ranges(bounds, rows):
            hidden_states = self.target_hidden_TH[self.positions_U[begin:end]]
            projection = target_head.project(self.target_head, hidden_states)
            # A position with more predictions than fit in a chunk takes several.
            for index in self.order_N[bounds[begin] : bounds[end]].split(rows):
                hidden = padded_rows(self.hidden_NH[index], self.options.dtype)
                logits, count = hidden @ self.head.T, len(index)
                loss_N[index], correct_N[index] = loss_and_grad(
                    logits[:count], projection, self.row_N[index] - begin, self.options.losses,
                    None if weight_N is None else weight_N[index], with_grad, postprocess,
                )  # fmt: skip
                if not with_grad:
                    continue
                grad_logits = logits  # which `loss_and_grad` has overwritten
                grad_logits[count:] = 0.0
                if grad_hidden is not None:
                    grad_hidden[index] = _hidden_grad(grad_logits, self.head)[:count].to(grad_hidden.dtype)
                if grad_head is not None:
                    _add_product(grad_head, grad_logits.T, hidden)
        return loss_N, correct_N


def _hidden_grad(grad_logits: Tensor, head: Tensor) -> Tensor:
    """grad_logits @ head. On a CPU, oneDNN takes twice as long per row above `GRAD_ROWS` rows."""
    short = grad_logits.device.type == "cpu" and grad_logits.dtype is not torch.float32
    if short and len(grad_logits) > GRAD_ROWS:
        return torch.cat([rows @ head for rows in grad_logits.split(GRAD_ROWS)])
    return grad_logits @ head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 matrix."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _position_ranges(bounds: list[int], rows: int) -> list[tuple[int, int]]:
    """Cut positions into ranges whose positions and predictions number at most `rows`, or that have one position.

    `bounds`: index of each position's first prediction, then the number of predictions.
    """
    ranges, begin = [], 0
    for end in range(1, len(bounds)):
        if end > begin + 1 and bounds[end] - bounds[begin] + end - begin > rows:
            ranges.append((begin, end - 1))
            begin = end - 1
    if begin < len(bounds) - 1:
        ranges.append((begin, len(bounds) - 1))
    return ranges
