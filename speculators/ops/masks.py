"""Attention masks of packed batches, as one range of keys per query; no mask over all pairs exists.

Shapes: T tokens of the packed batch; R queries (causal) or blocks (anchored), in ascending order; C context positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Keys that each query sees: those of its document up to its position."""

    first: Tensor
    """First position of the query's document, int64 [R]."""
    last: Tensor
    """The query's position, int64 [R]."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Data that an implementation derives from the mask once, for all layers."""


@dataclass(frozen=True, slots=True)
class AnchorMask:
    """Context that each block sees: its document strictly before its anchor, or the end of that."""

    first: Tensor
    """First context index, int64 [R]."""
    end: Tensor
    """First context index after the range, int64 [R]."""
    document: Tensor
    """Index of the block's document, int64 [R]."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Data that an implementation derives from the mask once, for all layers."""


def causal_mask(documents: Sequence[tuple[int, int]], query_positions: Tensor) -> CausalMask:
    """Build the mask of causal attention inside documents.

    Args:
        documents: (first token, length) of each document of the packed batch, in order.
        query_positions: indices into the packed batch, ascending, int64 [R].
    """
    starts, lengths = torch.tensor(list(documents), device=query_positions.device).view(-1, 2).unbind(1)
    return CausalMask(starts.repeat_interleave(lengths)[query_positions], query_positions)


def context_positions(documents: Sequence[tuple[int, int]], anchors: Tensor) -> Tensor:
    """Return the positions that some block sees, int64 [C]: each document's tokens before its last anchor.

    Args:
        documents: (first token, length) of each document of the packed batch, in order.
        anchors: indices into the packed batch, ascending, int64 [R].
    """
    ranges = [torch.arange(start, int(inside[-1])) for _, start, inside in _by_document(documents, anchors)]
    return torch.cat(ranges).to(anchors.device) if ranges else anchors.new_empty(0)


def anchor_mask(documents: Sequence[tuple[int, int]], anchors: Tensor, window: int | None = None) -> AnchorMask:
    """Build the mask of anchored attention over the context that `context_positions` returns for the same arguments.

    `window`: tokens before its anchor that a block sees; all of its document if None.
    """
    first, end, document, before = [], [], [], 0
    for index, start, inside in _by_document(documents, anchors):
        end.append(inside - start + before)
        first.append(torch.full_like(inside, before) if window is None else (end[-1] - window).clamp(min=before))
        document.append(torch.full_like(inside, index))
        before += int(inside[-1]) - start
    if not end:
        return AnchorMask(anchors, anchors, anchors)
    return AnchorMask(torch.cat(first), torch.cat(end), torch.cat(document))


def _by_document(documents: Sequence[tuple[int, int]], anchors: Tensor) -> list[tuple[int, int, Tensor]]:
    """Return (index, first token, its anchors) of each document that has anchors."""
    bounds = torch.tensor([start + length for start, length in documents], device=anchors.device)
    ends = [0, *torch.searchsorted(anchors, bounds).tolist()]
    return [
        (index, start, anchors[ends[index] : ends[index + 1]])
        for index, (start, _) in enumerate(documents)
        if ends[index + 1] > ends[index]
    ]
