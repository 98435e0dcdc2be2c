"""Attention on a GPU: torch's flex attention, compiled, over block masks that skip tiles where no query sees a key.

Compiled functions build the block masks from the ranges in `masks`, and the kernel evaluates each pair of query and key
itself, so no mask over all pairs exists. On a CPU the same functions run uncompiled and materialise all scores, which
serves tests of the masks only. Shapes as in `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from speculators.ops.masks import AnchorMask, CausalMask


def causal_block_mask(mask: CausalMask, total: int, steps: int) -> BlockMask:
    """Build a block mask over `total` keys of step 0 and one key per query of each of `steps` later steps."""
    if steps not in mask.cache:
        first, last, rows = mask.first, mask.last, len(mask.first)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            before = (key < total) & (key >= first[query]) & (key <= last[query])
            return before | ((key >= total) & ((key - total) % rows == query))

        mask.cache[steps] = _block_mask(seen, rows, total + steps * rows, first.device)
    block_mask: BlockMask = mask.cache[steps]
    return block_mask


def anchor_block_mask(mask: AnchorMask, total: int, slots: int, queries: int, is_causal: bool) -> BlockMask:
    """Build a block mask over `total` context positions and `slots` of each block, for its last `queries` slots."""
    if (queries, is_causal) not in mask.cache:
        first, end, rows = mask.first, mask.end, len(mask.first)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block, inside = query // queries, key - total
            before = (key < total) & (key >= first[block]) & (key < end[block])
            same_block = (key >= total) & (inside // slots == block)
            if is_causal:
                same_block = same_block & (inside % slots <= query % queries + slots - queries)
            return before | same_block

        mask.cache[queries, is_causal] = _block_mask(seen, rows * queries, total + rows * slots, first.device)
    block_mask: BlockMask = mask.cache[queries, is_causal]
    return block_mask


def flex_causal(query_states: Tensor, keys: list[Tensor], values: list[Tensor], mask: CausalMask) -> Tensor:
    """Attend from [R, Q, D] to keys and values of step 0 [T, G, D] and of later steps, each [R, G, D]: [R, Q * D]."""
    block_mask = causal_block_mask(mask, len(keys[0]), len(keys) - 1)
    return _attend(query_states, torch.cat(keys), torch.cat(values), block_mask).to(values[0].dtype)


def flex_anchored(
    query_states: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    mask: AnchorMask,
    is_causal: bool,
) -> Tensor:
    """Attend from [R, L, Q, D] to the context [C, G, D] and the blocks [R, B, G, D]: [R, L, Q * D]."""
    count, length = query_states.shape[:2]
    block_mask = anchor_block_mask(mask, len(context[0]), block[0].shape[1], length, is_causal)
    keys, values = (torch.cat([c, b.flatten(0, 1)]) for c, b in zip(context, block, strict=True))
    mixed = _attend(query_states.flatten(0, 1), keys, values, block_mask)
    return mixed.unflatten(0, (count, length)).to(values.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask) -> Tensor:
    """Attend from [R, Q, D] to keys and values [S, G, D]: [R, Q * D]."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, keys, values = (x.to(torch.get_autocast_dtype(device)) for x in (q, keys, values))
    ready = [x.transpose(0, 1)[None].to(values.dtype) for x in (q, keys, values)]
    run = _compiled()[0] if device == "cuda" else _UNCOMPILED[0]
    mixed: Tensor = run(*ready, block_mask=block_mask, enable_gqa=True)
    return mixed[0].transpose(0, 1).flatten(1)


def _block_mask(seen: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockMask:
    create = _compiled()[1] if device.type == "cuda" else _UNCOMPILED[1]
    block_mask: BlockMask = create(seen, None, None, queries, keys, device=device)
    return block_mask


_UNCOMPILED: tuple[Any, Any] = (flex_attention, create_block_mask)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Compile attention and mask creation, with dynamic shapes, because every packed batch has its own."""
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
