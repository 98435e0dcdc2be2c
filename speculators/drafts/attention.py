"""Attention over unrolled steps, and of blocks that hang at anchors.

It follows the documents of the pack: scores are computed within each document only, and no mask over the whole pack
exists. On a CPU `ops.cpu` computes for every query what it sees, and nothing else; on a GPU `flex` does. Where there is
neither, it is done here in torch, block of queries by block: `causal_blocks` and `spans` say how to go about it.

Two kinds of drafts are served: those that go on from every place, by steps (`unrolled_attention`), and those that fill
in blocks hanging at anchors (`anchored_attention`). A block sees the context of its own document strictly before its
anchor, which is decided by places of tokens and never by the order of blocks, and itself; no other block.

Shapes: T tokens of the pack; R rows that ask (queries), R <= T; G key-value heads; Q query heads; D head width; L
queries of a block; S keys that the block sees; K unrolled steps so far. Of anchored blocks: C context places; R blocks;
B slots of a block; L of them ask, the last L; A blocks of a span; S context places that a span sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators.drafts.flex import AnchorMask, CausalMask, anchored, unrolled
from speculators.ops import cpu
from speculators.ops.cpu import Kernels, Seen

QUERY_BLOCK = 256
"""Queries whose scores exist at one time; keys after the block's last query are not computed at all."""
SPAN_QUERIES = 256
"""Queries whose scores exist at one time, about."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of one document that are computed together."""

    queries: slice
    """Their places among the rows that ask."""
    keys: slice
    """The document's tokens up to the last of them, as places in the pack."""
    future: Tensor
    """bool [L, S]: key comes after query."""


def causal_blocks(documents: Sequence[tuple[int, int]], asking: Tensor) -> list[Block] | CausalMask:
    """Say what the queries of a pack see, or cut them into blocks.

    Args:
        documents: (first token, length) of each document in the pack, in order.
        asking: ascending places in the pack of the rows that ask, int64 [R].
    """
    if _by_ranges(asking.device):
        return causal_mask(documents, asking)
    blocks = []
    bounds = torch.tensor([start + length for start, length in documents], device=asking.device)
    ends = torch.searchsorted(asking, bounds).tolist()
    first = 0
    for (start, _), end in zip(documents, ends, strict=True):
        for begin in range(first, end, QUERY_BLOCK):
            places = asking[begin : min(begin + QUERY_BLOCK, end)]
            keys = slice(start, int(places[-1]) + 1)
            order = torch.arange(keys.start, keys.stop, device=asking.device)
            blocks.append(Block(slice(begin, begin + len(places)), keys, order[None, :] > places[:, None]))
        first = end
    return blocks


def causal_mask(documents: Sequence[tuple[int, int]], asking: Tensor) -> CausalMask:
    """What queries see; arguments as in `causal_blocks`."""
    starts, lengths = torch.tensor(list(documents), device=asking.device).view(-1, 2).unbind(1)
    return CausalMask(starts.repeat_interleave(lengths)[asking], asking)


