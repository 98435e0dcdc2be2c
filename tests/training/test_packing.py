"""Packing: every row once, never too full, the same from the same seed, another way every epoch."""

from __future__ import annotations

import random

import pytest

from speculators.data.packing import Piece, held_out, pack, pieces, training_batches, validation_batches


def whole(lengths: dict[int, int]) -> list[Piece]:
    return [Piece(row, 0, length) for row, length in lengths.items()]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_exactly_one_batch_and_no_batch_is_too_full(seed: int) -> None:
    draw = random.Random(seed)
    rows = whole({row: draw.randint(1, 400) for row in draw.sample(range(10_000), 300)})
    batches = training_batches(rows, 512, seed, epoch=1)
    assert sorted(piece for batch in batches for piece in batch) == sorted(rows)
    assert max(sum(piece.tokens for piece in batch) for batch in batches) <= 512
    assert len(batches) <= 1.1 * sum(row.tokens for row in rows) / 512 + 1


def test_a_piece_longer_than_a_batch_is_a_batch_by_itself() -> None:
    a, b, c = whole({0: 10, 1: 700, 2: 20})
    assert pack([a, b, c], 512) == [[a, c], [b]]


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_a_row_cover_it_once_and_share_its_supervision(seed: int) -> None:
    draw = random.Random(seed)
    length = draw.randint(2, 900)
    supervised = sorted(draw.sample(range(length), draw.randint(1, length - 1)))
    found = pieces(7, length, supervised, batch_tokens=64)
    assert [found[0].begin, *(p.end for p in found)] == [*(p.begin for p in found), length]
    assert {piece.row for piece in found} == {7}
    shares = [sum(p.begin <= place < p.end for place in supervised) for p in found]
    assert sum(shares) == len(supervised)
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1
    assert len(found) == min(-(-length // 64), len(supervised))


def test_packs_follow_from_seed_and_epoch_alone() -> None:
    rows = whole({row: 1 + row % 37 for row in range(200)})
    again = training_batches(rows[::-1], 64, 7, 3)
    assert training_batches(rows, 64, 7, 3) == again
    assert training_batches(rows, 64, 7, 4) != again
    assert training_batches(rows, 64, 8, 3) != again
    assert validation_batches(rows, 64) == validation_batches(rows[::-1], 64)


def test_about_the_share_asked_for_is_held_out_whatever_else_is_held_out() -> None:
    names = [f"conversation-{i}" for i in range(4000)]
    held = [name for name in names if held_out(name, 0.1)]
    assert len(held) == pytest.approx(400, rel=0.15)
    assert [name for name in names if held_out(name, 0.1)] == held
    assert set(held) < {name for name in names if held_out(name, 0.2)}
    assert not any(held_out(name, 0.0) for name in names)
