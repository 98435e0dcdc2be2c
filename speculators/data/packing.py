"""Packing: rows of different lengths -> batches of about the same number of tokens.

A batch is one packed row of documents. Which of them meet is drawn anew every epoch, from (seed, epoch) alone, so
that a resumed run sees what an uninterrupted one saw. Nothing is dropped. A row that is longer than a batch is trained
on in pieces, each with all that comes before it as context: at equal tokens more and smaller updates learn more,
as long as there are few of them (docs/log.md).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class Piece:
    """Part of a row: what is supervised of it in one step. The row's tokens up to `end` are there to be seen."""

    row: int
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """What it adds to a batch; a context before `begin` is not counted."""
        return self.end - self.begin


def pieces(row: int, length: int, supervised: Sequence[int], batch_tokens: int) -> list[Piece]:
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
    return [Piece(row, begin, end) for begin, end in itertools.pairwise(cuts)]


def pack(ordered: Iterable[Piece], batch_tokens: int) -> list[list[Piece]]:
    """Put pieces, as they come, into the fullest batch that still has room; one that is longer is a batch by itself.

    n log n in the number of pieces.
    """
    batches: list[list[Piece]] = []
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


def training_batches(every: Iterable[Piece], batch_tokens: int, seed: int, epoch: int) -> list[list[Piece]]:
    """The batches of one epoch, in the order in which they are trained on."""
    draw = random.Random(f"{seed} {epoch}")
    order = sorted(every)
    draw.shuffle(order)
    batches = pack(order, batch_tokens)
    draw.shuffle(batches)  # the last ones packed are the emptiest, and must not always come last
    return batches


def validation_batches(every: Iterable[Piece], batch_tokens: int) -> list[list[Piece]]:
    """The same batches every time, longest pieces first."""
    return pack(sorted(every, key=lambda piece: (-piece.tokens, piece)), batch_tokens)


def held_out(conversation: str, share: float) -> bool:
    """Whether a conversation is validated on: by a digest of its id, so that all its rows go the same way.

    The digest has a salt of its own: what evaluation holds out is chosen by the id too, by another choice.
    """
    digest = hashlib.sha256(f"validation {conversation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
