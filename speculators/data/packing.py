"""Packing: rows of different lengths -> batches of about the same number of tokens.

The rows of a batch are laid end to end. Which rows share one is drawn anew every epoch, from (seed, epoch) alone, so
that a resumed run sees what an uninterrupted one saw. Nothing is dropped. A row that is longer than a batch is cut
into row slices, each with all tokens before it as context: at equal tokens, more and smaller updates learn more, as
long as there are few of them (docs/log.md).
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from speculators.config.choices import Packing

WINDOW = 32
"""Batches that are balanced together, about: with more, the same long rows would share a batch in every epoch."""


@dataclass(frozen=True, order=True, slots=True)
class RowSlice:
    """Positions [begin, end) of a row: what a batch supervises of it. The tokens before `begin` are context."""

    row: int
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """Number of positions, without the context."""
        return self.end - self.begin


def slice_row(row: int, length: int, supervised: Sequence[int], batch_tokens: int) -> list[RowSlice]:
    """Cut a row that is longer than a batch into slices with about the same number of supervised tokens.

    Args:
        row: number of the row.
        length: its number of tokens.
        supervised: ascending positions of the supervised tokens; not used if the row fits.
        batch_tokens: size of a batch.

    Returns: slices that cover the row, in order; one if it fits, and no more than there are supervised tokens.
    """
    parts = max(1, min(-(-length // batch_tokens), len(supervised)))
    cuts = [0, *(supervised[len(supervised) * part // parts] for part in range(1, parts)), length]
    return [RowSlice(row, begin, end) for begin, end in itertools.pairwise(cuts)]


def pack(ordered: Iterable[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """Best fit: put each slice into the fullest batch that it fits into; one that is longer is a batch by itself.

    Takes n log n steps for n slices.
    """
    batches: list[list[RowSlice]] = []
    capacities: list[tuple[int, int]] = []  # (free tokens, batch), ascending
    for row_slice in ordered:
        index = bisect.bisect_left(capacities, (row_slice.tokens, -1))
        if index == len(capacities):
            batches.append([row_slice])
            free, batch = batch_tokens - row_slice.tokens, len(batches) - 1
        else:
            free, batch = capacities.pop(index)
            free -= row_slice.tokens
            batches[batch].append(row_slice)
        if free > 0:
            bisect.insort(capacities, (free, batch))
    return batches


def balance(ordered: Sequence[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """Put slices into batches of about equal length: those that come next, for about `WINDOW` batches at a time.

    In such a window each slice, the longest first, goes to the shortest batch (longest processing time first, Graham
    1969), with as few batches as this can do. A slice that is longer than a batch is one by itself.
    """
    batches = [[row_slice] for row_slice in ordered if row_slice.tokens >= batch_tokens]
    short = [row_slice for row_slice in ordered if row_slice.tokens < batch_tokens]
    total = sum(row_slice.tokens for row_slice in short)
    windows: list[list[RowSlice]] = [[] for _ in range(max(1, round(total / (WINDOW * batch_tokens))))]
    before = 0
    for row_slice in short:
        windows[before * len(windows) // total].append(row_slice)
        before += row_slice.tokens
    return batches + [batch for window in windows for batch in _balanced(window, batch_tokens)]


def _balanced(window: Sequence[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    count = -(-sum(row_slice.tokens for row_slice in window) // batch_tokens)
    while window:
        batches = divide(window, count, context=False)
        if max(sum(row_slice.tokens for row_slice in batch) for batch in batches) <= batch_tokens:
            return batches
        count += 1
    return []


def training_batches(
    slices: Iterable[RowSlice], batch_tokens: int, seed: int, epoch: int, packing: Packing = Packing.best_fit
) -> list[list[RowSlice]]:
    """Return the batches of one epoch, in the order in which they are trained on."""
    draw = random.Random(f"{seed} {epoch}")
    order = sorted(slices)
    draw.shuffle(order)
    batches = (balance if packing is Packing.lpt else pack)(order, batch_tokens)
    draw.shuffle(batches)  # the last ones packed are the emptiest, and must not always come last
    return batches


def divide(batch: Sequence[RowSlice], parts: int, *, context: bool = True) -> list[list[RowSlice]]:
    """Divide the slices of a batch into `parts` smaller batches with about the same number of tokens.

    Each slice, the longest first, goes to the shortest part (longest processing time first): the longest part is at
    most a third longer than the best division's. Parts keep the batch's order; with too few slices, some are empty.
    Without `context`, the tokens before a slice do not count.
    """
    sizes = [row_slice.end if context else row_slice.tokens for row_slice in batch]
    order = sorted(range(len(batch)), key=lambda index: (-sizes[index], index))
    divided: list[list[int]] = [[] for _ in range(parts)]
    shortest = [(0, part) for part in range(parts)]
    for index in order:
        tokens, part = heapq.heappop(shortest)
        divided[part].append(index)
        heapq.heappush(shortest, (tokens + sizes[index], part))
    return [[batch[index] for index in sorted(part)] for part in divided]


def validation_batches(slices: Iterable[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """Return the batches of the validation split, the same every time, longest slices first."""
    return pack(sorted(slices, key=lambda row_slice: (-row_slice.tokens, row_slice)), batch_tokens)


def in_validation_split(conversation: str, ratio: float) -> bool:
    """Whether a conversation is in the validation split; a digest of its id decides, for all of its rows.

    The digest is salted, so that the choice does not depend on that of `data.conversations.in_evaluation_holdout`.
    """
    digest = hashlib.sha256(f"validation {conversation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < ratio * 2**64
