"""regenerate: what is finished is kept, a cut line is not, and an answer never outgrows the sequence length."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.config.choices import Dtype, HiddenStatesDtype, OnBadRow
from speculators.config.fields import select
from speculators.config.schema import Config, Regenerate, Target, from_builtins
from speculators.data.answer_log import read_answers
from speculators.engine.answering import answer
from speculators.engine.client import Completion
from speculators.engine.transfer import FileTransfer
from speculators.engine.turn_states import TurnFiles, continues
from speculators.errors import ContractError, StageError
from speculators.features.contract import ANSWERS, EVERYWHERE
from speculators.features.encoding import decode, encode
from speculators.features.shards import ShardReader, ShardWriter
from speculators.features.writer import hidden_size
from speculators.job import Endpoint, Job
from speculators.runner.planning.graph import KEEPING, KINDS
from speculators.runner.store.artifact import sha256
from speculators.stages import regenerate
from speculators.stages.regenerate import in_order, system_key
from tests.stages.jobs import make_job

CONFIG = Config(max_seq_len=100, regenerate=Regenerate(max_tokens=50))


class Words:
    """A target whose tokens are words and whose answers are given: what `answer` needs of a client, and no more."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.rendered: list[dict[str, Any]] = []

    async def tokenize(
        self, messages: list[dict[str, str]], *, item: str, affinity_key: str = "", **fields: Any
    ) -> list[int]:
        self.rendered.append(fields)
        return list(range(sum(len(message["content"].split()) for message in messages)))

    async def chat(self, messages: list[dict[str, str]], *, item: str, **fields: Any) -> Completion:
        self.asked.append({"messages": [dict(message) for message in messages], **fields})
        text = self.answers.pop(0)
        return Completion(
            prompt_ids=await self.tokenize(messages, item=item),
            token_ids=list(range(len(text.split()))),
            text=text,
            finish_reason="stop",
            logprobs=[],
            kv_transfer_params={},
            seconds=0.0,
        )


def conversation(*users: str) -> dict[str, Any]:
    return {"id": "c1", "source": "s", "messages": [{"role": "user", "content": text} for text in users]}


def answered(words: Words, made: dict[str, Any], longest: int = 100) -> dict[str, Any]:
    return asyncio.run(answer(words, made, replace(CONFIG, max_seq_len=longest)))  # type: ignore[arg-type]


def test_every_turn_is_answered_with_what_was_said_before_it() -> None:
    words = Words("first answer", "second")
    made = answered(words, conversation("one two", "three"))
    assert [m["role"] for m in made["messages"]] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in words.asked[1]["messages"]] == ["one two", "first answer", "three"]
    assert [len(turn["prompt_ids"]) for turn in made["turns"]] == [2, 5]
    assert [len(turn["answer_ids"]) for turn in made["turns"]] == [2, 1]
    assert (made["id"], made["source"], made["dropped"]) == ("c1", "s", None)


def test_an_answer_is_cut_to_what_the_prompt_leaves_of_the_sequence() -> None:
    words = Words("yes")
    answered(words, conversation("a b c d"), longest=10)
    assert words.asked[0]["max_tokens"] == 6
    words = Words("yes")
    answered(words, conversation("a b c d"), longest=1000)
    assert words.asked[0]["max_tokens"] == 50


def test_a_prompt_that_leaves_no_room_is_dropped_and_never_sent() -> None:
    words = Words()
    made = answered(words, conversation("a b c d"), longest=4)
    assert (made["messages"], made["turns"], made["dropped"]) == ([], [], "prompt_too_long")
    assert words.asked == []


def test_turns_before_the_one_that_does_not_fit_are_kept() -> None:
    made = answered(Words("yes"), conversation("a b", "c d e f g h i j"), longest=8)
    assert [m["content"] for m in made["messages"]] == ["a b", "yes"]
    assert (len(made["turns"]), made["dropped"]) == (1, "prompt_too_long")


def test_conversations_with_one_system_prompt_are_asked_one_after_the_other() -> None:
    system = [[{"role": "system", "content": text}] if text else [] for text in ("b", "a", "", "b", "a")]
    keys = [system_key({"messages": [*first, {"role": "user", "content": "?"}]}) for first in system]  # type: ignore[typeddict-item]
    assert in_order(keys, range(5)) == [2, 1, 4, 0, 3]
    assert in_order(keys, [3, 0, 2]) == [2, 0, 3]


def test_the_turns_of_a_conversation_go_to_one_server() -> None:
    words = Words("first answer", "second")
    answered(words, conversation("one two", "three"))
    assert [asked["affinity_key"] for asked in words.asked] == ["conversation c1"] * 2


