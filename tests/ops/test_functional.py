"""Rows of matrix products are padded where that is faster."""

from __future__ import annotations

import pytest
import torch

from speculators.ops.functional import ROW_MULTIPLE, padded_rows


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.bfloat16, ROW_MULTIPLE),
        (ROW_MULTIPLE, torch.bfloat16, ROW_MULTIPLE),
        (ROW_MULTIPLE + 1, torch.float16, 2 * ROW_MULTIPLE),
        (0, torch.bfloat16, 0),
        (ROW_MULTIPLE + 1, torch.float32, ROW_MULTIPLE + 1),
    ],
)
def test_rows_of_a_short_format_are_padded(rows: int, dtype: torch.dtype, expected: int) -> None:
    padded = padded_rows(torch.ones(rows, 3), dtype)
    assert padded.shape == (expected, 3)
    assert torch.equal(padded[:rows], torch.ones(rows, 3, dtype=dtype))
    assert padded[rows:].abs().sum() == 0
