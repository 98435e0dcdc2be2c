from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import DataFormat
from speculators.config.schema import Config, Dataset
from speculators.data.conversations import in_evaluation_holdout
from speculators.errors import SourceError
from speculators.job import Job
from speculators.stages import prompts
from tests.stages.jobs import lines, make_job


def write_set(path: Path, texts: list[str]) -> Path:
    """A ShareGPT file: text i is the first message of conversation i, which has four more turns."""
    turns = ["", "answer one", "second question", "answer two", "third question"]
    rows = [
        {
            "id": f"{path.stem}{i}",
            "conversations": [
                {"from": ("human", "gpt")[k % 2], "value": text if k == 0 else turn} for k, turn in enumerate(turns)
            ],
        }
        for i, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return path


def config_of(*names: str) -> Config:
    config = Config()
    config.data = {name: Dataset(source="x", format=DataFormat.sharegpt) for name in names}
    config.prompts.eval_holdout_ratio = 0.0
    return config


def test_every_usable_conversation_is_kept_with_its_first_user_turns_only(tmp_path: Path) -> None:
    config = config_of("a")
    config.prompts.max_turns = 2
    job = make_job("prompts", tmp_path / "w", config, dataset__a=write_set(tmp_path / "a.json", ["one", "two"]))
    prompts.main(job)
    found = sorted(lines(job.output / "conversations.jsonl"), key=lambda row: row["id"])
    assert found[0] == {
        "id": "a/a0",
        "source": "a",
        "messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "second question"}],
    }
    assert [row["messages"][0]["content"] for row in found] == ["one", "two"]
    record = job.record["datasets"]["a"]
    assert (record["read"], record["dropped"], record["forms"], record["damage"]) == (2, {}, {"sharegpt": 2}, [])
    assert not list(job.scratch.iterdir())


def test_a_draw_is_the_same_every_time_and_a_row_more_displaces_at_most_one(tmp_path: Path) -> None:
    def drawn(name: str, texts: list[str], seed: int = 0, count: int = 20) -> list[str]:
        config = config_of("a")
        config.prompts.num_conversations, config.prompts.seed = count, seed
        (tmp_path / name).mkdir()
        path = write_set(tmp_path / name / "a.json", texts)
        job = make_job("prompts", tmp_path / name / "w", config, dataset__a=path)
        prompts.main(job)
        return [row["id"] for row in lines(job.output / "conversations.jsonl")]

    texts = [f"question {i}" for i in range(100)]
    first = drawn("first", texts)
    assert len(first) == 20
    assert drawn("again", texts) == first
    assert len(set(first) - set(drawn("longer", [*texts, "one more"]))) <= 1
    assert drawn("seed", texts, seed=1) != first
    assert drawn("more", texts, count=30)[:20] == first, "so that growing a recipe asks for the new ones alone"


def test_a_dataset_gives_no_more_conversations_than_its_share_of_the_mix(tmp_path: Path) -> None:
    paths = {name: write_set(tmp_path / f"{name}.json", [f"{name} {i}" for i in range(30)]) for name in "ab"}

    def drawn(cap: int | None, count: int | None) -> tuple[dict[str, int], list[str]]:
        config = config_of("a", "b")
        config.prompts.num_conversations, config.data["a"].num_conversations = count, cap
        job = make_job("prompts", tmp_path / f"w{cap}{count}", config, dataset__a=paths["a"], dataset__b=paths["b"])
        prompts.main(job)
        return job.record["kept_by_dataset"], [row["id"] for row in lines(job.output / "conversations.jsonl")]

    assert drawn(5, None)[0] == {"a": 5, "b": 30}
    assert drawn(5, 60)[0] == {"a": 5, "b": 30}
    assert sum(drawn(5, 12)[0].values()) == 12
    all_ids = drawn(None, None)[1]
    assert drawn(5, None)[1] == [i for i in all_ids if i[0] == "b" or i in [j for j in all_ids if j[0] == "a"][:5]]


def test_held_out_conversations_are_left_out_and_counted(tmp_path: Path) -> None:
    config = config_of("a")
    config.prompts.eval_holdout_ratio = 0.3
    texts = [f"question {i}" for i in range(200)]
    job = make_job("prompts", tmp_path / "w", config, dataset__a=write_set(tmp_path / "a.json", texts))
    prompts.main(job)
    kept = {row["messages"][0]["content"] for row in lines(job.output / "conversations.jsonl")}
    assert kept == {text for text in texts if not in_evaluation_holdout(text, 0.3)}
    assert job.record["datasets"]["a"]["dropped"] == {"held out for evaluation": 200 - len(kept)}
    assert 30 < 200 - len(kept) < 90


def test_the_order_of_data_sets_in_a_recipe_does_not_matter_and_copies_across_them_count_once(tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a.json", ["same", "only a"]), write_set(tmp_path / "b.json", ["Same", "only b"])
    outputs = []
    for names in (("a", "b"), ("b", "a")):
        config = config_of(*names)
        job = make_job("prompts", tmp_path / "".join(names), config, dataset__a=a, dataset__b=b)
        prompts.main(job)
        outputs.append((job.output / "conversations.jsonl").read_bytes())
        assert job.record["datasets"]["b"]["dropped"] == {"same prompt as another": 1}
        assert job.record["kept_by_dataset"] == {"a": 2, "b": 1}
    assert outputs[0] == outputs[1]


def test_the_instruction_of_a_data_set_comes_before_the_prompt(tmp_path: Path) -> None:
    config = config_of("a")
    config.data["a"].instruction = "Answer briefly."
    config.data["a"].max_chars = 5
    job = make_job("prompts", tmp_path / "w", config, dataset__a=write_set(tmp_path / "a.json", ["short", "too long"]))
    prompts.main(job)
    (row,) = lines(job.output / "conversations.jsonl")
    assert row["messages"] == [{"role": "user", "content": "Answer briefly.\n\nshort"}]


def test_a_cut_file_is_reported_in_the_record(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.json", ["one", "two"])
    path.write_bytes(path.read_bytes()[:-30])
    job = make_job("prompts", tmp_path / "w", config_of("a"), dataset__a=path)
    prompts.main(job)
    assert job.record["kept"] == 1
    assert job.record["datasets"]["a"]["damage"][0]["byte"] == path.stat().st_size


def test_filters_that_leave_nothing_are_an_error_with_the_counts(tmp_path: Path) -> None:
    config = config_of("a")
    config.data["a"].min_chars = 100
    job = make_job("prompts", tmp_path / "w", config, dataset__a=write_set(tmp_path / "a.json", ["one", "two"]))
    with pytest.raises(SourceError, match=r"no usable row among 2: 2 first message shorter than min_chars"):
        prompts.main(job)


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "it is x"},
    {"role": "assistant", "content": "x"},
    {"role": "system", "content": "S2"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "y", "reasoning_content": "so"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " "},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "z"},
]


