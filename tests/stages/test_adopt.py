"""adopt_tokens and adopt_states: a directory of upstream's becomes rows and shards, and nothing unchecked does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset as Table
from datasets import load_from_disk
from safetensors.torch import save_file

from speculators.config import compose
from speculators.config.choices import DataFormat
from speculators.config.schema import Config, Dataset
from speculators.errors import ContractError, RecipeError, SourceError, StageError
from speculators.features.shards import ShardReader
from speculators.runner.planning import graph, sources
from speculators.stages import adopt_states, adopt_tokens
from tests.stages.jobs import make_job

ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [1, 2, 3], [5, 5, 5]]
MASKS = [[0, 0, 0, 0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]


def upstream(directory: Path, states_of: tuple[int, ...] = (0, 1, 2), row_format: str | None = None) -> Path:
    """Four rows, of which one has no states and one is the beginning of another."""
    rows = [{"input_ids": ids, "loss_mask": mask, "seq_len": len(ids)} for ids, mask in zip(ROWS, MASKS, strict=True)]
    Table.from_list(rows).with_format(row_format).save_to_disk(directory)
    (directory / "hidden_states").mkdir()
    for row in states_of:
        write_states(directory, row, ROWS[row])
    return directory


def write_states(directory: Path, row: int, ids: list[int], bad: float = 0.0) -> None:
    states = torch.tensor(ids).bfloat16()[:, None, None].repeat(1, 2, 8)
    states[-1, -1, -1] += bad
    tensors = {"hidden_states": states, "token_ids": torch.tensor(ids)}
    save_file(tensors, directory / f"hidden_states/hs_{row}.safetensors")


def adopted(root: Path, config: Config, source: Path) -> Path:
    """The tokens of `source`, and in `root/states` the job's output of its states."""
    config.data = {"mine": Dataset(source=str(source), format=DataFormat.upstream)}
    tokens = make_job("adopt_tokens", root / "tokens", config, dataset__mine=source)
    adopt_tokens.main(tokens)
    (root / "target").mkdir()
    (root / "target/config.json").write_text('{"hidden_size": 8}')
    inputs = {"tokens": tokens.output, "target": root / "target", "dataset__mine": source}
    states = make_job("adopt_states", root / "states", config, **inputs)
    states.derived |= {"layer_ids": [2], "capture_layer_ids": [2, 4], "last_state": "answers"}
    states.digests |= {"target": "t", "tokens": "k"}
    adopt_states.main(states)
    return tokens.output


@pytest.mark.parametrize("row_format", [None, "torch"])
def test_rows_and_states_are_adopted_and_a_history_once(tmp_path: Path, config: Config, row_format: str | None) -> None:
    theirs = upstream(tmp_path / "theirs", row_format=row_format)
    tokens = load_from_disk(str(adopted(tmp_path, config, theirs)))
    assert tokens["id"][:] == ["mine:0", "mine:1"]
    assert tokens["input_ids"][:] == [ROWS[0], ROWS[1]]
    assert tokens["loss_mask"][:] == [[0, 0, 1, 0, 0, 1], [0, 1, 1]]
    reader = ShardReader(tmp_path / "states/data")
    assert [reader.token_ids(row).tolist() for row in reader.rows] == [ROWS[0], ROWS[1]]
    assert reader.hidden_states(1)[:, 1, 0].tolist() == [7, 8, 9]
    assert reader.last_layer_mask(0, 6).tolist() == [False, True, True, False, True, True]
    assert reader.contract["layer_ids"] == [2, 4]


def test_a_row_is_cut_to_max_seq_len_and_so_are_its_states(tmp_path: Path, config: Config) -> None:
    config.max_seq_len = 4
    tokens = load_from_disk(str(adopted(tmp_path, config, upstream(tmp_path / "theirs"))))
    assert tokens["input_ids"][:] == [[1, 2, 3, 4], [7, 8, 9]]
    assert ShardReader(tmp_path / "states/data").length(0) == 4


@pytest.mark.parametrize(
    ("ids", "bad", "error", "said"),
    [
        ([7, 8, 1], 0.0, ContractError, r"hs_1\.safetensors has hidden states of other tokens than those of row 1"),
        ([7, 8], 0.0, ContractError, "hidden states of other tokens"),
        ([7, 8, 9], float("nan"), StageError, "row 1: the hidden states cannot be stored"),
    ],
)
def test_states_of_other_tokens_or_none_at_all_are_refused(
    tmp_path: Path, config: Config, ids: list[int], bad: float, error: type[Exception], said: str
) -> None:
    source = upstream(tmp_path / "theirs")
    write_states(source, 1, ids, bad)
    with pytest.raises(error, match=said):
        adopted(tmp_path, config, source)


def test_a_table_without_any_states_is_refused(tmp_path: Path, config: Config) -> None:
    with pytest.raises(SourceError, match="no row is left of 4"):
        adopted(tmp_path, config, upstream(tmp_path / "theirs", states_of=()))


RECIPE = """
# @package _global_
defaults:
  - override /target: smollm2_135m
  - override /data: []
  - override /pipeline: upstream
data: {mine: {source: theirs, format: upstream}}
"""


def test_the_shipped_pipeline_is_wired_and_takes_directories_only(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    config = compose.compose([f"recipe={tmp_path / 'mine.yaml'}"])
    nodes = graph.build(config)
    assert nodes["dataset.mine"].fetch_as == "directory"
    assert set(nodes["extract"].inputs) == {"tokens", "target", "dataset.mine"}
    config.data["mine"].format = DataFormat.sharegpt
    with pytest.raises(RecipeError, match="`adopt_tokens` reads datasets of format upstream, mine has format sharegpt"):
        graph.build(config)


def test_conversations_are_not_read_out_of_a_directory_of_upstreams(config: Config) -> None:
    config.data = {"mine": Dataset(source="theirs", format=DataFormat.upstream)}
    with pytest.raises(RecipeError, match="`prompts` reads datasets of a file of conversations"):
        graph.build(config)


def test_a_directory_is_known_by_its_content(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.mine\.source: `hub:a/b` is not a directory"):
        sources.resolve("data.mine.source", "hub:a/b", "directory")
    first = sources.resolve("data.mine.source", str(upstream(tmp_path / "theirs")), "directory")
    write_states(tmp_path / "theirs", 1, [7, 8, 8])
    assert sources.resolve("data.mine.source", str(tmp_path / "theirs"), "directory").digest != first.digest
