"""Packing: rows of different lengths -> batches of about the same number of tokens.

A batch is one packed row of documents. Which of them meet is drawn anew every epoch, from (seed, epoch) alone, so
that a resumed run sees what an uninterrupted one saw. Nothing is dropped. A row that is longer than a batch is trained
on in pieces, each with all that comes before it as context: at equal tokens more and smaller updates learn more,
as long as there are few of them (docs/log.md).
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
"""Batches that are balanced among themselves, about: with more, the same long rows would meet in every epoch."""


@dataclass(frozen=True, order=True, slots=True)
class RowSlice:
    """Part of a row: what is supervised of it in one step. The row's tokens up to `end` are there to be seen."""

    row: int
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """What it adds to a batch; a context before `begin` is not counted."""
        return self.end - self.begin


def slice_row(row: int, length: int, supervised: Sequence[int], batch_tokens: int) -> list[RowSlice]:
    """Cut a row that is longer than a batch, so that every piece has about as many supervised tokens.

    Args:
        row: its number.
        length: its tokens.
        supervised: ascending places of the supervised ones; not looked at if the row fits.
        batch_tokens: room in a batch.

    Returns: pieces that cover the row, in order; one if it fits, and no more than there are supervised tokens.
    """
    parts = max(1, min(-(-length // batch_tokens), len(supervised)))
    cuts = [0, *(supervised[len(supervised) * part // parts] for part in range(1, parts)), length]
    return [RowSlice(row, begin, end) for begin, end in itertools.pairwise(cuts)]


def pack(ordered: Iterable[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """Put pieces, as they come, into the fullest batch that still has room; one that is longer is a batch by itself.

    n log n in the number of pieces.
    """
    batches: list[list[RowSlice]] = []
    room: list[tuple[int, int]] = []  # (free tokens, batch), ascending
    for piece in ordered:
        place = bisect.bisect_left(room, (piece.tokens, -1))
        if place == len(room):
            batches.append([piece])
            free, batch = batch_tokens - piece.tokens, len(batches) - 1
        else:
            free, batch = room.pop(place)
            free -= piece.tokens
            batches[batch].append(piece)
        if free > 0:
            bisect.insort(room, (free, batch))
    return batches


def balance(ordered: Sequence[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """Put pieces into batches of about equal length: about `WINDOW` batches at a time, of the pieces that come next.

    In a window, the longest piece goes first, each where there is least (LPT); there are as few batches as that can
    do with. A piece that is longer than a batch is one by itself.
    """
    batches = [[piece] for piece in ordered if piece.tokens >= batch_tokens]
    short = [piece for piece in ordered if piece.tokens < batch_tokens]
    total = sum(piece.tokens for piece in short)
    windows: list[list[RowSlice]] = [[] for _ in range(max(1, round(total / (WINDOW * batch_tokens))))]
    before = 0
    for piece in short:
        windows[before * len(windows) // total].append(piece)
        before += piece.tokens
    return batches + [batch for window in windows for batch in _balanced(window, batch_tokens)]


def _balanced(window: Sequence[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    count = -(-sum(piece.tokens for piece in window) // batch_tokens)
    while window:
        batches = divide(window, count, context=False)
        if max(sum(piece.tokens for piece in batch) for batch in batches) <= batch_tokens:
            return batches
        count += 1
    return []


def training_batches(
    every: Iterable[RowSlice], batch_tokens: int, seed: int, epoch: int, packing: Packing = Packing.best_fit
) -> list[list[RowSlice]]:
    """The batches of one epoch, in the order in which they are trained on."""
    draw = random.Random(f"{seed} {epoch}")
    order = sorted(every)
    draw.shuffle(order)
    batches = (balance if packing is Packing.lpt else pack)(order, batch_tokens)
    draw.shuffle(batches)  # the last ones packed are the emptiest, and must not always come last
    return batches


def divide(batch: Sequence[RowSlice], parts: int, *, context: bool = True) -> list[list[RowSlice]]:
    """Deal the pieces of a batch to `parts` packs so that all have about the same number of tokens to run through.

    The longest piece comes first, and each goes where there is least (LPT): the fullest has at most a third more than
    it had to have. Packs hold their pieces in the batch's order; where there are fewer pieces, some are empty. Without
    `context`, what comes before a piece does not count.
    """
    sizes = [piece.end if context else piece.tokens for piece in batch]
    order = sorted(range(len(batch)), key=lambda index: (-sizes[index], index))
    dealt: list[list[int]] = [[] for _ in range(parts)]
    least = [(0, part) for part in range(parts)]
    for index in order:
        tokens, part = heapq.heappop(least)
        dealt[part].append(index)
        heapq.heappush(least, (tokens + sizes[index], part))
    return [[batch[index] for index in sorted(part)] for part in dealt]


def validation_batches(every: Iterable[RowSlice], batch_tokens: int) -> list[list[RowSlice]]:
    """The same batches every time, longest pieces first."""
    return pack(sorted(every, key=lambda piece: (-piece.tokens, piece)), batch_tokens)


def in_validation_split(conversation: str, share: float) -> bool:
    """Whether a conversation is validated on: by a digest of its id, so that all its rows go the same way.

    The digest has a salt of its own: what evaluation holds out is chosen by the id too, by another choice.
    """
    digest = hashlib.sha256(f"validation {conversation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