def talk(tmp_path: Path, rows: list[dict[str, Any]], max_turns: int | None, *, answers: bool) -> Job:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = config_of("a")
    config.data["a"] = Dataset(source="x")
    config.prompts.max_turns = max_turns
    job = make_job("prompts", tmp_path / "w", config, dataset__a=path)
    job.derived |= {"keeps_answers": True} if answers else {}
    prompts.main(job)
    return job


@pytest.mark.parametrize(("max_turns", "texts"), [(1, "S one|more  x"), (2, "S one|more  x S2 two")])
def test_the_target_gets_calls_and_results_as_recorded_and_no_other_answer(
    tmp_path: Path, max_turns: int, texts: str
) -> None:
    job = talk(tmp_path, [{"messages": TALK, "tools": [CALL]}], max_turns, answers=False)
    (row,) = lines(job.output / "conversations.jsonl")
    contents = [m["content"].replace("\n\n", "|").replace("it is ", "") for m in row["messages"]]
    assert " ".join(contents) == texts
    assert row["messages"][2] == TALK[3]
    assert row["tools"] == [CALL]


def test_answers_are_kept_where_they_are_trained_on_up_to_the_first_empty_one(tmp_path: Path) -> None:
    unanswered = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}
    tokens = {"input_ids": [1, 2], "loss_mask": [0, 1]}
    same_prompt = {"messages": [*TALK[:3], {"role": "assistant", "content": "another"}]}
    job = talk(tmp_path, [{"messages": TALK}, unanswered, tokens, same_prompt], None, answers=True)
    rows = sorted(lines(job.output / "conversations.jsonl"), key=lambda row: row["id"])
    assert [row["messages"] for row in rows] == [TALK[:9], [], same_prompt["messages"]]
    assert (rows[1]["input_ids"], rows[1]["loss_mask"]) == ([1, 2], [0, 1])
    assert job.record["datasets"]["a"]["dropped"] == {"no answer": 1}


def test_token_ids_cannot_be_answered(tmp_path: Path) -> None:
    tokens = {"input_ids": [1, 2], "loss_mask": [0, 1]}
    job = talk(tmp_path, [tokens, {"prompt": "hi"}], 1, answers=False)
    assert job.record["datasets"]["a"]["dropped"] == {"token ids, which pipeline=off_policy uses": 1}
