"""Packing: rows of different lengths -> batches of about the same number of tokens.

A batch is one packed row of whole documents. Which rows meet is drawn anew every epoch, from (seed, epoch) alone, so
that a resumed run sees what an uninterrupted one saw. No row is dropped or cut; a row longer than a batch is a
batch by itself.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Mapping, Sequence


def pack(lengths: Mapping[int, int], batch_tokens: int, order: Sequence[int]) -> list[list[int]]:
    """Put rows, taken in `order`, into the fullest batch that still has room.

    Args:
        lengths: row -> tokens.
        batch_tokens: room in a batch.
        order: every row once.

    Returns: batches of rows; n log n in the number of rows.
    """
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, batch), ascending
    for row in order:
        length = lengths[row]
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            batches.append([row])
            free, batch = batch_tokens - length, len(batches) - 1
        else:
            free, batch = room.pop(place)
            free -= length
            batches[batch].append(row)
        if free > 0:
            bisect.insort(room, (free, batch))
    return batches


def training_batches(lengths: Mapping[int, int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, in the order in which they are trained on."""
    draw = random.Random(f"{seed} {epoch}")
    order = sorted(lengths)
    draw.shuffle(order)
    batches = pack(lengths, batch_tokens, order)
    draw.shuffle(batches)  # the last ones packed are the emptiest, and must not always come last
    return batches


def validation_batches(lengths: Mapping[int, int], batch_tokens: int) -> list[list[int]]:
    """The same batches every time, longest rows first."""
    return pack(lengths, batch_tokens, sorted(lengths, key=lambda row: (-lengths[row], row)))


def held_out(conversation: str, share: float) -> bool:
    """Whether a conversation is validated on: by a digest of its id, so that all its rows go the same way.

    The digest has a salt of its own: what evaluation holds out is chosen by the id too, by another choice.
    """
    digest = hashlib.sha256(f"validation {conversation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
