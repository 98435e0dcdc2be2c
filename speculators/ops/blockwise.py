"""Attention by torch operations, one group of queries at a time.

It serves CPUs without a compiler and devices without a kernel of their own. Scores exist for a few hundred queries at
a time, and only over keys that one of them sees.

Shapes: R queries or blocks; G key-value heads; Q query heads; D head width; L queries of a group or of a block;
S keys that a group sees; C context positions; B slots of a block; A blocks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from speculators.ops.masks import AnchorMask, CausalMask

QUERIES = 256
"""Approximate number of queries whose scores exist at a time."""

KeyValue = tuple[Tensor, Tensor]
Group = tuple[slice, slice, Tensor]
"""Rows computed together; the keys that any of them sees; which of these keys each row does not see, bool."""


def blockwise_causal(
    query_states: Tensor, key_states: Tensor, value_states: Tensor, later_steps: Sequence[KeyValue], mask: CausalMask
) -> Tensor:
    """Compute `attention.causal_attention`; arguments as the fields of `KeyValues`."""
    _, heads, width = query_states.shape
    groups = key_states.shape[1]
    scaled = query_states * (1.0 / math.sqrt(width))
    keys, values = key_states.transpose(0, 1), value_states.float().transpose(0, 1)  # [G, T, D]
    out = []
    for rows, context, hidden in _causal_groups(mask):
        length, seen = hidden.shape
        # Query heads of one group become rows of one product with the group's keys.
        queries = scaled[rows].view(length, groups, heads // groups, width).permute(1, 2, 0, 3)
        scores = queries.reshape(groups, -1, width) @ keys[:, context].transpose(1, 2)
        scores = scores.view(groups, -1, length, seen).masked_fill(hidden, float("-inf"))
        step_keys = [k[rows].transpose(0, 1)[:, None] for k, _ in later_steps]  # [G, 1, L, D]
        step_scores = [(queries * k).sum(-1, keepdim=True) for k in step_keys]
        weights, *step_weights = (
            torch.cat([scores, *step_scores], dim=-1).softmax(-1).split([seen, *(1 for _ in step_keys)], -1)
        )
        mixed = weights.reshape(groups, -1, seen) @ values[:, context]
        mixed = mixed.view(groups, -1, length, width)
        for weight, (_, v) in zip(step_weights, later_steps, strict=True):
            mixed = mixed + weight * v[rows].transpose(0, 1)[:, None]
        out.append(mixed.permute(2, 0, 1, 3).reshape(length, heads * width))
    return torch.cat(out) if out else query_states.new_zeros(0, heads * width)


def blockwise_anchored(
    query_states: Tensor, context: KeyValue, block: KeyValue, mask: AnchorMask, is_causal: bool
) -> Tensor:
    """Compute `attention.anchored_attention`."""
    count, length, heads, width = query_states.shape
    slots, groups = block[0].shape[1:3]
    shared = heads // groups
    scaled = query_states * (1.0 / math.sqrt(width))
    keys, values = (x.float().transpose(0, 1) for x in context)  # [G, C, D]
    block_keys, block_values = (x.float().permute(2, 0, 1, 3) for x in block)  # [G, R, B, D]
    order = torch.arange(slots, device=query_states.device)
    later = (order[None, :] > order[slots - length :, None]) if is_causal else None  # [L, B]
    out = []
    for rows, seen_range, hidden in _anchor_groups(mask, slots):
        blocks, seen = hidden.shape
        # Query heads of one group and slots of one block become rows of one product with the group's keys.
        queries = scaled[rows].view(blocks, length, groups, shared, width).permute(2, 0, 3, 1, 4)
        queries = queries.reshape(groups, blocks, shared * length, width)
        scores = queries.view(groups, -1, width) @ keys[:, seen_range].transpose(1, 2)
        scores = scores.view(groups, blocks, shared * length, seen)
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
        block_scores = queries @ block_keys[:, rows].transpose(2, 3)
        if later is not None:
            block_scores = (
                block_scores.view(groups, blocks, shared, length, slots).masked_fill(later, float("-inf")).flatten(2, 3)
            )
        weights, block_weights = torch.cat([scores, block_scores], dim=-1).softmax(-1).split([seen, slots], -1)
        mixed = weights.reshape(groups, blocks * shared * length, seen) @ values[:, seen_range]
        mixed = mixed.view(groups, blocks, shared * length, width) + block_weights @ block_values[:, rows]
        mixed = mixed.view(groups, blocks, shared, length, width).permute(1, 3, 0, 2, 4)
        out.append(mixed.reshape(blocks, length, heads * width))
    return torch.cat(out) if out else query_states.new_zeros(count, length, heads * width)


def _causal_groups(mask: CausalMask) -> list[Group]:
    """Return groups of queries, each of one document."""
    if "groups" not in mask.cache:
        mask.cache["groups"] = []
        for rows in _runs(mask.first, QUERIES):
            last = mask.last[rows]
            keys = slice(int(mask.first[rows.start]), int(last[-1]) + 1)
            positions = torch.arange(keys.start, keys.stop, device=last.device)
            mask.cache["groups"].append((rows, keys, positions[None, :] > last[:, None]))
    groups: list[Group] = mask.cache["groups"]
    return groups


def _anchor_groups(mask: AnchorMask, slots: int) -> list[Group]:
    """Return groups of blocks, each of one document."""
    if ("groups", slots) not in mask.cache:
        built: list[Group] = []
        for rows in _runs(mask.document, max(1, QUERIES // slots)):
            first, end = mask.first[rows], mask.end[rows]
            keys = slice(int(first[0]), int(end[-1]))
            positions = torch.arange(keys.start, keys.stop, device=end.device)[None, :]
            built.append((rows, keys, (positions >= end[:, None]) | (positions < first[:, None])))
        mask.cache["groups", slots] = built
    groups: list[Group] = mask.cache["groups", slots]
    return groups


def _runs(document: Tensor, limit: int) -> Iterator[slice]:
    """Yield slices of equal consecutive values, at most `limit` long."""
    first = 0
    for count in document.unique_consecutive(return_counts=True)[1].tolist():
        for begin in range(first, first + count, limit):
            yield slice(begin, min(begin + limit, first + count))
        first += count
