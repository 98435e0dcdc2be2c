"""Attention over packed batches: causal with unrolled steps (EAGLE-3), and of blocks at anchors (DFlash).

Scores exist within a document only. Behind the two functions are a C++ kernel (`cpu`), compiled flex attention on a GPU
(`gpu`), and torch operations elsewhere (`blockwise`); `masks` builds the masks, `reference` has the formulas.

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
    """Keys and values of one layer: of step 0 for every token, of later steps for each query's own position."""

    keys: Tensor
    """[T, G, D]"""
    values: Tensor
    """[T, G, D]"""
    later_steps: list[tuple[Tensor, Tensor]]
    """Keys and values of steps 1, 2, ..., each [R, G, D]."""


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def causal_attention(query_states: Tensor, cache: KeyValues, mask: CausalMask) -> Tensor:
    """Attend from each query to step 0 of its document up to its position, and to later steps of its position.

    EAGLE-3's test-time training (Li et al. 2025, arXiv:2503.01840). On a CPU it is computed in float32.

    Args:
        query_states: rotated [R, Q, D].
        cache: keys (rotated) and values of the layer.
        mask: of the same R queries.

    Returns: [R, Q * D].
    """
    if kernels := cpu.kernels(query_states):
        empty = query_states.new_empty(len(query_states), 0, *cache.keys.shape[1:])
        k, v = [torch.stack(tensors, 1) for tensors in zip(*cache.later_steps, strict=True)] or [empty, empty]
        ranges = KeyRanges(mask.first, mask.last + 1)
        return ranged_attention(kernels, ranges, query_states[:, None], (cache.keys, cache.values), (k, v)).flatten(1)
    if query_states.device.type != "cuda":
        return blockwise.blockwise_causal(query_states, cache.keys, cache.values, cache.later_steps, mask)
    if not len(query_states):
        return query_states.flatten(1)
    steps = [(cache.keys, cache.values), *cache.later_steps]
    return gpu.flex_causal(query_states, [k for k, _ in steps], [v for _, v in steps], mask)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def anchored_attention(
    query_states: Tensor, context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], mask: AnchorMask,
    is_causal: bool,
) -> Tensor:  # fmt: skip
    """Attend from each block to the context before its anchor and to the block itself; on a CPU in float32.

    Args:
        query_states: of the last L slots of each block, rotated [R, L, Q, D].
        context: keys (rotated) and values of the context, each [C, G, D].
        block: those of the blocks, each [R, B, G, D].
        mask: of all R blocks, in order.
        is_causal: whether a slot sees only itself and the slots before it in its block.

    Returns: [R, L, Q * D].
    """
    if kernels := cpu.kernels(query_states):
        ranges = KeyRanges(mask.first, mask.end, is_causal)
        return ranged_attention(kernels, ranges, query_states, context, block).flatten(2)
    if query_states.device.type != "cuda":
        return blockwise.blockwise_anchored(query_states, context, block, mask, is_causal)
    if not len(query_states):
        return query_states.flatten(2)
    return gpu.flex_anchored(query_states, context, block, mask, is_causal)
