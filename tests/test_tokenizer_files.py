"""Mask token and chat template, from the files of a tokenizer alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.errors import ContractError
from speculators.tokenizer_files import chat_template, mask_token

TEMPLATE = "{{ messages }}<|end|>"


def write(directory: Path, tokens: list[str], added: dict[str, int] | None = None, **config: Any) -> Path:
    """A tokenizer of these tokens in order, `added` ones, and this tokenizer_config.json."""
    extra = [{"id": token_id, "content": text} for text, token_id in (added or {}).items()]
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": extra}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **config}))
    return directory


TOKENS = ["a", "b", "<pad>", "<|end|>"]
ENDS = {"eos_token": "<|end|>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("tokens", "added", "config", "size", "expected"),
    [
        ([*TOKENS, "<mask>"], {}, {"mask_token": "<mask>"}, 8, (4, "<mask>", False)),
        (TOKENS, {"<mask>": 4}, {"mask_token": {"content": "<mask>"}}, 8, (4, "<mask>", False)),
        (TOKENS, {"<mask>": 8}, {"mask_token": "<mask>", **ENDS}, 8, (2, "<pad>", False)),  # after the embedding
        (TOKENS, {}, ENDS, 8, (4, "", False)),
        (TOKENS, {"<x>": 6}, ENDS, 8, (7, "", False)),  # ids 4 and 5 are unused too, but who knows for what
        ([*TOKENS, "<|reserved_special_token_0|>"], {}, ENDS, 5, (4, "<|reserved_special_token_0|>", False)),
        ([*TOKENS, "<unused0>"], {}, ENDS, 5, (4, "<unused0>", False)),
        (TOKENS, {}, ENDS, 4, (2, "<pad>", False)),
        (TOKENS, {}, {"eos_token": "<|end|>", "pad_token": "<|end|>"}, 4, (3, "<|end|>", True)),  # SmolLM2
        (TOKENS, {}, {"eos_token": "b", "pad_token": "<|end|>"}, 4, (3, "<|end|>", True)),  # the template writes it
    ],
)
def test_the_mask_token_is_the_first_that_is_within_the_embedding(
    tmp_path: Path, tokens: list[str], added: dict[str, int], config: dict[str, Any], size: int, expected: tuple[Any]
) -> None:
    token = mask_token(write(tmp_path, tokens, added, **config), size)
    assert token is not None
    assert (token.id, token.text, token.in_answers) == expected


def test_a_token_that_ends_an_answer_is_known_from_every_file(tmp_path: Path) -> None:
    write(tmp_path, TOKENS, pad_token="<pad>")
    for ends in (2, [3, 2]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        token = mask_token(tmp_path, 4)
        assert token is not None
        assert token.in_answers


def test_a_tokenizer_without_such_a_token_is_refused_and_one_of_another_kind_left_to_training(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no token for masks"):
        mask_token(write(tmp_path, TOKENS), 4)
    (tmp_path / "tokenizer.json").unlink()
    assert mask_token(tmp_path, 4) is None


def test_the_tokens_of_a_unigram_model_are_numbered(tmp_path: Path) -> None:
    write(tmp_path, [])
    scores = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(scores))
    token = mask_token(tmp_path, 4)
    assert token is not None
    assert token.id == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": TEMPLATE}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": TEMPLATE}]}}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}}, None),
        ({"chat_template.json": {"chat_template": TEMPLATE}, "tokenizer_config.json": {}}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": ""}, "chat_template.jinja": " \n"}, None),
        ({}, None),
    ],
)
def test_a_chat_template_is_found_where_transformers_finds_it(
    tmp_path: Path, files: dict[str, Any], expected: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert chat_template(tmp_path) == expected
