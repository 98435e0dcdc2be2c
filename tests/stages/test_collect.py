"""collect: rows get the states of the turn that they are part of, one token short where the answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speculators.config import Config, StatesDtype
from speculators.data.encoding import decode, encode
from speculators.data.shards import ShardReader
from speculators.data.template import Turn
from speculators.errors import ContractError
from speculators.job import Job
from speculators.stages.collect import covering, main
from speculators.stages.regenerate import continues
from speculators.stages.tokenize import Row, merge
from speculators.targets.fidelity import read_picks
from speculators.targets.readings import Pick
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
    give(directory, [(name, Row(ids, [1] * len(ids))) for name, ids in rows])


def give(directory: Path, rows: list[tuple[str, Row]]) -> None:
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


def test_rows_get_their_states_in_order_and_a_cut_row_has_all_of_them(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    write_tokens(tmp_path / "tokens", [("c2", [5, 6]), ("c1", [1, 2, 3, 4])])
    main(job_in(tmp_path, config))
    reader = ShardReader(tmp_path / "work/data")
    assert [reader.token_ids(row).tolist() for row in reader.rows] == [[5, 6], [1, 2, 3]]
    assert reader.states(1)[:, 1, 0].tolist() == [1, 2, 3]
    assert reader.contract["layer_ids"] == [2, 4]


def test_float8_states_are_collected_without_a_second_rounding(tmp_path: Path, config: Config) -> None:
    config.extract.dtype = StatesDtype.float8_e4m3fn
    write_answers(tmp_path / "answers")
    ids = torch.tensor([1, 2, 3])
    states = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    kept = encode("a", states, "float8_e4m3fn")
    save_file({"token_ids": ids, **kept}, tmp_path / "answers/states/a")
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4])])
    main(job_in(tmp_path, config))
    reader = ShardReader(tmp_path / "work/data")
    assert reader.contract["dtype"] == "float8_e4m3fn"
    assert torch.equal(reader.states(0), decode(kept))


@pytest.mark.parametrize(
    ("dtype", "last_state", "most"),
    [("float8_e4m3fn", "everywhere", 0.18), ("float8_e4m3fn", "answers", 0.15), ("bfloat16", "answers", 0.29)],
)
def test_a_conversation_of_many_turns_takes_less_than_half_the_bytes_of_a_file_a_turn(
    tmp_path: Path, config: Config, dtype: str, last_state: str, most: float
) -> None:
    """Upstream fans a conversation out: one row, one prefill and one file of bfloat16 states for every answer."""
    config.extract.dtype = StatesDtype[dtype]
    width, turns, said, upstream = 256, [], [], 0
    for number in range(5):
        prompt, answer = [*said, *range(40)], list(range(60 + number))
        said = [*prompt, *answer]
        turns.append(turn(f"{number}", prompt, answer))
        upstream += len(said) * (2 * width * 2 + 8)
    rows = merge([Turn(prompt_ids=t["prompt_ids"], answer_ids=t["answer_ids"]) for t in turns])  # type: ignore[arg-type]
    assert [sum(row.loss_mask) for row in rows] == [60 + 61 + 62 + 63 + 64]  # every answer, in one row
    for earlier in turns[:-1]:
        assert continues(earlier, turns[-1])
        del earlier["states"]
    (tmp_path / "answers/states").mkdir(parents=True)
    (tmp_path / "answers/conversations.jsonl").write_text(json.dumps({"id": "c1", "turns": turns}) + "\n")
    states = torch.randn(len(said) - 1, 2, width)
    save_file({"token_ids": torch.tensor(said[:-1]), "states": states}, tmp_path / "answers/states/4")
    give(tmp_path / "tokens", [("c1", row) for row in rows])
    main(job_in(tmp_path, config, width, last_state=last_state))
    ours = sum(path.stat().st_size for path in (tmp_path / "work/data").iterdir())
    print(f"bytes a trained token: {ours / 310:.0f}, upstream's layout {upstream / 310:.0f}, {ours / upstream:.3f}x")
    assert ours / upstream < most


def test_what_the_server_found_likeliest_is_placed_in_its_row(tmp_path: Path, config: Config) -> None:
    write_answers(tmp_path / "answers")
    path = tmp_path / "answers/conversations.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    told[1]["turns"][0]["picks"] = [[0, 6, -0.1], [2, 9, -0.2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    write_tokens(tmp_path / "tokens", [("c1", [1, 2, 3, 4]), ("c2", [5, 6, 7, 8])])
    main(job_in(tmp_path, config))
    # After [5] it finds 6 the likeliest, and after [5, 6, 7] not the 8 that it drew.
    assert read_picks(tmp_path / "work/data") == [Pick(1, 0, 6, -0.1), Pick(1, 2, 9, -0.2)]


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
