"""Tokenises conversations with the data's own answers, by the target's chat template.

A chat template is a program. To find the answer in its output, a conversation is rendered up to the answer and again
with it: the answer is what was added. Prompt and answer are tokenised apart, as in serving, where the prompt is
tokenised before the answer's first token exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from speculators.data.conversations import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One answer of the assistant and all that precedes it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(slots=True)
class TokenSequence:
    """Token ids [N] and their loss mask [N]: 1 at tokens of an answer, which the draft learns from, else 0."""

    input_ids: list[int]
    loss_mask: list[int]


class TemplateError(Exception):
    """The chat template rejects a conversation, or does not put the answer after the prompt."""


def chat_turns(tokenizer: Any, messages: list[Message]) -> list[ChatTurn]:
    """Tokenise each assistant message with what precedes it, in order, by a transformers tokenizer's chat template.

    Raises:
        TemplateError: the chat template cannot be used for this conversation.
    """
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not answered.startswith(prompt):
            raise TemplateError("the chat template changes the prompt when the answer is added")
        answer = _up_to_end_token(tokenizer, answered[len(prompt) :])
        turns.append(ChatTurn(prompt_ids=_ids(tokenizer, prompt), answer_ids=_ids(tokenizer, answer)))
    return turns


def merge_turns(turns: list[ChatTurn]) -> list[TokenSequence]:
    """Join chat turns of a conversation to one row, where each prompt begins with all tokens of the turn before.

    A new row starts at a turn whose prompt does not: the template rewrites history (drops reasoning, say), or an answer
    is tokenised differently as part of a prompt. Every answer is supervised once.
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


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template refuses it: {error}") from error


def _up_to_end_token(tokenizer: Any, answer: str) -> str:
    """Drop the line break that templates write after an answer's end token: no server samples it."""
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    stripped = answer.rstrip()
    return stripped if stripped.endswith(special) else answer


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The template has written the special tokens.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
