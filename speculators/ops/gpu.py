"""Attention on a GPU: torch's flex attention, compiled, over block masks that skip the tiles where no query sees a key.

Block masks are built by a compiled function from the ranges in `masks`; a pair of query and key is decided inside the
kernel, so no mask over all pairs exists. On a CPU the same functions run uncompiled and materialise all scores, which
is good for checking masks and nothing else.

Shapes as in `attention`.
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
    """Block mask over `total` keys of step 0 and, of each of `steps` later steps, one key for each query."""
    if steps not in mask.cache:
        first, last, rows = mask.first, mask.last, len(mask.first)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            before = (key < total) & (key >= first[query]) & (key <= last[query])
            return before | ((key >= total) & ((key - total) % rows == query))

        mask.cache[steps] = _block_mask(seen, rows, total + steps * rows, first.device)
    block_mask: BlockMask = mask.cache[steps]
    return block_mask


def anchor_block_mask(mask: AnchorMask, total: int, slots: int, queries: int, is_causal: bool) -> BlockMask:
    """Block mask over `total` context positions and `slots` of each block, for the last `queries` slots of each."""
    if (queries, is_causal) not in mask.cache:
        first, end, rows = mask.first, mask.end, len(mask.first)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block, inside = query // queries, key - total
            before = (key < total) & (key >= first[block]) & (key < end[block])
            own = (key >= total) & (inside // slots == block)
            if is_causal:
                own = own & (inside % slots <= query % queries + slots - queries)
            return before | own

        mask.cache[queries, is_causal] = _block_mask(seen, rows * queries, total + rows * slots, first.device)
    block_mask: BlockMask = mask.cache[queries, is_causal]
    return block_mask


def causal_attention(query_states: Tensor, keys: list[Tensor], values: list[Tensor], mask: CausalMask) -> Tensor:
    """Queries [R, Q, D] over keys and values of step 0 [T, G, D] and of later steps [R, G, D] each: [R, Q * D]."""
    block_mask = causal_block_mask(mask, len(keys[0]), len(keys) - 1)
    return _attend(query_states, torch.cat(keys), torch.cat(values), block_mask).to(values[0].dtype)


def anchored_attention(
    query_states: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: AnchorMask, is_causal: bool
) -> Tensor:
    """Queries [R, L, Q, D] over the context [C, G, D] and the blocks [R, B, G, D]: [R, L, Q * D]."""
    count, length = query_states.shape[:2]
    block_mask = anchor_block_mask(mask, len(context[0]), own[0].shape[1], length, is_causal)
    keys, values = (torch.cat([c, o.flatten(0, 1)]) for c, o in zip(context, own, strict=True))
    mixed = _attend(query_states.flatten(0, 1), keys, values, block_mask)
    return mixed.unflatten(0, (count, length)).to(values.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, block_mask: BlockMask) -> Tensor:
    """[R, Q, D] over [S, G, D]: [R, Q * D]."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, keys, values = (x.to(torch.get_autocast_dtype(device)) for x in (q, keys, values))
    ready = [x.transpose(0, 1)[None].to(values.dtype) for x in (q, keys, values)]
    run = _compiled()[0] if device == "cuda" else _UNCOMPILED[0]
    mixed: Tensor = run(*ready, block_mask=block_mask, enable_gqa=True)
    return mixed[0].transpose(0, 1).flatten(1)


def _block_mask(seen: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockMask:
    make = _compiled()[1] if device.type == "cuda" else _UNCOMPILED[1]
    made: BlockMask = make(seen, None, None, queries, keys, device=device)
    return made


_UNCOMPILED: tuple[Any, Any] = (flex_attention, create_block_mask)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Attention and the making of masks; shapes are left open, because every pack has its own."""
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
