from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speculators.config.schema import Config
from speculators.data.template import ChatTurn, TemplateError, chat_turns, merge_turns
from speculators.errors import SourceError
from speculators.stages import tokenize
from speculators.stages.tokenize import cut
from tests.stages.jobs import make_job

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that drops what was answered before."""

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


def test_answers_of_the_data_are_found_by_rendering_with_and_without_them(tokenizer: PreTrainedTokenizerFast) -> None:
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    end = tokenizer.eos_token_id
    first, second = chat_turns(tokenizer, TALK)
    assert first.prompt_ids == [user, 0, 1, end, 4, assistant]
    assert first.answer_ids == [2, 3, end]  # the template's line break after it is nobody's token
    assert second.prompt_ids == [*first.prompt_ids, *first.answer_ids, 4, user, 0, end, 4, assistant]
    assert second.answer_ids == [1, end]
    (row,) = merge_turns([first, second])
    assert sum(row.loss_mask) == 5


def test_a_template_that_rewrites_the_past_gives_a_row_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETFUL
    assert len(merge_turns(chat_turns(tokenizer, TALK))) == 2


def test_a_template_that_refuses_a_conversation_says_why(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(TemplateError, match="no system role"):
        chat_turns(tokenizer, TALK)


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
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": TALK}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    tokenize.main(job)
    (row,) = merge_turns(chat_turns(tokenizer, TALK))
    assert load_from_disk(job.output)["input_ids"][:] == [row.input_ids]


def test_a_target_without_chat_template_is_refused_where_one_is_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "target")
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "messages": TALK}])
    job = make_job("tokenize", tmp_path / "w", config_of(), conversations=conversations, target=tmp_path / "target")
    with pytest.raises(SourceError, match="no chat template"):
        tokenize.main(job)


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    conversations = write_conversations(tmp_path / "in", [{"id": "a", "turns": [turn([1], [2])]}])
    job = make_job("tokenize", tmp_path / "w", config_of(least=5), conversations=conversations, target=tmp_path)
    with pytest.raises(SourceError, match="no row is left of 1 conversations"):
        tokenize.main(job)
