"""Attention over packed batches: causal over unrolled steps, and of blocks that hang at anchors.

Scores are computed within each document only. On a CPU a C++ loop computes for every query what it sees and nothing
else (`cpu`); on a GPU it is compiled flex attention (`gpu`); elsewhere plain torch (`blockwise`). `masks` builds the
masks.

Shapes: T tokens of the packed batch; R queries or blocks, R <= T; G key-value heads; Q query heads; D head width;
C context positions; B slots of a block; L of them are queries, the last L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speculators.ops import blockwise, cpu, gpu
from speculators.ops.autograd import ranged_attention
from speculators.ops.cpu import KeyRanges
from speculators.ops.masks import AnchorMask, CausalMask


@dataclass(slots=True)
class KeyValues:
    """What one layer's queries may see: every token of step 0, and of each later step the query's own position."""

    keys: Tensor
    """[T, G, D]"""
    values: Tensor
    """[T, G, D]"""
    own: list[tuple[Tensor, Tensor]]
    """Keys and values of steps 1, 2, ..., each [R, G, D]."""


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def causal_attention(query_states: Tensor, cache: KeyValues, mask: CausalMask) -> Tensor:
    """Attend to step 0 of the own document up to the own position, and to the own position's later steps.

    On a CPU it is computed in float32: its products are small, and of another shape each time.

    Args:
        query_states: rotated [R, Q, D].
        cache: the layer's keys (rotated) and values.
        mask: of the same R queries.

    Returns: [R, Q * D].
    """
    if kernels := cpu.kernels(query_states):
        none = query_states.new_empty(len(query_states), 0, *cache.keys.shape[1:])
        k, v = [torch.stack(each, 1) for each in zip(*cache.own, strict=True)] or [none, none]
        ranges = KeyRanges(mask.first, mask.last + 1)
        return ranged_attention(kernels, ranges, query_states[:, None], (cache.keys, cache.values), (k, v)).flatten(1)
    if query_states.device.type != "cuda":
        return blockwise.causal(query_states, cache.keys, cache.values, cache.own, mask)
    if not len(query_states):
        return query_states.flatten(1)
    steps = [(cache.keys, cache.values), *cache.own]
    return gpu.causal_attention(query_states, [k for k, _ in steps], [v for _, v in steps], mask)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def anchored_attention(
    query_states: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: AnchorMask, is_causal: bool
) -> Tensor:  # fmt: skip
    """Attend from every block to the context before its anchor and to the block itself; on a CPU in float32.

    Args:
        query_states: of the last L slots of each block, rotated [R, L, Q, D].
        context: keys (rotated) and values of the context, each [C, G, D].
        own: those of the blocks, each [R, B, G, D].
        mask: of all R blocks, in order.
        is_causal: a slot sees only itself and the slots before it in its own block.

    Returns: [R, L, Q * D].
    """
    if kernels := cpu.kernels(query_states):
        ranges = KeyRanges(mask.first, mask.end, is_causal)
        return ranged_attention(kernels, ranges, query_states, context, own).flatten(2)
    if query_states.device.type != "cuda":
        return blockwise.anchored(query_states, context, own, mask, is_causal)
    return (
        gpu.anchored_attention(query_states, context, own, mask, is_causal)
        if len(query_states)
        else (query_states.flatten(2))
    )
