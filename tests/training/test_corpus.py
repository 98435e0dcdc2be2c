"""What is trained on: rows with states, of which the last token's may be missing, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from speculators.data.packing import Piece
from speculators.data.shards import ShardReader, ShardWriter
from speculators.errors import ContractError
from speculators.training.corpus import Corpus, Shards


def shortened(features: Path, directory: Path, missing: int) -> ShardReader:
    """The same states without those of the last tokens of row 3."""
    reader = ShardReader(features)
    writer = ShardWriter(directory, reader.contract, shard_tokens=200)
    for row in reader.rows:
        end = reader.length(row) - (missing if row == 3 else 0)
        writer.add(row, reader.token_ids(row)[:end], reader.states(row)[:end])
    writer.close()
    return ShardReader(directory)


def test_a_row_without_its_last_state_is_taken_one_token_shorter(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    whole = Corpus(tokens, Shards(ShardReader(features)))
    short = Corpus(tokens, Shards(shortened(features, tmp_path / "short", 1)))
    assert short.lengths[3] == whole.lengths[3] - 1
    assert {row: n for row, n in short.lengths.items() if row != 3} == {
        row: n for row, n in whole.lengths.items() if row != 3
    }
    pieces = short.pieces([3], batch_tokens=8)
    assert pieces[-1].end == short.lengths[3]
    pack = short.pack([Piece(3, 0, short.lengths[3])], torch.device("cpu"))
    assert len(pack.token_ids) == len(pack.loss_mask) == len(pack.states) == short.lengths[3]


def test_a_row_that_lacks_more_states_is_refused(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    with pytest.raises(ContractError, match="row 3 has"):
        Corpus(tokens, Shards(shortened(features, tmp_path / "short", 2)))


def test_a_piece_is_supervised_inside_itself_and_sees_all_before_it(tmp_path: Path) -> None:
    tokens, features = tiny.write_corpus(tmp_path)
    corpus = Corpus(tokens, Shards(ShardReader(features)))
    whole = corpus.pack([Piece(5, 0, corpus.lengths[5])], torch.device("cpu"))
    masks = []
    for piece in corpus.pieces([5], batch_tokens=5):
        pack = corpus.pack([piece], torch.device("cpu"))
        assert torch.equal(pack.token_ids, whole.token_ids[: piece.end])
        assert torch.equal(pack.states, whole.states[: piece.end])
        masks.append(torch.nn.functional.pad(pack.loss_mask.int(), (0, len(whole.loss_mask) - piece.end)))
    assert torch.equal(sum(masks, torch.zeros_like(masks[0])), whole.loss_mask.int())
