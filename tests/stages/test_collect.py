"""collect: rows get the states of the turn that they are part of, one token short where the answer ends."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from speculators.config.choices import HiddenStatesDtype
from speculators.config.schema import Config
from speculators.data.template import TokenSequence
from speculators.errors import ContractError
from speculators.features.contract import feature_contract
from speculators.features.shards import ShardReader, ShardWriter
from speculators.job import Job
from speculators.runner.store.artifact import sha256
from speculators.stages.collect import find_turn, main
from speculators.targets.fidelity_check import read_greedy_tokens
from speculators.targets.readings import GreedyToken
from tests.stages.jobs import make_job


def turn(where: list[int], prompt: list[int], answer: list[int]) -> dict[str, object]:
    return {"prompt_ids": prompt, "answer_ids": answer, "finish_reason": "stop", "states": where}


def test_a_row_is_covered_by_the_turn_that_begins_with_it() -> None:
    first, second = turn([0, 0, 3], [1, 2], [3, 4]), turn([0, 3, 5], [1, 2, 3, 4, 5], [6])
    assert find_turn([first, second], [1, 2, 3, 4, 5, 6]) == second
    assert find_turn([first, second], [1, 2, 3]) == first
    assert find_turn([first, second], [9]) is None


def write_states(directory: Path, rows: dict[int, tuple[list[int], torch.Tensor]], dtype: str = "bfloat16") -> None:
    layers = rows[0][1].shape
    contract = feature_contract(
        target="t", tokens="prompts", dtype=dtype, compute_dtype="float32", layer_ids=[2, 4], hidden_size=layers[-1]
    )
    writer = ShardWriter(directory / "states", contract, 3)
    for row, (ids, states) in rows.items():
        writer.add(row, torch.tensor(ids), states)
    writer.close()


def write_answers(directory: Path) -> None:
    """`c1` was answered once, `c2` twice, and its template does not keep what was said."""
    directory.mkdir()
    turns = {
        "c1": [turn([0, 0, 3], [1, 2], [3, 4])],
        "c2": [turn([1, 0, 3], [5], [6, 7, 8]), turn([1, 3, 4], [5, 9], [10, 11, 12])],
    }
    with (directory / "conversations.jsonl").open("w") as file:
        for name, its in turns.items():
            file.write(json.dumps({"id": name, "messages": [], "turns": its}) + "\n")
    rows = {0: [1, 2, 3], 1: [5, 6, 7, 5, 9, 10, 11]}
    write_states(directory, {row: (ids, states_of(ids)) for row, ids in rows.items()})


def states_of(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 2, 8)


def write_tokens(directory: Path, rows: list[tuple[str, list[int]]]) -> None:
    give(directory, [(name, TokenSequence(ids, [1] * len(ids))) for name, ids in rows])


def give(directory: Path, rows: list[tuple[str, TokenSequence]]) -> None:
    from datasets import Dataset

    table = [
        {"input_ids": row.input_ids, "loss_mask": row.loss_mask, "seq_len": len(row.input_ids), "id": name}
        for name, row in rows
    ]
    Dataset.from_list(table).save_to_disk(directory)


def job_in(root: Path, config: Config, width: int = 8, last_state: str = "everywhere") -> Job:
    (root / "target").mkdir()
    (root / "target/config.json").write_text(json.dumps({"hidden_size": width}))
    inputs = {"tokens": root / "tokens", "states": root / "answers", "target": root / "target"}
    job = make_job("collect", root / "work", config, **inputs)
    job.derived |= {"layer_ids": [2], "capture_layer_ids": [2, 4], "last_state": last_state}
    job.digests |= {"target": "t", "tokens": "k"}
    return job


def test_rows_get_their_states_and_a_cut_row_has_all_of_them(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c2", [5, 6]), ("c1", [1, 2, 3, 4]), ("c2", [5, 9, 10, 11, 12])])
    main(job_in(tmp_path, config))
    reader = ShardReader(tmp_path / "work/data")
    reader.check()
    assert [reader.token_ids(row).tolist() for row in reader.rows] == [[5, 6], [1, 2, 3], [5, 9, 10, 11]]
    assert torch.equal(reader.hidden_states(2), states_of([5, 9, 10, 11]).bfloat16())
    assert (reader.contract["tokens"], reader.contract["layer_ids"]) == ("k", [2, 4])


def test_no_byte_of_the_states_is_written_again(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4])])
    job = job_in(tmp_path, config)
    main(job)
    theirs, ours = (sorted(d.glob("shard-*")) for d in (tmp_path / "answers/states", job.output))
    assert len(ours) == 2
    assert [path.stat().st_ino for path in ours] == [path.stat().st_ino for path in theirs]
    assert job.digests_written == {path.name: sha256(path) for path in ours}
    main(job)  # what a killed attempt has left is in nobody's way
    assert len(list(job.output.glob("shard-*"))) == 2


def test_on_another_file_system_the_shards_are_copied(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4])])
    main(job_in(tmp_path, config))
    assert torch.equal(ShardReader(tmp_path / "work/data").hidden_states(0), states_of([1, 2, 3]).bfloat16())


@pytest.mark.parametrize("change", [{"dtype": HiddenStatesDtype.float8_e4m3fn}, {"layers": [3, 4]}])
def test_answers_with_other_states_than_are_asked_for_are_refused(
    tmp_path: Path, config: Config, change: dict[str, object]
) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4])])
    config.extract.dtype = change.get("dtype", config.extract.dtype)  # type: ignore[assignment]
    job = job_in(tmp_path, config)
    job.derived["capture_layer_ids"] = change.get("layers", [2, 4])
    with pytest.raises(ContractError, match="do not fit"):
        main(job)


def test_a_shard_of_other_answers_is_refused(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4])])
    job = job_in(tmp_path, config)
    main(job)
    index = job.output / "index.json"
    index.write_text(index.read_text().replace('"prompts"', '"others"'))
    with pytest.raises(ContractError, match='tokens is "prompts", expected "others"'):
        ShardReader(job.output).hidden_states(0)


def test_what_the_server_found_likeliest_is_placed_in_its_row(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    path = tmp_path / "answers/conversations.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    told[1]["turns"][0]["picks"] = [[0, 6, -0.1], [2, 9, -0.2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4]), ("c2", [5, 6, 7, 8])])
    main(job_in(tmp_path, config))
    # After [5] it finds 6 the likeliest, and after [5, 6, 7] not the 8 that it drew.
    assert read_greedy_tokens(tmp_path / "work/data") == [GreedyToken(1, 0, 6, -0.1), GreedyToken(1, 2, 9, -0.2)]


def test_a_row_of_other_tokens_is_refused(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 9])])
    with pytest.raises(ContractError, match=r"row 0 \(conversation c1\) is not the beginning"):
        main(job_in(tmp_path, config))


def test_answers_without_states_are_refused(tmp_path: Path, config: Config) -> None:
    (tmp_path / "answers").mkdir()
    line = {"id": "c1", "turns": [{"prompt_ids": [1], "answer_ids": [2], "finish_reason": "stop"}]}
    (tmp_path / "answers/conversations.jsonl").write_text(json.dumps(line) + "\n")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2])])
    with pytest.raises(ContractError, match="answers without hidden states"):
        main(job_in(tmp_path, config))