@dataclass(slots=True)
class KeyValues:
    """What one layer's queries may see: every token of step 0, and of each later step the query's own place."""

    keys: Tensor
    """[T, G, D]"""
    values: Tensor
    """[T, G, D]"""
    own: list[tuple[Tensor, Tensor]]
    """Keys and values of steps 1, 2, ..., each [R, G, D]."""


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def unrolled_attention(q: Tensor, cache: KeyValues, blocks: Sequence[Block] | CausalMask) -> Tensor:
    """Causal attention inside documents over step 0, plus each query's own entries of the later steps.

    On a CPU it is computed in float32: its products are small, and of another shape each time.

    Args:
        q: queries [R, Q, D], rotated.
        cache: the layer's keys (rotated) and values.
        blocks: of the same R rows.

    Returns: [R, Q * D].
    """
    _, heads, width = q.shape
    if isinstance(blocks, CausalMask):
        if loops := cpu.kernels(q):
            none = q.new_empty(len(q), 0, *cache.keys.shape[1:])
            k, v = [torch.stack(each, 1) for each in zip(*cache.own, strict=True)] or [none, none]
            seen_by = Seen(blocks.first, blocks.last + 1)
            return _attended(loops, seen_by, q[:, None], (cache.keys, cache.values), (k, v)).flatten(1)
        steps = [(cache.keys, cache.values), *cache.own]
        return unrolled(q, [k for k, _ in steps], [v for _, v in steps], blocks) if len(q) else q.flatten(1)
    groups = cache.keys.shape[1]
    scaled = q * (1.0 / math.sqrt(width))
    keys, values = cache.keys.transpose(0, 1), cache.values.float().transpose(0, 1)  # [G, T, D]
    out = []
    for block in blocks:
        length, seen = block.future.shape
        # Query heads of one group become rows of one product with the group's keys.
        asked = scaled[block.queries].view(length, groups, heads // groups, width).permute(1, 2, 0, 3)
        rows = asked.reshape(groups, -1, width)
        scores = (rows @ keys[:, block.keys].transpose(1, 2)).view(groups, -1, length, seen)
        scores = scores.masked_fill(block.future, float("-inf"))
        own_k = [k[block.queries].transpose(0, 1)[:, None] for k, _ in cache.own]  # [G, 1, L, D]
        own_scores = [(asked * k).sum(-1, keepdim=True) for k in own_k]
        shares, *own_shares = (
            torch.cat([scores, *own_scores], dim=-1).softmax(-1).split([seen, *(1 for _ in own_k)], -1)
        )
        mixed = shares.reshape(groups, -1, seen) @ values[:, block.keys]
        mixed = mixed.view(groups, -1, length, width)
        for share, (_, v) in zip(own_shares, cache.own, strict=True):
            mixed = mixed + share * v[block.queries].transpose(0, 1)[:, None]
        out.append(mixed.permute(2, 0, 1, 3).reshape(length, heads * width))
    return torch.cat(out) if out else q.new_zeros(0, heads * width)


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks of one document that are computed together."""

    blocks: slice
    """Their places among the blocks."""
    context: slice
    """What any of them sees, as places in the context."""
    hidden: Tensor
    """bool [A, S]: not seen by this block."""


def context_places(documents: Sequence[tuple[int, int]], anchors: Tensor) -> Tensor:
    """The places of a pack that some block sees, ascending, int64 [C]: each document's up to its last anchor.

    Args:
        documents: (first token, length) of each document in the pack, in order.
        anchors: places in the pack, ascending, int64 [R].
    """
    ranges = [torch.arange(start, int(own[-1])) for start, own, _ in _by_document(documents, anchors)]
    return torch.cat(ranges).to(anchors.device) if ranges else anchors.new_empty(0)


def spans(
    documents: Sequence[tuple[int, int]], anchors: Tensor, slots: int, window: int | None = None
) -> list[Span] | AnchorMask:  # fmt: skip
    """Say what the blocks of a pack see of the context that `context_places` gives, or cut them into spans.

    Args:
        documents: as there.
        anchors: as there.
        slots: of a block.
        window: tokens before its anchor that a block sees; all of its document if None.
    """
    if _by_ranges(anchors.device):
        return anchor_mask(documents, anchors, window)
    found = []
    many, before = max(1, SPAN_QUERIES // slots), 0
    for start, own, first in _by_document(documents, anchors):
        for begin in range(0, len(own), many):
            part = own[begin : begin + many]
            lowest = start if window is None else max(start, int(part[0]) - window)
            places = torch.arange(lowest, int(part[-1]), device=anchors.device)[None, :]
            hidden = places >= part[:, None]
            if window is not None:
                hidden |= places < part[:, None] - window
            context = slice(before + lowest - start, before + int(part[-1]) - start)
            found.append(Span(slice(first + begin, first + begin + len(part)), context, hidden))
        before += int(own[-1]) - start
    return found


def anchor_mask(documents: Sequence[tuple[int, int]], anchors: Tensor, window: int | None = None) -> AnchorMask:
    """What blocks see; arguments as in `spans`."""
    first, end, before = [], [], 0
    for start, own, _ in _by_document(documents, anchors):
        end.append(own - start + before)
        first.append(torch.full_like(own, before) if window is None else (end[-1] - window).clamp(min=before))
        before += int(own[-1]) - start
    return AnchorMask(torch.cat(first), torch.cat(end)) if end else AnchorMask(anchors, anchors)


def _by_document(documents: Sequence[tuple[int, int]], anchors: Tensor) -> list[tuple[int, Tensor, int]]:
    """(first token, its anchors, number of anchors before) of each document that has any."""
    bounds = torch.tensor([start + length for start, length in documents], device=anchors.device)
    ends = [0, *torch.searchsorted(anchors, bounds).tolist()]
    return [
        (start, anchors[ends[i] : ends[i + 1]], ends[i])
        for i, (start, _) in enumerate(documents)
        if ends[i + 1] > ends[i]
    ]


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def anchored_attention(
    q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
    over: Sequence[Span] | AnchorMask, causal: bool,
) -> Tensor:  # fmt: skip
    """Attention of every block to the context that it sees and to itself; on a CPU in float32, as above.

    Args:
        q: queries of the last L slots of each block [R, L, Q, D], rotated.
        context: keys (rotated) and values of the context, each [C, G, D].
        own: those of the blocks, each [R, B, G, D].
        over: all R blocks, in order.
        causal: a slot sees only itself and those before it of its own block.

    Returns: [R, L, Q * D].
    """
    count, length, heads, width = q.shape
    if isinstance(over, AnchorMask):
        if loops := cpu.kernels(q):
            return _attended(loops, Seen(over.first, over.end, causal), q, context, own).flatten(2)
        return anchored(q, context, own, over, causal) if count else q.flatten(2)
    slots, groups = own[0].shape[1:3]
    shared = heads // groups
    scaled = q * (1.0 / math.sqrt(width))
    keys, values = (x.float().transpose(0, 1) for x in context)  # [G, C, D]
    own_keys, own_values = (x.float().permute(2, 0, 1, 3) for x in own)  # [G, R, B, D]
    order = torch.arange(slots, device=q.device)
    later = (order[None, :] > order[slots - length :, None]) if causal else None  # [L, B]
    out = []
    for span in over:
        blocks, seen = span.hidden.shape
        # Query heads of one group and slots of one block become rows of one product with the group's keys.
        asked = scaled[span.blocks].view(blocks, length, groups, shared, width).permute(2, 0, 3, 1, 4)
        rows = asked.reshape(groups, blocks, shared * length, width)
        scores = rows.view(groups, -1, width) @ keys[:, span.context].transpose(1, 2)
        scores = scores.view(groups, blocks, shared * length, seen)
        scores = scores.masked_fill(span.hidden[:, None], float("-inf"))
        inside = rows @ own_keys[:, span.blocks].transpose(2, 3)
        if later is not None:
            inside = inside.view(groups, blocks, shared, length, slots).masked_fill(later, float("-inf")).flatten(2, 3)
        shares, own_shares = torch.cat([scores, inside], dim=-1).softmax(-1).split([seen, slots], -1)
        mixed = shares.reshape(groups, blocks * shared * length, seen) @ values[:, span.context]
        mixed = mixed.view(groups, blocks, shared * length, width) + own_shares @ own_values[:, span.blocks]
        mixed = mixed.view(groups, blocks, shared, length, width).permute(1, 3, 0, 2, 4)
        out.append(mixed.reshape(blocks, length, heads * width))
    return torch.cat(out) if out else q.new_zeros(count, length, heads * width)


def _by_ranges(device: torch.device) -> bool:
    """Whether attention is computed there by what each query sees, not block by block."""
    return device.type == "cuda" or (device.type == "cpu" and cpu.kernels() is not None)


def _attended(
    loops: Kernels, seen: Seen, q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> Tensor:  # fmt: skip
    """As `Kernels.attend`, with slopes."""
    out: Tensor = _Attended.apply(loops, seen, *(x.float().contiguous() for x in (q, *context, *own)))
    return out


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loops: Kernels, seen: Seen, *tensors: Tensor) -> Tensor:
        out, logs = loops.attend(seen, *tensors)
        ctx.loops, ctx.seen = loops, seen
        ctx.save_for_backward(out, logs, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        out, logs, *tensors = ctx.saved_tensors
        return None, None, *ctx.loops.attend_slopes(slopes[0].contiguous(), out, logs, ctx.seen, *tensors)
