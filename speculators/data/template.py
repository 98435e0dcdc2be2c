"""Tokenizes answered conversations: token ids and loss masks, where every prompt is the one that a server would send.

A text is tokenized once, with all answers in it. Where the tokens before an answer are not those of its prompt alone,
the prompt is tokenized by itself, as a server does before the first token of the answer exists.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from speculators.data.answer_text import AnsweredText, Span


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTurn:
    """One answer of the assistant and all that precedes it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[int]
    supervised: tuple[int, int] | None = None
    """Range of the answer's tokens that the draft learns from; None: all."""

    def answer_mask(self) -> list[int]:
        """The loss mask of the answer."""
        begin, end = self.supervised or (0, len(self.answer_ids))
        return [int(begin <= index < end) for index in range(len(self.answer_ids))]


def stored_turns(turns: Iterable[Mapping[str, Any]]) -> list[ChatTurn]:
    """The chat turns of a line of `conversations.jsonl` that the target has answered."""
    return [
        ChatTurn(
            prompt_ids=turn["prompt_ids"],
            answer_ids=turn["answer_ids"],
            supervised=tuple(turn["supervised"]) if "supervised" in turn else None,
        )
        for turn in turns
    ]


@dataclass(slots=True)
class TokenSequence:
    """Token ids [N] and their loss mask [N]: 1 at tokens of an answer, which the draft learns from, else 0."""

    input_ids: list[int]
    loss_mask: list[int]


def merge_turns(turns: Sequence[ChatTurn]) -> list[TokenSequence]:
    """Join chat turns of a conversation to one row, where each prompt begins with all tokens of the turn before.

    A new row starts at a turn whose prompt does not: the template rewrites history (drops reasoning, say), or an answer
    is tokenized differently as part of a prompt. Every answer is supervised once, within its range.
    """
    rows: list[TokenSequence] = []
    for turn in turns:
        last = rows[-1] if rows else None
        if last and turn.prompt_ids[: len(last.input_ids)] == last.input_ids:
            between = turn.prompt_ids[len(last.input_ids) :]
            last.input_ids += between + turn.answer_ids
            last.loss_mask += [0] * len(between) + turn.answer_mask()
        else:
            mask = [0] * len(turn.prompt_ids) + turn.answer_mask()
            rows.append(TokenSequence([*turn.prompt_ids, *turn.answer_ids], mask))
    return rows


class AnswerTokenizer:
    """Tokenizes answered texts by a `tokenizers.Tokenizer`, given as its JSON.

    Texts contain the special tokens that the template wrote; none is added.
    """

    def __init__(self, source: str, structure: Sequence[str]) -> None:
        self._source, self._structure = source, set(structure)
        self._tokenizer = _load(json.loads(source))
        self._added = {token["id"] for token in json.loads(source)["added_tokens"]}
        self._headers: dict[str, list[int]] = {}

    def rows(self, conversations: Sequence[Sequence[AnsweredText]]) -> list[list[TokenSequence]]:
        """Tokenize the texts of conversations to the rows of each; a text gives one row wherever it can."""
        texts = [text.text for conversation in conversations for text in conversation]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        rows = []
        for conversation in conversations:
            parts = [(text, self._row(text, next(encodings))) for text in conversation]
            if len(parts) > 1 or any(row is None for _, row in parts):
                turns = [t for text, row in parts for t in (_turns(row) if row else self._turns_apart(text))]
                rows.append(merge_turns(turns))
            else:
                rows.append([row for _, row in parts if row])
        return rows

    def _row(self, text: AnsweredText, encoding: Any) -> TokenSequence | None:
        """The row of a text that was tokenized whole; None if a prompt in it has other tokens than alone."""
        if text.literal:
            return None
        ids, offsets = encoding.ids, encoding.offsets
        starts = [offset[0] for offset in offsets]
        mask = [0] * len(ids)
        for span in text.spans:
            first, begin, end = (bisect_left(starts, edge) for edge in (span.prompt_end, span.start, span.end))
            cuts = [(first, span.prompt_end), (begin, span.start)]
            if begin == end or any(index and offsets[index - 1][1] > position for index, position in cuts):
                return None
            header = next((k for k in range(first - 1, -1, -1) if ids[k] in self._added), 0)
            if self._header(text.text[starts[header] if header else 0 : span.prompt_end]) != ids[header:first]:
                return None
            mask[begin:end] = [1] * (end - begin)
        last = bisect_left(starts, text.spans[-1].end)
        return TokenSequence(ids[:last], mask[:last])

    def _header(self, text: str) -> list[int]:
        """Tokens of the end of a prompt, from its last added token: what comes before cannot change them."""
        if (known := self._headers.get(text)) is not None:
            return known
        ids = self._ids(text)
        if len(text) < 256 and len(self._headers) < 4096:
            self._headers[text] = ids
        return ids

    def _turns_apart(self, text: AnsweredText) -> list[ChatTurn]:
        """Tokenize each prompt of a text by itself, and each answer as what follows it."""
        turns = []
        for span in text.spans:
            prompt = self._ids(text.text[: span.prompt_end])
            prompt = prompt + self._following(text.text, span.prompt_end, span.start, prompt)
            answer: list[int] = []
            for start, end, literal in _parts(text, span):
                if literal:
                    answer += self._spelled_ids(text.text[start:end])
                else:
                    answer += self._following(text.text, start, end, [] if text.literal else prompt)
            turns.append(ChatTurn(prompt_ids=prompt, answer_ids=answer))
        return turns

    def _following(self, text: str, start: int, end: int, before: list[int]) -> list[int]:
        """Tokens of `text[start:end]` after the tokens `before` of what precedes it."""
        if start == end:
            return []
        if before and (joint := self._ids(text[:end]))[: len(before)] == before:
            return joint[len(before) :]
        return self._apart(self._tokenizer, text[start:end])

    def _apart(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of a text in the middle of another, where the tokenizer would put a space before it otherwise."""
        if not self._prepends:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        line_break = tokenizer.encode("\n", add_special_tokens=False).ids
        return list(tokenizer.encode(f"\n{text}", add_special_tokens=False).ids[len(line_break) :])

    def _spelled_ids(self, text: str) -> list[int]:
        return self._apart(self._speller, text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _prepends(self) -> bool:
        """Whether the tokenizer puts a space before each text, as Llama 2's."""
        line_break = self._ids("\n")
        joint = self._ids("\na")
        return joint[: len(line_break)] == line_break and joint[len(line_break) :] != self._ids("a")

    @cached_property
    def _speller(self) -> Any:
        """The tokenizer without the tokens that structure a conversation: it spells them."""
        source = json.loads(self._source)
        source["added_tokens"] = [token for token in source["added_tokens"] if token["content"] not in self._structure]
        return _load(source)


def _load(source: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    # A post-processor adds special tokens, which templates write themselves, or moves offsets past spaces.
    bare = {**source, "truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps(bare))


def _turns(row: TokenSequence) -> list[ChatTurn]:
    """The answers of a row, each with the tokens before it."""
    edges = [k for k in range(1, len(row.loss_mask) + 1) if row.loss_mask[k - 1 : k] != row.loss_mask[k : k + 1]]
    return [
        ChatTurn(prompt_ids=row.input_ids[:start], answer_ids=row.input_ids[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _parts(text: AnsweredText, span: Span) -> list[tuple[int, int, bool]]:
    """Divide an answer at its literal texts: start, end, whether the part is literal."""
    parts, position = [], span.start
    for start, end in text.literal:
        parts += [(position, start, False), (start, end, True)]
        position = end
    return [part for part in [*parts, (position, span.end, False)] if part[0] < part[1]]
