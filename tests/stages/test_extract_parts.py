"""Which rows a worker gets: whole shards, all of them, and the same whoever asks."""

from __future__ import annotations

import random

import pytest

from speculators.stages.extract import rows_of_part


def shards(lengths: list[int], full: int) -> list[list[int]]:
    """The rows of every shard, as one writer fills them."""
    filled: list[list[int]] = [[]]
    for row in range(len(lengths)):
        filled[-1].append(row)
        if sum(lengths[r] for r in filled[-1]) >= full:
            filled.append([])
    return [rows for rows in filled if rows]


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_row_goes_to_one_worker_with_the_rest_of_its_shard(workers: int) -> None:
    for seed in range(20):
        lengths = random.Random(seed).choices(range(1, 120), k=seed * 7)
        parts = [list(rows_of_part(lengths, 200, part, workers)) for part in range(workers)]
        assert [row for part in parts for row in part] == list(range(len(lengths)))
        whole = shards(lengths, 200)
        assert [rows for part in parts for rows in whole if rows[0] in part and rows[-1] in part] == whole
        counts = [sum(rows[0] in part for rows in whole) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_more_workers_than_shards_leave_some_with_nothing() -> None:
    assert [len(rows_of_part([10, 10], 100, part, 3)) for part in range(3)] == [0, 0, 2]
