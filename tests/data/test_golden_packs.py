"""Goldens of the batches for fixed lengths and seeds: `python -m tests.goldens.update packs` writes the goldens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speculators.config.choices import Packing
from speculators.data.packing import (
    RowSlice,
    divide,
    in_validation_split,
    slice_row,
    training_batches,
    validation_batches,
)

GOLDEN = Path(__file__).parent.parent / "goldens" / "packs.json"
LENGTHS = [5 + 37 * row * row % 60 for row in range(40)]
"""Tokens of rows 0 to 39, from 5 to 62."""
BATCH_TOKENS = 48


def cut() -> list[RowSlice]:
    """The rows as pieces; the second half of each is supervised."""
    every = []
    for row, length in enumerate(LENGTHS):
        every += slice_row(row, length, range(length // 2, length), BATCH_TOKENS)
    return every


def plain(batches: list[list[RowSlice]]) -> list[list[list[int]]]:
    return [[[piece.row, piece.begin, piece.end] for piece in batch] for batch in batches]


CASES: dict[str, Callable[[], object]] = {
    **{
        f"{packing.name}, seed {seed}, epoch {epoch}": lambda packing=packing, seed=seed, epoch=epoch: plain(  # type: ignore[misc]
            training_batches(cut(), BATCH_TOKENS, seed, epoch, packing)
        )
        for packing in Packing
        for seed, epoch in ((0, 0), (0, 1), (7, 0))
    },
    "pieces": lambda: plain([cut()]),
    "validation": lambda: plain(validation_batches(cut(), BATCH_TOKENS)),
    "divided in three": lambda: plain(divide(cut()[:11], 3)),
    "divided in three without context": lambda: plain(divide(cut()[:11], 3, context=False)),
    "held out of 200, a tenth": lambda: [i for i in range(200) if in_validation_split(f"conversation-{i}", 0.1)],
}


def update() -> None:
    """Write the goldens, a case a line."""
    lines = [f" {json.dumps(name)}: {json.dumps(case())}" for name, case in CASES.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize("name", CASES)
def test_packs_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    assert CASES[name]() == golden, "other packs make other weights: `python -m tests.goldens.update packs`"
