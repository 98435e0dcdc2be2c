"""The data loader: rows without hidden states, or with those of other tokens, are refused; one token may be missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch

from speculators.data.packing import RowSlice
from speculators.data.token_table import prediction_mask
from speculators.drafts.base import Draft
from speculators.errors import ContractError
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.shards import ShardReader, ShardWriter


def shortened(features: Path, directory: Path, missing: int) -> ShardReader:
    """The same states without those of the last tokens of row 3."""
    reader = ShardReader(features)
    writer = ShardWriter(directory, reader.contract, shard_tokens=200)
    for row in reader.rows:
        end = reader.length(row) - (missing if row == 3 else 0)
        writer.add(row, reader.token_ids(row)[:end], reader.hidden_states(row)[:end])
    writer.close()
    return ShardReader(directory)


def test_a_row_without_its_last_state_is_taken_one_token_shorter(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    whole = DataLoader(tokens, ShardSource(ShardReader(features)))
    short = DataLoader(tokens, ShardSource(shortened(features, tmp_path / "short", 1)))
    assert short.lengths[3] == whole.lengths[3] - 1
    assert {row: n for row, n in short.lengths.items() if row != 3} == {
        row: n for row, n in whole.lengths.items() if row != 3
    }
    slices = short.row_slices([3], batch_tokens=8)
    assert slices[-1].end == short.lengths[3]
    pack = short.pack([RowSlice(3, 0, short.lengths[3])], torch.device("cpu"))
    assert len(pack.token_ids) == len(pack.loss_mask) == len(pack.hidden_states) == short.lengths[3]


def test_a_row_that_lacks_more_states_is_refused(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    with pytest.raises(ContractError, match="row 3 has"):
        DataLoader(tokens, ShardSource(shortened(features, tmp_path / "short", 2)))


def test_a_piece_is_supervised_inside_itself_and_sees_all_before_it(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    loader = DataLoader(tokens, ShardSource(ShardReader(features)))
    whole = loader.pack([RowSlice(5, 0, loader.lengths[5])], torch.device("cpu"))
    masks = []
    for row_slice in loader.row_slices([5], batch_tokens=5):
        pack = loader.pack([row_slice], torch.device("cpu"))
        assert torch.equal(pack.token_ids, whole.token_ids[: row_slice.end])
        assert torch.equal(pack.hidden_states, whole.hidden_states[: row_slice.end])
        masks.append(torch.nn.functional.pad(pack.loss_mask.int(), (0, len(whole.loss_mask) - row_slice.end)))
    assert torch.equal(sum(masks, torch.zeros_like(masks[0])), whole.loss_mask.int())


def test_of_a_row_that_is_supervised_whole_every_token_is_in_one_piece(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    loader = DataLoader(tokens, ShardSource(ShardReader(features)))
    answers = loader.mask(RowSlice(6, 0, loader.lengths[6]))
    assert not answers.all()
    loader.supervise_all([5])
    slices = loader.row_slices([5], batch_tokens=5)
    masks = [loader.pack([row_slice], torch.device("cpu")).loss_mask for row_slice in slices]
    assert all(torch.equal(mask, loader.mask(row_slice)) for mask, row_slice in zip(masks, slices, strict=True))
    assert [int(mask.sum()) for mask in masks] == [row_slice.tokens for row_slice in slices]
    assert torch.equal(loader.pack([RowSlice(6, 0, loader.lengths[6])], torch.device("cpu")).loss_mask, answers)


def test_states_of_other_tokens_are_refused_by_row(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    reader = ShardReader(features)
    writer = ShardWriter(tmp_path / "other", reader.contract, shard_tokens=200)
    for row in reader.rows:
        ids = reader.token_ids(row)
        ids[-2] += row == 4
        writer.add(row, ids, reader.hidden_states(row))
    writer.close()
    loader = DataLoader(tokens, ShardSource(ShardReader(tmp_path / "other")))
    whole = {row: RowSlice(row, 0, length) for row, length in loader.lengths.items()}
    loader.expect([[whole[2], whole[4], whole[5]]])
    with pytest.raises(ContractError, match="hidden states of row 4 are of other tokens"):
        loader.pack([whole[2], whole[4], whole[5]], torch.device("cpu"))
    assert len(loader.pack([whole[3], whole[5]], torch.device("cpu")).lengths) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_pack_is_what_its_rows_are_one_after_the_other(tmp_path: Path, dtype: str) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    reader = ShardReader(features)
    writer = ShardWriter(tmp_path / "stored", {**reader.contract, "dtype": dtype}, shard_tokens=100)
    for row in reader.rows:
        writer.add(row, reader.token_ids(row), reader.hidden_states(row))
    writer.close()
    stored = ShardReader(tmp_path / "stored")
    loader = DataLoader(tokens, ShardSource(stored))
    batches = [[RowSlice(row, 1, loader.lengths[row] - 1) for row in rows] for rows in ([7, 3, 7, 11], [0], [3, 23])]
    loader.expect(batches)
    table = datasets.load_from_disk(str(tokens))
    held = [loader.pack(batch, torch.device("cpu")) for batch in batches]
    for batch, pack in zip(batches, held, strict=True):
        assert pack.rows == [row_slice.row for row_slice in batch]
        assert torch.equal(
            tiny.whole(pack), torch.cat([stored.hidden_states(row_slice.row)[: row_slice.end] for row_slice in batch])
        )
        assert pack.token_ids.tolist() == [i for p in batch for i in table[p.row]["input_ids"][: p.end]]
        assert pack.loss_mask.tolist() == [bool(m) for p in batch for m in [0, *table[p.row]["loss_mask"][1 : p.end]]]
    loader.close()


@pytest.mark.parametrize("make", [tiny.make_draft, tiny.make_dflash])
def test_no_draft_asks_where_the_last_layer_is_not_kept(
    tmp_path: Path, make: Callable[..., tuple[Draft, object]]
) -> None:
    draft, _ = make(tiny.write_target(tmp_path))
    draw, asked = torch.Generator().manual_seed(9), 0
    for seed in range(20):
        lengths = [23, 9, 31]
        mask = torch.rand(63, generator=draw) < (0.2, 0.5, 0.8)[seed % 3]
        pack = replace(tiny.make_pack(lengths, seed), loss_mask=mask)
        found = draft(pack)
        kept = np.concatenate([prediction_mask(part) for part in mask.split(lengths)])
        asked += int(found.valid.sum())
        assert bool(torch.from_numpy(kept)[found.target_index[found.valid]].all())
    assert asked > 200
