"""collect: rows get the states of the turn that they are part of, one token short where the answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speculators.config import Config
from speculators.data.shards import ShardReader
from speculators.errors import ContractError
from speculators.job import Job
from speculators.stages.collect import covering, main
from tests.stages.jobs import make_job


def turn(name: str, prompt: list[int], answer: list[int]) -> dict[str, object]:
    return {"prompt_ids": prompt, "answer_ids": answer, "finish_reason": "stop", "states": name}


def test_a_row_is_covered_by_the_turn_that_begins_with_it() -> None:
    first, second = turn("a", [1, 2], [3, 4]), turn("b", [1, 2, 3, 4, 5], [6])
    assert covering([first, second], [1, 2, 3, 4, 5, 6]) == second
    assert covering([first, second], [1, 2, 3]) == first
    assert covering([first, second], [9]) is None


def write_answers(directory: Path) -> None:
    (directory / "states").mkdir(parents=True)
    turns = {"c1": [turn("a", [1, 2], [3, 4])], "c2": [turn("b", [5], [6, 7, 8])]}
    with (directory / "conversations.jsonl").open("w") as file:
        for name, its in turns.items():
            file.write(json.dumps({"id": name, "messages": [], "turns": its}) + "\n")
    for name, ids in (("a", [1, 2, 3]), ("b", [5, 6, 7])):
        states = torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 2, 8).contiguous()
        save_file({"states": states, "token_ids": torch.tensor(ids)}, directory / "states" / name)


def write_tokens(directory: Path, rows: list[tuple[str, list[int]]]) -> None:
    from datasets import Dataset

    table = [{"input_ids": ids, "loss_mask": [1] * len(ids), "seq_len": len(ids), "id": name} for name, ids in rows]
    Dataset.from_list(table).save_to_disk(directory)


def job_in(root: Path, config: Config) -> Job:
    (root / "target").mkdir()
    (root / "target/config.json").write_text('{"hidden_size": 8}')
    inputs = {"tokens": root / "tokens", "states": root / "answers", "target": root / "target"}
    job = make_job("collect", root / "work", config, **inputs)
    job.derived |= {"layer_ids": [2], "capture_layer_ids": [2, 4]}
    job.digests |= {"target": "t", "tokens": "k"}
    return job


def test_rows_get_their_states_in_order_and_a_cut_row_has_all_of_them(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c2", [5, 6]), ("c1", [1, 2, 3, 4])])
    main(job_in(tmp_path, config))
    reader = ShardReader(tmp_path / "work/data")
    assert [reader.token_ids(row).tolist() for row in reader.rows] == [[5, 6], [1, 2, 3]]
    assert reader.states(1)[:, 1, 0].tolist() == [1, 2, 3]
    assert reader.contract["layer_ids"] == [2, 4]


def test_a_row_of_other_tokens_is_refused(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 9])])
    with pytest.raises(ContractError, match=r"row 0 \(conversation c1\) is no part"):
        main(job_in(tmp_path, config))


def test_answers_without_states_are_refused(tmp_path: Path, config: Config) -> None:
    (tmp_path / "answers").mkdir()
    line = {"id": "c1", "turns": [{"prompt_ids": [1], "answer_ids": [2], "finish_reason": "stop"}]}
    (tmp_path / "answers/conversations.jsonl").write_text(json.dumps(line) + "\n")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2])])
    with pytest.raises(ContractError, match="answers without their states"):
        main(job_in(tmp_path, config))
