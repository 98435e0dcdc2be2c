"""Attention of drafts on a GPU: torch's flex attention, compiled, over block masks that skip what no query sees.

The same numbers as `attention` gives on a CPU, from the same arguments. A mask says for every query between which keys
it looks, and a compiled kernel leaves out the tiles where nobody does. No mask over all pairs exists: tiles are found
by a compiled function, and a pair is decided inside the kernel.

Without a GPU the same functions run uncompiled, which materialises scores: good for checking masks, and nothing else.

Shapes as in `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass(frozen=True, slots=True)
class CausalMask:
    """What queries of unrolled steps see of step 0: everything from `first` to `last`, both included."""

    first: Tensor
    """First place of the query's document, int64 [R]."""
    last: Tensor
    """The query's own place, int64 [R]."""
    made: dict[int, BlockMask] = field(default_factory=dict)
    """By the number of later steps."""

    def block_mask(self, total: int, steps: int) -> BlockMask:
        """Over `total` keys of step 0 and, of each later step, one for each query."""
        if steps not in self.made:
            first, last, rows = self.first, self.last, len(self.first)

            def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                before = (key < total) & (key >= first[query]) & (key <= last[query])
                return before | ((key >= total) & ((key - total) % rows == query))

            self.made[steps] = _block_mask(seen, rows, total + steps * rows, first.device)
        return self.made[steps]


@dataclass(frozen=True, slots=True)
class AnchorMask:
    """What blocks see of the context: places from `first` on, before `end`."""

    first: Tensor
    """int64 [R]"""
    end: Tensor
    """int64 [R]"""
    made: dict[tuple[int, bool], BlockMask] = field(default_factory=dict)
    """By the slots of a block that ask, and whether a slot sees only itself and those before it."""

    def block_mask(self, total: int, slots: int, asking: int, causal: bool) -> BlockMask:
        """Over `total` places of the context and `slots` of each block, for the last `asking` slots of each."""
        if (asking, causal) not in self.made:
            first, end, rows = self.first, self.end, len(self.first)

            def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                block, inside = query // asking, key - total
                before = (key < total) & (key >= first[block]) & (key < end[block])
                own = (key >= total) & (inside // slots == block)
                if causal:
                    own = own & (inside % slots <= query % asking + slots - asking)
                return before | own

            self.made[asking, causal] = _block_mask(seen, rows * asking, total + rows * slots, first.device)
        return self.made[asking, causal]


def unrolled(q: Tensor, keys: list[Tensor], values: list[Tensor], mask: CausalMask) -> Tensor:
    """Queries [R, Q, D] over keys and values of step 0 [T, G, D] and of later steps [R, G, D] each: [R, Q * D]."""
    over = mask.block_mask(len(keys[0]), len(keys) - 1)
    return _attend(q, torch.cat(keys), torch.cat(values), over).to(values[0].dtype)


def anchored(
    q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: AnchorMask, causal: bool
) -> Tensor:
    """Queries [R, L, Q, D] over the context [C, G, D] and the blocks [R, B, G, D]: [R, L, Q * D]."""
    count, length = q.shape[:2]
    over = mask.block_mask(len(context[0]), own[0].shape[1], length, causal)
    keys, values = (torch.cat([c, o.flatten(0, 1)]) for c, o in zip(context, own, strict=True))
    mixed = _attend(q.flatten(0, 1), keys, values, over)
    return mixed.unflatten(0, (count, length)).to(values.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, over: BlockMask) -> Tensor:
    """[R, Q, D] over [S, G, D]: [R, Q * D]."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, keys, values = (x.to(torch.get_autocast_dtype(device)) for x in (q, keys, values))
    ready = [x.transpose(0, 1)[None].to(values.dtype) for x in (q, keys, values)]
    run = _compiled()[0] if device == "cuda" else _UNCOMPILED[0]
    mixed: Tensor = run(*ready, block_mask=over, enable_gqa=True)
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