def test_each_request_has_a_seed_of_its_own_that_is_the_same_in_the_next_attempt() -> None:
    def seeds(*users: str, name: str = "c1") -> list[int]:
        words = Words("first answer", "second")
        answered(words, {**conversation(*users), "id": name})
        return [asked["seed"] for asked in words.asked]

    first = seeds("one two", "three")
    assert len(set(first)) == 2
    assert first == seeds("one two", "three", name="in another data set")
    others = {seed for number in range(48) for seed in seeds(f"ticket {number}")}
    assert len(others) == 48
    assert all(0 <= seed < 2**63 for seed in others)


def test_every_sampling_option_is_in_the_request() -> None:
    words = Words("yes")
    options = Regenerate(
        max_tokens=50, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, presence_penalty=0.5, repetition_penalty=1.1
    )
    asyncio.run(answer(words, conversation("a"), replace(CONFIG, regenerate=options)))  # type: ignore[arg-type]
    expected = ("temperature", 0.7), ("top_p", 0.9), ("top_k", 20), ("min_p", 0.1), ("presence_penalty", 0.5)
    assert {*expected, ("repetition_penalty", 1.1)} <= {(k, v) for k, v in words.asked[0].items() if k != "messages"}


def test_variables_of_the_template_are_the_recipes_and_before_them_the_conversations() -> None:
    config = replace(CONFIG, target=Target(chat_template_kwargs={"enable_thinking": False, "date_string": "1 May"}))
    words = Words("yes", "no")
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    for made in (conversation("a"), {**conversation("a"), **own}):
        asyncio.run(answer(words, made, config))  # type: ignore[arg-type]
    sent = [asked["chat_template_kwargs"] for asked in words.asked]
    assert [each["enable_thinking"] for each in sent] == [False, True]
    assert {each["date_string"] for each in sent} == {"1 May"}
    assert [fields["chat_template_kwargs"] for fields in words.rendered[::2]] == sent
    answered(words := Words("yes"), conversation("a"))
    assert "chat_template_kwargs" not in words.asked[0]


def test_an_empty_answer_ends_the_conversation_and_is_named() -> None:
    made = answered(Words(" \n"), conversation("a b"))
    assert (made["messages"], made["turns"], made["dropped"]) == ([], [], "empty_answer")


