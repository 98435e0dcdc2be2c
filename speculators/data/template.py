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
from itertools import compress, pairwise
from typing import Any

from speculators.data.answer_text import AnsweredText, Span
from speculators.data.chat_template import ChatTemplate, token_pattern


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


@dataclass(slots=True)
class _Segment:
    """A part of a text that is tokenized by itself, and the answers in it."""

    start: int
    text: str
    spans: list[Span]


class AnswerTokenizer:
    """Tokenizes answered texts by a `tokenizers.Tokenizer`, given as its JSON.

    Texts contain the special tokens that the template wrote; none is added.
    """

    def __init__(self, source: str, template: ChatTemplate) -> None:
        self._source, self._structure = source, set(template.structure)
        self._tokenizer = _load(json.loads(source))
        self._end_ids = {self._tokenizer.token_to_id(token) for token in template.end_tokens}
        added = json.loads(source)["added_tokens"]
        self._added = token_pattern(token["content"] for token in added)
        self._reaching = {t["content"] for t in added if t["lstrip"] or t["single_word"] or t["normalized"]}
        self._headers: dict[str, list[int]] = {}

    def rows(self, conversations: Sequence[Sequence[AnsweredText]]) -> list[list[TokenSequence]]:
        """Tokenize the texts of conversations to the rows of each; a text gives one row wherever it can."""
        segments = [[self._segments(text) for text in conversation] for conversation in conversations]
        texts = [segment.text for conversation in segments for text in conversation for segment in text]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        rows = []
        for conversation, divided in zip(conversations, segments, strict=True):
            tokenized = [self._row([(part, next(encodings)) for part in parts]) for parts in divided]
            parts = [(text, None if text.literal else row) for text, row in zip(conversation, tokenized, strict=True)]
            if len(parts) > 1 or any(row is None for _, row in parts):
                turns = [t for text, row in parts for t in (_turns(row) if row else self._turns_apart(text))]
                rows.append(merge_turns(turns))
            else:
                rows.append([row for _, row in parts if row])
        return rows

    def ends(self, row: TokenSequence) -> int:
        """Count the supervised tokens of a row at which a server stops."""
        return sum(map(self._end_ids.__contains__, compress(row.input_ids, row.loss_mask)))

    def _segments(self, text: AnsweredText) -> list[_Segment]:
        """Divide a text before the last added token of every prompt: nothing before it changes the tokens after it."""
        segments, end = [_Segment(0, "", [])], 0
        for span in text.spans:
            *_, last = (None, *self._added.finditer(text.text, end, span.prompt_end))
            if last and last[0] not in self._reaching:
                segments.append(_Segment(last.start(), "", []))
            segments[-1].spans.append(span)
            end = span.end
        for segment, following in pairwise([*segments, _Segment(end, "", [])]):
            segment.text = text.text[segment.start : following.start]
        return segments

    def _row(self, segments: Sequence[tuple[_Segment, Any]]) -> TokenSequence | None:
        """Join the tokens of a text's segments; None if a prompt in it has other tokens than alone."""
        row = TokenSequence([], [])
        for segment, encoding in segments:
            ids, offsets = encoding.ids, encoding.offsets
            starts = [offset[0] for offset in offsets]
            mask = [0] * len(ids)
            for span in segment.spans:
                edges = [edge - segment.start for edge in (span.prompt_end, span.start, span.end)]
                first, begin, end = (bisect_left(starts, edge) for edge in edges)
                cuts = ((first, edges[0]), (begin, edges[1]))
                if begin == end or any(index and offsets[index - 1][1] > edge for index, edge in cuts):
                    return None
                if self._header(segment.text[: edges[0]]) != ids[:first]:
                    return None
                mask[begin:end] = [1] * (end - begin)
            row.input_ids += ids
            row.loss_mask += mask
        return row

    def _header(self, text: str) -> list[int]:
        """Tokens of the end of a prompt by itself."""
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
