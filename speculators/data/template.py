"""Conversations whose answers come with the data: what the target would have seen, and what it would have said.

A chat template is a program; which part of its output the assistant said is found by rendering a conversation up to
an answer, and again with it: the answer is what was added. The two parts are tokenised apart, as they are in
serving, where the prompt is whole before the first token of the answer is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One answer and everything before it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(slots=True)
class TokenSequence:
    """Token ids and, for each, 1 where the target said it and the draft learns from it, else 0."""

    input_ids: list[int]
    loss_mask: list[int]


class TemplateError(Exception):
    """The chat template does not take this conversation, or does not put the answer after the prompt."""


def chat_turns(tokenizer: Any, messages: list[dict[str, str]]) -> list[ChatTurn]:
    """One `ChatTurn` for each assistant message, in order.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.

    Raises:
        TemplateError: see there.
    """
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
        whole = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise TemplateError("the chat template changes the prompt when the answer is added")
        answer = _spoken(tokenizer, whole[len(prompt) :])
        turns.append(ChatTurn(prompt_ids=_ids(tokenizer, prompt), answer_ids=_ids(tokenizer, answer)))
    return turns


def merge_turns(turns: list[ChatTurn]) -> list[TokenSequence]:
    """One row for turns that each start with the whole of the one before, a new row where that breaks.

    It breaks where a template rewrites the past (drops what was thought, say) or an answer is tokenised
    differently as part of a prompt. A row then starts over with the whole prompt, and every answer is supervised once.
    """
    rows: list[TokenSequence] = []
    for turn in turns:
        last = rows[-1] if rows else None
        if last and turn.prompt_ids[: len(last.input_ids)] == last.input_ids:
            between = turn.prompt_ids[len(last.input_ids) :]
            last.input_ids += between + turn.answer_ids
            last.loss_mask += [0] * len(between) + [1] * len(turn.answer_ids)
        else:
            mask = [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)
            rows.append(TokenSequence([*turn.prompt_ids, *turn.answer_ids], mask))
    return rows


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refuses it: {error}") from error


def _spoken(tokenizer: Any, added: str) -> str:
    """The answer up to the token that ends it; the line break that templates write after that, nobody samples."""
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    stripped = added.rstrip()
    return stripped if stripped.endswith(special) else added


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The template wrote the special tokens already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
