from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speculators.config.schema import Config
from speculators.data.template import ChatTurn, merge_turns
from speculators.errors import SourceError
from speculators.stages import tokenize
from speculators.stages.tokenize import cut
from tests.stages.jobs import make_job

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: a=0 b=1 c=2 d=3 newline=4, ?=5, special tokens from 6."""
    vocabulary = {character: i for i, character in enumerate("abcd\n")}
    inner = Tokenizer(models.WordLevel({**vocabulary, "?": 5}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="?")
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    made.chat_template = CHAT
    return made


CALLS = [{"type": "function", "function": {"name": "zz", "arguments": {}}}]


def write_conversations(directory: Path, rows: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    text = "".join(json.dumps({"source": "s", **row}) + "\n" for row in rows)
    (directory / "conversations.jsonl").write_text(text)
    return directory


def turn(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    return {"prompt_ids": prompt, "answer_ids": answer, "finish_reason": "stop"}


def config_of(longest: int = 100, least: int = 1) -> Config:
    config = Config()
    config.max_seq_len, config.tokenize.min_supervised = longest, least
    return config


def test_turns_that_continue_each_other_make_one_row_with_every_answer_supervised() -> None:
    turns = [ChatTurn(prompt_ids=[1, 2], answer_ids=[3, 4]), ChatTurn(prompt_ids=[1, 2, 3, 4, 5], answer_ids=[6])]
    (row,) = merge_turns(turns)
    assert row.input_ids == [1, 2, 3, 4, 5, 6]
    assert row.loss_mask == [0, 0, 1, 1, 0, 1]


def test_a_turn_that_does_not_continue_the_one_before_starts_a_row_of_its_own() -> None:
    turns = [ChatTurn(prompt_ids=[1, 2], answer_ids=[3, 4]), ChatTurn(prompt_ids=[1, 2, 9, 5], answer_ids=[6])]
    first, second = merge_turns(turns)
    assert (first.input_ids, first.loss_mask) == ([1, 2, 3, 4], [0, 0, 1, 1])
    assert (second.input_ids, second.loss_mask) == ([1, 2, 9, 5, 6], [0, 0, 0, 0, 1])
    assert cut(second, 3).input_ids == [1, 2, 9]


def test_rows_keep_the_ids_of_the_server_and_the_order_of_the_conversations(tmp_path: Path) -> None:
    rows = [
        {"id": "long", "turns": [turn([1, 2], [3] * 9)]},
        {"id": "short", "turns": [turn([1], [7, 8])]},
        {"id": "mute", "turns": []},
        {"id": "late", "turns": [turn([5] * 6, [1, 2])]},
    ]
    conversations = write_conversations(tmp_path / "in", rows)
    job = make_job("tokenize", tmp_path / "w", config_of(6, 2), conversations=conversations, target=tmp_path)
    tokenize.main(job)
    found = load_from_disk(job.output)
    assert found["id"][:] == ["long", "short"]
    assert found["input_ids"][:] == [[1, 2, 3, 3, 3, 3], [1, 7, 8]]
    assert found["loss_mask"][:] == [[0, 0, 1, 1, 1, 1], [0, 1, 1]]
    assert found["seq_len"][:] == [6, 3]
    assert found["source"][:] == ["s", "s"]
    assert job.record == {
        "conversations": 4,
        "dropped conversations: no answer": 1,
        "dropped rows: fewer supervised tokens than min_supervised": 1,
        "rows": 2,
        "rows cut to max_seq_len": 2,
        "tokens": 9,
        "tokens cut": 5 + 2,
        "supervised tokens": 6,
        "lengths": {"up to 4 tokens": 1, "up to 8 tokens": 1},
        "answers_per_row": {"1": 2},
        "by_source": {"s": {"rows": 2, "tokens": 9, "supervised tokens": 6, "supervised_ratio": 0.6667}},
    }
    assert not list(job.scratch.iterdir())


def test_the_same_conversations_give_the_same_bytes(tmp_path: Path) -> None:
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "turns": [turn([1], [2, 3])]}])
    seen = []
    for name in ("first", "second"):
        job = make_job("tokenize", tmp_path / name, config_of(), conversations=conversations, target=tmp_path)
        tokenize.main(job)
        seen.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in job.output.iterdir()})
    assert seen[0] == seen[1]


def test_conversations_with_their_own_answers_go_through_the_target_s_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path / "target")
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    end = tokenizer.eos_token_id
    conversations = write_conversations(
        tmp_path / "in", [{"id": "a", "messages": TALK}, {"id": "b", "messages": [TALK[0]]}]
    )
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    tokenize.main(job)
    (row,) = load_from_disk(job.output)
    first = [user, 0, 1, end, 4, assistant]
    assert row["input_ids"] == [*first, 2, 3, end, 4, user, 0, end, 4, assistant, 1, end]
    assert row["loss_mask"] == [0] * 6 + [1] * 3 + [0] * 6 + [1] * 2  # the line break after the end is nobody's token
    assert job.record["masks"] == {"answers": 2, "difference of renderings": 2, "end-of-turn tokens": 2}
    assert "notes" not in job.record
    assert job.record["dropped conversations: no answer"] == 1


def test_conversations_that_are_tokens_already_are_rows_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": "a", "input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}]
    conversations = write_conversations(tmp_path / "in", rows)
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path)
    tokenize.main(job)
    assert load_from_disk(job.output)["loss_mask"][:] == [[0, 1, 1]]


def test_options_of_the_chat_template_come_from_the_recipe_and_from_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{{ style }}{{ tone }}" + CHAT
    tokenizer.save_pretrained(tmp_path / "target")
    rows = [{"id": "a", "messages": TALK}, {"id": "b", "messages": TALK, "chat_template_kwargs": {"tone": "c"}}]
    conversations = write_conversations(tmp_path / "in", rows)
    config = config_of()
    config.target.chat_template_kwargs = {"style": "a", "tone": "b"}
    job = make_job("tokenize", tmp_path / "w", config, conversations=conversations, target=tmp_path / "target")
    tokenize.main(job)
    assert [ids[:2] for ids in load_from_disk(job.output)["input_ids"][:]] == [[0, 1], [0, 2]]


def test_conversations_that_the_template_refuses_are_dropped_with_the_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{{ messages[0].content + ('' if messages[0].role == 'user' else 1) }}" + CHAT
    tokenizer.save_pretrained(tmp_path / "target")
    rows = [{"id": "a", "messages": TALK}, {"id": "b", "messages": [{"role": "system", "content": "a"}, *TALK]}]
    conversations = write_conversations(tmp_path / "in", rows)
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    tokenize.main(job)
    assert load_from_disk(job.output)["id"][:] == ["a"]
    (reason,) = [name for name in job.record if name.startswith("dropped")]
    assert "TypeError" in reason
    assert job.record["masks"]["dropped conversations"] == 1


def test_an_end_of_turn_token_at_which_no_server_stops_is_noted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = CHAT.replace("<end>", "<turn>")
    tokenizer.save_pretrained(tmp_path / "target")
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": TALK}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    tokenize.main(job)
    (note,) = job.record["notes"]
    assert note.startswith("0.00 end-of-turn tokens are supervised per answer")


def test_all_cores_give_the_rows_of_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "target")
    rows = [{"id": str(i), "messages": TALK * (1 + i % 3)} for i in range(40)]
    conversations = write_conversations(tmp_path / "in", rows)
    monkeypatch.setattr(tokenize, "_CHUNK_BYTES", 1000)
    found = []
    for name, cores in (("one", {0}), ("all", {0, 1})):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        monkeypatch.setattr(tokenize, "_WORTH_PROCESSES", 1)
        job = make_job(
            "tokenize", tmp_path / name, config_of(), conversations=conversations, target=tmp_path / "target"
        )
        tokenize.main(job)
        digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in job.output.iterdir()}
        found.append((digests, job.record))
    assert found[0] == found[1]
    assert found[0][1]["rows"] == 40


def test_a_target_without_chat_template_is_refused_where_one_is_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "target")
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": TALK}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    with pytest.raises(SourceError, match="no chat template"):
        tokenize.main(job)


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": TALK}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: object())
    with pytest.raises(SourceError, match="object is no fast tokenizer"):
        tokenize.main(job)


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "turns": [turn([1], [2])]}])
    job = make_job("tokenize", tmp_path / "w", config_of(least=5), conversations=conversations, target=tmp_path)
    with pytest.raises(SourceError, match="no row is left of 1 conversations") as raised:
        tokenize.main(job)
    assert "min_supervised" in raised.value.hint


@pytest.mark.parametrize(
    ("messages", "reason", "hint"),
    [
        (TALK[:1], "1 dropped conversations: no answer", "pipeline=offline"),
        ([*TALK[:1], {"role": "assistant", "content": "", "tool_calls": CALLS}], "leaves out the tool calls", "chat_t"),
    ],
)
def test_nothing_left_has_a_hint_for_its_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, messages: list[Any], reason: str, hint: str
) -> None:
    tokenizer.save_pretrained(tmp_path / "target")
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": messages}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    with pytest.raises(SourceError, match=reason) as raised:
        tokenize.main(job)
    assert hint in raised.value.hint