def test_finished_answers_are_read_back_and_a_cut_line_is_taken_off(tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    assert list(read_answers(log)) == []
    lines = [json.dumps({"index": i, "id": f"c{i}", "turns": [], "messages": []}) + "\n" for i in (4, 0)]
    log.write_text("".join(lines) + '{"index": 2, "id": "c2", "tur')
    assert [answer["index"] for _, answer in read_answers(log)] == [4, 0]
    with log.open("a") as file:  # the next attempt appends
        file.write(json.dumps({"index": 2, "turns": []}) + "\n")
    assert [answer["index"] for _, answer in read_answers(log)] == [4, 0, 2]


def keeping(
    tmp_path: Path, config: Config, stored: str, last_state: str = EVERYWHERE, layers: int = 1, width: int = 8
) -> Job:
    """A job that keeps states, served by nobody."""
    config.extract.dtype = HiddenStatesDtype[stored]
    job = make_job("regenerate", tmp_path / "work", config)
    job.config = from_builtins(Config, select(config, (*KINDS["regenerate"].reads, *KEEPING)))
    job.derived |= {"capture_layer_ids": list(range(1, layers + 1)), "last_state": last_state}
    job.digests |= {"target": "t", "prompts": "p"}
    job.inputs |= {"target": tmp_path / "target", "prompts": tmp_path / "prompts"}
    (tmp_path / "target").mkdir(exist_ok=True)
    (tmp_path / "target/config.json").write_text(json.dumps({"hidden_size": width}))
    job.services["target"] = Endpoint(
        url="http://127.0.0.1:1", model="m", api_key="", mode="extract", directory=tmp_path, log=tmp_path / "log"
    )
    return job


class WordsWithStates(Words):
    """`Words` whose server hands out states: each token's is its own id."""

    def __init__(self, directory: Path, *answers: str) -> None:
        super().__init__(*answers)
        self.directory = directory

    async def requested_states(self, said: Completion, *, item: str) -> FileTransfer:
        ids = [*said.prompt_ids, *said.token_ids[:-1]]
        path = self.directory / f"{len(self.answers)}.safetensors"
        save_file({"hidden_states": torch.tensor(ids).float()[:, None, None], "token_ids": torch.tensor(ids)}, path)
        return FileTransfer(path)


class Remembering(WordsWithStates):
    """A target whose later prompts begin with what it was asked and answered before, as most templates make it."""

    said: Completion | None = None

    async def tokenize(
        self, messages: list[dict[str, str]], *, item: str, affinity_key: str = "", **fields: Any
    ) -> list[int]:
        whole = [*self.said.prompt_ids, *self.said.token_ids] if self.said else []
        return [*whole, 7, 7]

    async def chat(self, messages: list[dict[str, str]], *, item: str, **fields: Any) -> Completion:
        self.said = await super().chat(messages, item=item, **fields)
        return self.said


@pytest.mark.parametrize(("kind", "kept"), [(Remembering, [2]), (WordsWithStates, [0, 1, 2])])
def test_the_states_of_a_history_are_kept_once_where_the_template_keeps_it(
    tmp_path: Path, config: Config, kind: type[WordsWithStates], kept: list[int]
) -> None:
    job = keeping(tmp_path, config, "bfloat16")
    words = kind(tmp_path, "one two", "three four", "five six")
    keeper = TurnFiles(job, 0, sampled=True)
    made = asyncio.run(answer(words, conversation("a", "b", "c"), CONFIG, keeper))  # type: ignore[arg-type]
    assert [i for i, turn in enumerate(made["turns"]) if "states" in turn] == kept
    files = sorted(path.name for path in (job.scratch / "states").iterdir())
    assert files == [f"0000000-{i}.safetensors" for i in kept]


def give_prompts(tmp_path: Path, count: int) -> None:
    (tmp_path / "prompts").mkdir(exist_ok=True)
    every = [{**conversation("a"), "id": f"c{i}"} for i in range(count)]
    (tmp_path / "prompts/conversations.jsonl").write_text("".join(json.dumps(c) + "\n" for c in every))


def give_states(path: Path, states: torch.Tensor, token_ids: list[int], stored: str = "bfloat16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"token_ids": torch.tensor(token_ids), **encode("x", states, stored)}, path)


def states_of(ids: list[int], layers: int, width: int = 8) -> torch.Tensor:
    return torch.randn(100, layers, width, generator=torch.Generator().manual_seed(0))[ids]


def answers_with_states(job: Job, stored: str, talks: list[list[tuple[list[int], list[int]]]]) -> None:
    """What an attempt leaves that has answered everything: conversations as prompts and answers."""
    give_prompts(job.work.parent, len(talks))
    layers, width = len(job.derived["capture_layer_ids"]), hidden_size(job.inputs["target"])
    lines = []
    for index, talk in enumerate(talks):
        turns: list[dict[str, Any]] = []
        for number, (prompt, said) in enumerate(talk):
            turn: dict[str, Any] = {"prompt_ids": prompt, "answer_ids": said, "finish_reason": "stop"}
            if turns and continues(turns[-1], turn):
                (job.scratch / "states" / turns[-1].pop("states")).unlink()
            turn["states"] = f"{index}-{number}.safetensors"
            ids = [*prompt, *said[:-1]]
            give_states(job.scratch / "states" / turn["states"], states_of(ids, layers, width), ids, stored)
            turns.append(turn)
        lines.append({**conversation("a"), "id": f"c{index}", "index": index, "turns": turns, "dropped": None})
    (job.scratch / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


TALKS = [
    [([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6, 7])],  # what was said is kept by the template
    [([8], [9, 10, 11]), ([8, 12], [13, 14])],  # and here it is not
    [([15], [16])],
]


@pytest.mark.parametrize("stored", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("last_state", [EVERYWHERE, ANSWERS])
def test_a_turn_says_which_part_of_the_shards_holds_its_states(
    tmp_path: Path, config: Config, stored: str, last_state: str
) -> None:
    config.extract.shard_tokens = 6
    job = keeping(tmp_path, config, stored, last_state, layers=2)
    answers_with_states(job, stored, TALKS)
    regenerate.main(job)
    published = [json.loads(line) for line in (job.output / "conversations.jsonl").read_text().splitlines()]
    where = [[turn.get("states") for turn in line["turns"]] for line in published]
    assert where == [[None, [0, 0, 6]], [[1, 0, 3], [1, 3, 3]], [[2, 0, 1]]]
    reader = ShardReader(job.output / "states")
    assert [reader.token_ids(row).tolist() for row in reader.rows] == [[1, 2, 3, 4, 5, 6], [8, 9, 10, 8, 12, 13], [15]]
    for row, kept in enumerate(([0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1])):
        wanted = decode(encode("x", states_of(reader.token_ids(row).tolist(), 2), stored))
        if last_state == ANSWERS:
            wanted[~torch.tensor(kept).bool(), -1] = torch.nan
        torch.testing.assert_close(reader.hidden_states(row), wanted, rtol=0, atol=0, equal_nan=True)
    assert (reader.contract["target"], reader.contract["tokens"]) == ("t", "p")
    assert job.digests_written == {p: sha256(job.output / p) for p in job.digests_written}
    assert sorted(job.digests_written) == [f"states/shard-0000{i}.safetensors" for i in range(3)]


def test_the_last_layer_of_a_masked_answer_is_not_kept(tmp_path: Path, config: Config) -> None:
    job = keeping(tmp_path, config, "bfloat16", ANSWERS, layers=2)
    answers_with_states(job, "bfloat16", TALKS)
    log = job.scratch / "answers.jsonl"
    first, *others = [json.loads(line) for line in log.read_text().splitlines()]
    first["turns"][1]["supervised"] = [0, 0]
    log.write_text("".join(json.dumps(line) + "\n" for line in [first, *others]))
    regenerate.main(job)
    last_layer = ShardReader(job.output / "states").hidden_states(0)[:, -1, 0]
    assert last_layer.isnan().tolist() == [True, False, False, False, True, True]
    assert job.record["supervised_tokens"] == job.record["answer_tokens"] - 2


def test_an_attempt_that_is_killed_while_it_packs_states_is_gone_on_with(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.extract.shard_tokens = 6
    job = keeping(tmp_path, config, "bfloat16", layers=2)
    answers_with_states(job, "bfloat16", TALKS)
    real, packed = ShardWriter.add_encoded, list[int]()

    def until_the_last(self: ShardWriter, row: int, *rest: Any) -> None:
        if row == 2:
            raise KeyboardInterrupt
        real(self, row, *rest)
        packed.append(row)

    monkeypatch.setattr(ShardWriter, "add_encoded", until_the_last)
    with pytest.raises(KeyboardInterrupt):
        regenerate.main(job)
    # What is in a sealed shard is not kept beside it.
    assert [path.name for path in (job.scratch / "states").iterdir()] == ["2-0.safetensors"]
    monkeypatch.setattr(ShardWriter, "add_encoded", real)
    again = keeping(tmp_path, config, "bfloat16", layers=2)
    regenerate.main(again)
    assert packed == [0, 1]
    assert ShardReader(job.output / "states").hidden_states(1).shape == (6, 2, 8)
    assert again.record["kept"] == 3


def test_states_of_a_finished_answer_that_are_gone_are_missed(tmp_path: Path, config: Config) -> None:
    job = keeping(tmp_path, config, "bfloat16", layers=2)
    answers_with_states(job, "bfloat16", TALKS)
    (job.scratch / "states/1-0.safetensors").unlink()
    with pytest.raises(StageError, match=r"the hidden states 1-0\.safetensors of a finished answer are missing"):
        regenerate.main(job)


@pytest.mark.parametrize(
    ("stored", "last_state", "most"),
    [("float8_e4m3fn", EVERYWHERE, 0.18), ("float8_e4m3fn", ANSWERS, 0.15), ("bfloat16", ANSWERS, 0.29)],
)
def test_a_conversation_of_many_turns_takes_less_than_half_the_bytes_of_a_file_a_turn(
    tmp_path: Path, config: Config, stored: str, last_state: str, most: float
) -> None:
    """Upstream fans a conversation out: one row, one prefill and one file of bfloat16 states for every answer."""
    talk, said, upstream = [], list[int](), 0
    for number in range(5):
        prompt, answer_ids = [*said, *range(40)], list(range(60 + number))
        said = [*prompt, *answer_ids]
        talk.append((prompt, answer_ids))
        upstream += len(said) * (2 * 256 * 2 + 8)
    job = keeping(tmp_path, config, stored, last_state, layers=2, width=256)
    answers_with_states(job, stored, [talk])
    regenerate.main(job)
    ours = sum(path.stat().st_size for path in (job.output / "states").iterdir())
    print(f"bytes a trained token: {ours / 310:.0f}, upstream's layout {upstream / 310:.0f}, {ours / upstream:.3f}x")
    assert ours / upstream < most


def test_states_are_kept_in_float8_with_their_scales(tmp_path: Path, config: Config) -> None:
    job = keeping(tmp_path, config, "float8_e4m3fn")
    states = torch.randn(3, 1, 8)
    save_file({"hidden_states": states, "token_ids": torch.tensor([1, 2, 3])}, tmp_path / "sent")
    name = TurnFiles(job, 0, sampled=True).write(0, [1, 2, 3], FileTransfer(tmp_path / "sent"))
    kept = load_file(job.scratch / "states" / name)
    assert kept["states"].dtype is torch.float8_e4m3fn
    assert torch.equal(decode(kept), decode(encode("row", states, "float8_e4m3fn")))


def test_states_of_a_turn_are_kept_in_the_stored_type_and_of_other_tokens_refused(
    tmp_path: Path, config: Config
) -> None:
    job = keeping(tmp_path, config, "bfloat16")
    states = torch.randn(3, 1, 8)

    def written() -> FileTransfer:
        path = tmp_path / "from-the-server"
        save_file({"hidden_states": states, "token_ids": torch.tensor([1, 2, 3])}, path)
        return FileTransfer(path)

    name = TurnFiles(job, 12, sampled=True).write(1, [1, 2, 3], written())
    assert name == "0000012-1.safetensors"
    kept = load_file(job.scratch / "states" / name)
    assert torch.equal(kept["states"], states.bfloat16())
    assert kept["token_ids"].tolist() == [1, 2, 3]
    assert TurnFiles(job, 0, sampled=True).request["logprobs"] == 2
    assert "logprobs" not in TurnFiles(job, 16, sampled=False).request
    with pytest.raises(ContractError, match="conversation 12: the server exported the hidden states of other tokens"):
        TurnFiles(job, 12, sampled=True).write(2, [1, 2, 9], written())


class Troubled(WordsWithStates):
    """The states of the answer `bad` are not numbers."""

    async def requested_states(self, said: Completion, *, item: str) -> FileTransfer:
        file = await super().requested_states(said, item=item)
        if said.text == "bad":
            ids = torch.tensor([*said.prompt_ids, *said.token_ids[:-1]])
            save_file({"hidden_states": torch.full((len(ids), 1, 1), torch.nan), "token_ids": ids}, file.path)
        return file


def test_an_answer_with_bad_states_stops_or_ends_its_conversation_as_the_recipe_says(
    tmp_path: Path, config: Config
) -> None:
    def made(job: Job) -> dict[str, Any]:
        words = Troubled(tmp_path, "one", "bad", "never")
        return asyncio.run(answer(words, conversation("a", "b", "c"), CONFIG, TurnFiles(job, 0, sampled=True)))  # type: ignore[arg-type]

    config.target.dtype = Dtype.float32
    with pytest.raises(StageError, match="conversation 0: the target's hidden states are not finite"):
        made(keeping(tmp_path, config, "float32"))
    config.extract.on_bad_row = OnBadRow.skip
    found = made(keeping(tmp_path, config, "float32"))
    assert [m["content"] for m in found["messages"]] == ["a", "one"]
    assert (len(found["turns"]), found["dropped"]) == (1, "bad_states")
    assert "not finite" in found["why"]


@pytest.mark.parametrize(("bad", "kept"), [(2, 10), (9, 0)])
def test_bad_answers_are_counted_asked_for_again_and_too_many_of_them_stop(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, bad: int, kept: int
) -> None:
    give_prompts(tmp_path, 12)
    asked: list[str] = []
    left = bad

    async def played(client: Any, made: dict[str, Any], *_: Any) -> dict[str, Any]:
        nonlocal left
        asked.append(made["id"])
        left -= 1
        turns = [{"prompt_ids": [1], "answer_ids": [2], "finish_reason": "stop"}]
        if left < 0:
            turns[0]["states"] = f"{made['id']}.safetensors"
            give_states(tmp_path / "work/scratch/states" / turns[0]["states"], torch.ones(1, 1, 8), [1])
        told = {"dropped": "bad_states", "why": "not finite", "turns": []} if left >= 0 else {"dropped": None}
        return {**made, "turns": turns, **told}

    monkeypatch.setattr(regenerate, "answer", played)

    def attempt() -> Job:
        job = keeping(tmp_path, config, "bfloat16")
        regenerate.main(job)
        return job

    if not kept:
        with pytest.raises(StageError, match=r"of 5 answers cannot be used, after \d+ answers; the last: not finite"):
            attempt()
        return
    job = attempt()
    assert (job.record["kept"], job.record["dropped"]) == (10, {"bad_states": 2})
    assert job.record["notes"] == [
        "2 conversations end before an answer whose hidden states cannot be used: not finite"
    ]
    asked.clear()
    assert attempt().record["kept"] == 12
    assert sorted(asked) == ["c0", "c1"]
