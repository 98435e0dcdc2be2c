"""The token table: rows are read as they were written, from any number of Arrow chunks."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from speculators.data import token_table
from speculators.data.token_table import TokenTable, prediction_mask, save_table, write_table


def rows(count: int) -> list[dict[str, object]]:
    return [
        {
            "input_ids": [7 * row + i for i in range(row % 5)],
            "loss_mask": [i % 2 for i in range(row % 5)],
            "seq_len": row % 5,
            "id": f"c{row}",
            "source": "s",
        }
        for row in range(count)
    ]


def check(table: TokenTable, count: int) -> None:
    assert len(table) == count
    for row, wanted in enumerate(rows(count)):
        assert table.token_ids(row).tolist() == wanted["input_ids"]
        assert table.loss_mask(row).tolist() == wanted["loss_mask"]
    assert table.conversations == [f"c{row}" for row in range(count)]
    assert table.lengths == [row % 5 for row in range(count)]


def test_rows_are_found_in_whatever_pieces_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "_BATCH", 4)
    write_table(rows(11), tmp_path / "rows.arrow")
    save_table(tmp_path / "rows.arrow", tmp_path / "tokens")
    check(TokenTable(tmp_path / "tokens"), 11)


def test_a_table_in_several_files_and_a_narrower_type_is_read_too(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(rows(11)).cast_column("input_ids", datasets.Sequence(datasets.Value("int32")))
    made.save_to_disk(tmp_path / "tokens", num_shards=3)
    table = TokenTable(tmp_path / "tokens")
    check(table, 11)
    assert table.token_ids(4).dtype == np.int32


def test_the_target_is_asked_at_supervised_tokens_and_before_them() -> None:
    assert prediction_mask([0, 0, 1, 1, 0, 0, 1, 0]).tolist() == [False, True, True, True, False, True, True, False]
    assert prediction_mask([1]).tolist() == [True]
    assert prediction_mask([0, 0]).tolist() == [False, False]
