"""Upstream's files: written as upstream reads them, checked when read, and each history is used once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file

from speculators.errors import ContractError
from speculators.features.contract import feature_contract
from speculators.features.shards import ShardReader, ShardWriter
from speculators.features.upstream import export_for_upstream, histories, main, read_hidden_states

LAYERS, WIDTH = 3, 5
LENGTHS = [4, 7, 5]


def ids_of(row: int) -> list[int]:
    return [100 * row + token for token in range(LENGTHS[row])]


def artifacts(root: Path, dtype: str = "bfloat16", short: int = 0) -> tuple[Path, Path, list[torch.Tensor]]:
    """A token table and its shards; the states end `short` tokens before the rows do."""
    rows = [
        {"input_ids": ids_of(r), "loss_mask": [0] + [1] * (n - 1), "seq_len": n, "id": f"c{r}", "source": "s"}
        for r, n in enumerate(LENGTHS)
    ]
    Dataset.from_list(rows).save_to_disk(root / "tokens")
    facts = {"target": "t", "tokens": "k", "compute_dtype": "float32", "layer_ids": [1, 2, 4]}
    writer = ShardWriter(root / "features", feature_contract(dtype=dtype, hidden_size=WIDTH, **facts), 10)
    states = [torch.randn(n - short, LAYERS, WIDTH).bfloat16() for n in LENGTHS]
    for row, its in enumerate(states):
        writer.add(row, torch.tensor(ids_of(row)[: len(its)]), its)
    writer.close()
    return root / "tokens", root / "features", states


@pytest.mark.parametrize("short", [0, 1])
def test_an_export_is_a_table_and_a_file_a_row_of_the_same_tokens(tmp_path: Path, short: int) -> None:
    tokens, features, states = artifacts(tmp_path, short=short)
    assert main([str(tokens), str(features), str(tmp_path / "out")]) == 0
    table = load_from_disk(str(tmp_path / "out"))
    assert {"input_ids", "loss_mask", "seq_len"} <= set(table.column_names)
    for row, its in enumerate(states):
        found = load_file(tmp_path / f"out/hidden_states/hs_{row}.safetensors")
        assert set(found) == {"hidden_states", "token_ids"}
        # Upstream's trainer compares the two as tensors.
        assert torch.equal(found["token_ids"], table[row]["input_ids"])
        assert found["token_ids"].tolist() == ids_of(row)[: len(its)]
        assert len(table[row]["loss_mask"]) == table[row]["seq_len"] == len(its)
        assert found["hidden_states"].dtype is torch.bfloat16
        assert torch.equal(found["hidden_states"], its)


def test_a_last_layer_that_was_not_kept_is_zero_where_upstream_does_not_look(tmp_path: Path) -> None:
    tokens, features, states = artifacts(tmp_path)
    reader = ShardReader(features)
    writer = ShardWriter(tmp_path / "answers", {**reader.contract, "last_state": "answers"}, 10)
    for row, its in enumerate(states):
        writer.add(row, torch.tensor(ids_of(row)), its, torch.arange(len(its)) > 1)
    writer.close()
    export_for_upstream(tokens, tmp_path / "answers", tmp_path / "out")
    for row, its in enumerate(states):
        _, found = read_hidden_states(tmp_path / f"out/hidden_states/hs_{row}.safetensors")
        its[:2, -1] = 0.0
        assert torch.equal(found, its)


def test_an_export_of_float8_is_bfloat16(tmp_path: Path) -> None:
    tokens, features, states = artifacts(tmp_path, dtype="float8_e4m3fn")
    export_for_upstream(tokens, features, tmp_path / "out")
    token_ids, found = read_hidden_states(tmp_path / "out/hidden_states/hs_1.safetensors")
    assert token_ids.tolist() == ids_of(1)
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found, states[1], rtol=0.07, atol=1e-3)


def test_an_export_into_something_or_of_other_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, features, _ = artifacts(tmp_path)
    assert main([str(tokens), str(features), str(tokens)]) == 1
    assert "is not empty" in capsys.readouterr().err
    other = [{"input_ids": [9] * n, "loss_mask": [1] * n, "seq_len": n, "id": "c", "source": "s"} for n in LENGTHS]
    Dataset.from_list(other).save_to_disk(tmp_path / "other")
    with pytest.raises(ContractError, match="hidden states of row 0 are of other tokens"):
        export_for_upstream(tmp_path / "other", features, tmp_path / "out")


def test_upstreams_float8_is_read_with_its_scale_a_token(tmp_path: Path) -> None:
    states = torch.randn(4, 2, 8)
    scales = states.abs().amax((1, 2), keepdim=True) / 448
    tensors = {"hidden_states": (states / scales).to(torch.float8_e4m3fn), "hidden_states_scales": scales}
    save_file({**tensors, "token_ids": torch.arange(4)}, tmp_path / "hs_0.safetensors")
    _, found = read_hidden_states(tmp_path / "hs_0.safetensors")
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.float(), states, rtol=0.07, atol=0.01)


def test_a_missing_a_cut_off_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "hs_0.safetensors"
    with pytest.raises(ContractError, match=r"hs_0\.safetensors is missing"):
        read_hidden_states(path)
    save_file({"hidden_states": torch.zeros(4, 2, 8), "token_ids": torch.arange(4)}, path)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ContractError, match=r"hs_0\.safetensors is damaged"):
        read_hidden_states(path)
    save_file({"states": torch.zeros(4, 2, 8), "token_ids": torch.arange(4)}, path)
    with pytest.raises(ContractError, match="is damaged: KeyError"):
        read_hidden_states(path)
    save_file({"hidden_states": torch.zeros(4, 2, 8), "token_ids": torch.arange(5)}, path)
    with pytest.raises(ContractError, match=r"holds \[4, 2, 8\] torch.float32 of 5 tokens"):
        read_hidden_states(path)


def test_a_history_is_one_row_in_which_every_answer_is_supervised_once() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2], [7, 8], [1, 2, 3, 4], [1, 2, 9]]
    masks = [[0, 0, 0, 0, 0, 1], [0, 1], [0, 1], [0, 0, 0, 1], [0, 0, 1]]
    assert histories(rows, masks) == {0: [0, 1, 0, 1, 0, 1], 2: [0, 1], 4: [0, 0, 1]}


def test_of_rows_that_are_the_same_the_first_is_kept() -> None:
    assert histories([[3, 4], [1], [3, 4]], [[0, 1], [1], [1, 0]]) == {0: [1, 1], 1: [1]}
    assert histories([], []) == {}


def test_ids_are_compared_as_numbers_and_not_as_bytes_of_them() -> None:
    assert sorted(histories([[1], [256 + 1, 0], [1 << 24]], [[1], [1, 1], [1]])) == [0, 1, 2]
