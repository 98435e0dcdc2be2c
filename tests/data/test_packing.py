"""Packing: batches have every row once, fit, are the same for a seed, and differ between epochs."""

from __future__ import annotations

import random

import pytest

from speculators.config.choices import Packing
from speculators.data.packing import (
    RowSlice,
    balance,
    divide,
    in_validation_split,
    pack,
    slice_row,
    training_batches,
    validation_batches,
)


def whole(lengths: dict[int, int]) -> list[RowSlice]:
    return [RowSlice(row, 0, length) for row, length in lengths.items()]


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
    found = slice_row(7, length, supervised, batch_tokens=64)
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
    held = [name for name in names if in_validation_split(name, 0.1)]
    assert len(held) == pytest.approx(400, rel=0.15)
    assert [name for name in names if in_validation_split(name, 0.1)] == held
    assert set(held) < {name for name in names if in_validation_split(name, 0.2)}
    assert not any(in_validation_split(name, 0.0) for name in names)


def test_a_batch_is_dealt_evenly_and_whole() -> None:
    assert divide(whole({0: 7, 1: 3, 2: 6, 3: 5, 4: 5, 5: 4}), 2) == [
        whole({0: 7, 1: 3, 4: 5}),  # 7 | 6, then 5 to the 6, 5 to the 7, 4 to the 11, 3 to the 12
        whole({2: 6, 3: 5, 5: 4}),
    ]
    batch = [RowSlice(0, 10, 40), *whole({1: 12, 2: 12})]
    assert divide(batch, 2) == [[batch[0]], batch[1:]]  # what comes before a piece is run through too
    assert divide(batch, 5) == [[batch[0]], [batch[1]], [batch[2]], [], []]
    assert divide(batch, 1) == [batch]


@pytest.mark.parametrize("seed", range(5))
def test_no_pack_of_a_divided_batch_is_much_longer_than_another(seed: int) -> None:
    draw = random.Random(seed)
    batch = whole({row: draw.randint(20, 400) for row in range(80)})
    packs = divide(batch, 4)
    assert sorted(piece for pack in packs for piece in pack) == batch
    tokens = [sum(piece.tokens for piece in pack) for pack in packs]
    assert max(tokens) - min(tokens) <= 40


@pytest.mark.parametrize("seed", range(5))
def test_balanced_batches_hold_every_row_once_and_are_about_equally_long(seed: int) -> None:
    draw = random.Random(seed)
    rows = whole({row: draw.randint(1, 400) for row in range(2000)})
    batches = training_batches(rows, 2048, seed, 1, Packing.lpt)
    assert sorted(piece for batch in batches for piece in batch) == rows
    tokens = [sum(piece.tokens for piece in batch) for batch in batches]
    assert max(tokens) <= 2048
    assert min(tokens) >= 0.95 * max(tokens)
    assert len(batches) <= 1.05 * sum(row.tokens for row in rows) / 2048 + 1
    assert batches != training_batches(rows, 2048, seed, 2, Packing.lpt)
    assert batches == training_batches(rows[::-1], 2048, seed, 1, Packing.lpt)


def test_balancing_takes_as_few_batches_as_it_can_and_leaves_long_pieces_alone() -> None:
    a, b, c, d, e = whole({0: 6, 1: 5, 2: 4, 3: 3, 4: 30})
    assert balance([d, e, c, b, a], 9) == [[e], [d, a], [c, b]]  # 6 | 5 | 4 to the 5, 3 to the 6
    assert balance([], 9) == []
