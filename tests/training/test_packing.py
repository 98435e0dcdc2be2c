"""Packing: every row once, never too full, the same from the same seed, another way every epoch."""

from __future__ import annotations

import random

import pytest

from speculators.data.packing import held_out, pack, training_batches, validation_batches


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_exactly_one_batch_and_no_batch_is_too_full(seed: int) -> None:
    draw = random.Random(seed)
    lengths = {row: draw.randint(1, 400) for row in draw.sample(range(10_000), 300)}
    batches = training_batches(lengths, 512, seed, epoch=1)
    assert sorted(row for batch in batches for row in batch) == sorted(lengths)
    assert max(sum(lengths[row] for row in batch) for batch in batches) <= 512
    assert len(batches) <= 1.1 * sum(lengths.values()) / 512 + 1


def test_a_row_longer_than_a_batch_is_a_batch_by_itself() -> None:
    assert pack({0: 10, 1: 700, 2: 20}, 512, [0, 1, 2]) == [[0, 2], [1]]


def test_packs_follow_from_seed_and_epoch_alone() -> None:
    lengths = {row: 1 + row % 37 for row in range(200)}
    again = training_batches(dict(reversed(lengths.items())), 64, 7, 3)
    assert training_batches(lengths, 64, 7, 3) == again
    assert training_batches(lengths, 64, 7, 4) != again
    assert training_batches(lengths, 64, 8, 3) != again
    assert validation_batches(lengths, 64) == validation_batches(dict(reversed(lengths.items())), 64)


def test_about_the_share_asked_for_is_held_out_whatever_else_is_held_out() -> None:
    names = [f"conversation-{i}" for i in range(4000)]
    held = [name for name in names if held_out(name, 0.1)]
    assert len(held) == pytest.approx(400, rel=0.15)
    assert [name for name in names if held_out(name, 0.1)] == held
    assert set(held) < {name for name in names if held_out(name, 0.2)}
    assert not any(held_out(name, 0.0) for name in names)
