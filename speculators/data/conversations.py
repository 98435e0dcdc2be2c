"""Conversations: what a usable row of a dataset becomes; every row that is dropped is counted by reason.

Training and evaluation use the same rules here: which rows are usable (`Conversation`), and which are kept for
evaluation (`in_evaluation_holdout`). `ConversationRow` is a line of `conversations.jsonl`, which the stages pass on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from speculators.config.choices import DataFormat, OnDamage
from speculators.config.schema import Dataset
from speculators.data.damage import BrokenRow, ByteCounts, DamageError
from speculators.data.files import data_files
from speculators.data.messages import BadRowError, RowContent, row_content, row_form
from speculators.data.messages import Message as Message
from speculators.data.reading import data_rows
from speculators.errors import SourceError


class Answer(TypedDict):
    """An answer of the target: token ids of the rendered prompt and of the answer as sampled."""

    prompt_ids: list[int]
    answer_ids: list[int]
    finish_reason: str
    """`stop` or `length`."""
    supervised: NotRequired[list[int]]
    """[begin, end] of the answer's tokens that are supervised; without it, all are."""
    states: NotRequired[list[int]]
    """[row, start, length]: the slice of a row of `states/` that has the hidden states of prompt and answer."""
    picks: NotRequired[list[tuple[int, int, float | None]]]
    """(index in the answer, token, log-probability) of some of the server's greedy tokens."""


class ConversationRow(TypedDict):
    """A line of `conversations.jsonl`. An optional key is absent rather than null."""

    id: str
    """`DATASET/ID`, unique in the file."""
    source: str  # name of the data set
    messages: list[Message]
    """Without answers of the target, and to be answered by it: what it gets, and of conversations with tools also the
    recorded calls and results. If they are to be trained on: all messages."""
    tools: NotRequired[list[Any]]
    """Functions that are offered, in OpenAI's form."""
    chat_template_kwargs: NotRequired[dict[str, Any]]
    """Options of the chat template for this conversation."""
    turns: NotRequired[list[Answer]]
    """One for each answer of the target; without it, the data's own answers are used."""
    input_ids: NotRequired[list[int]]
    """Token ids and loss mask of a conversation that was tokenised already; it has no messages."""
    loss_mask: NotRequired[list[int]]


@dataclass(slots=True)
class Conversation:
    """A usable row of a data file, with at least one message of a user; or token ids."""

    dataset: str
    row_id: str
    content: RowContent

    @property
    def id(self) -> str:
        """Unique over all data sets."""
        return f"{self.dataset}/{self.row_id}"

    @property
    def messages(self) -> list[Message]:
        """All messages of the row; none of one that has token ids."""
        return self.content.messages

    @property
    def first(self) -> str:
        """The first user message; of a row of token ids, these."""
        if self.content.tokens is not None:
            return " ".join(map(str, self.content.tokens[0]))
        return next(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def prompt(self) -> str:
        """All that the first answer is an answer to, as one text: tools, system messages and first user message."""
        before = [] if self.content.tools is None else [json.dumps(self.content.tools, sort_keys=True)]
        for message in self.messages:
            if message["role"] == "user":
                break
            before.append(f"{message['role']}: {message['content']}")
        return "\n".join([*before, self.first])

    def row(self, messages: list[Message]) -> ConversationRow:
        """The line of `conversations.jsonl` with these messages."""
        row: ConversationRow = {"id": self.id, "source": self.dataset, "messages": messages}
        if self.content.tools is not None:
            row["tools"] = self.content.tools
        if self.content.chat_template_kwargs is not None:
            row["chat_template_kwargs"] = self.content.chat_template_kwargs
        if self.content.tokens is not None:
            row["input_ids"], row["loss_mask"] = self.content.tokens
        return row

    def with_instruction(self, instruction: str) -> list[Message]:
        """Return the messages; an instruction and an empty line come before the first user message."""
        if not instruction or not self.messages:
            return self.messages
        index = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        prompt: Message = {"role": "user", "content": f"{instruction}\n\n{self.first}"}
        return [*self.messages[:index], prompt, *self.messages[index + 1 :]]


@dataclass(slots=True)
class RowCounts:
    """Counts of the rows of a dataset; `rows` is the number of dropped and of usable rows."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    """Rows by their form, a `DataFormat`."""
    damage: list[dict[str, Any]] = field(default_factory=list)
    """Where each damaged file is, and why."""
    bytes: ByteCounts = field(default_factory=ByteCounts)
    columns: list[str] = field(default_factory=list)
    """Those of the first row."""
    fits: str = ""
    """The `DataFormat` that the first row fits, whatever the recipe says; empty for none."""

    def record(self) -> dict[str, Any]:
        """The counts for an artifact's record."""
        return {
            "read": self.rows,
            "dropped": dict(sorted(self.dropped.items())),
            "forms": dict(sorted(self.forms.items())),
            "bytes": self.bytes.total,
            "bytes_not_read": self.bytes.not_read,
            "damage": self.damage,
        }

    def why_unusable(self, name: str, spec: Dataset) -> SourceError:
        """The error for a dataset without a usable row, with the reasons for which its rows were dropped."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        reasons = reasons or (self.damage[0]["reason"] if self.damage else "it has no rows")
        columns = f" (columns: {', '.join(self.columns[:8])})" if self.columns and not self.forms else ""
        return SourceError(
            f"data set `{name}` has no usable row among {self.rows}: {reasons}{columns}", self._fix(name, spec)
        )

    def _fix(self, name: str, spec: Dataset) -> str:
        """What makes the rows usable that were dropped for the most frequent reason."""
        reason = self.dropped.most_common(1)[0][0] if self.dropped else ""
        option = f"data.{name}"
        fixes = {
            "min_chars": f"{option}.min_chars=1",
            "max_chars": f"{option}.max_chars=null",
            "ASCII": f"{option}.ascii_only=false",
            "held out for evaluation": "prompts.eval_holdout_ratio=0",
            "trained on": "prompts.eval_holdout_ratio=0.5, and train again",
            "user's": f"{option}.leading_answer=trim",
            "unknown role": f"name the speakers: {option}.roles={{SPEAKER: user, SPEAKER: assistant}}",
            "images": "give a dataset of text; images are not read",
            "token ids": "pipeline=off_policy, to train on them; to measure, a dataset of text",
            "not an object": 'write rows as objects: {"prompt": "..."}',
            "broken": "write the file again: each line, or item of a list, must be JSON",
            "not UTF-8": "convert the file: iconv -f LATIN1 -t UTF-8",
            "no answer": f"{option}.answer_field=COLUMN; or pipeline=offline, in which the target answers",
        }
        for part, fix in fixes.items():
            if part in reason:
                return fix
        if self.fits and spec.format is not None and spec.format.name != self.fits:
            return f"{option}.format={self.fits}, which its rows have, or leave `format` out"
        if self.columns:
            return f"name the column: {option}.messages_field=COLUMN, or {option}.prompt_field=COLUMN"
        return 'give rows: {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'

    def notes(self, name: str) -> list[str]:
        """Sentences about damage, and about rows that no filter of the recipe drops."""
        lines = [
            f"{name}: {damage['file']}: {damage['reason']} at byte {damage['byte']}; "
            f"{damage['rows_before']} rows before it are read, {damage['bytes_not_read']} bytes are not"
            for damage in self.damage
        ]
        unexpected = [(why, count) for why, count in self.dropped.most_common() if not why.startswith(_BY_RULE)]
        if unexpected:
            reasons = ", ".join(f"{count} {reason}" for reason, count in unexpected)
            lines.append(f"{name}: {sum(count for _, count in unexpected)} of {self.rows} rows dropped: {reasons}")
        return lines


_BY_RULE = ("first message", "same ", "held out for evaluation", "trained on", "first turn")
"""How the reasons begin for which the recipe drops rows."""


def usable(
    path: Path, name: str, spec: Dataset, counts: RowCounts, seen: set[bytes], *, answers: bool = False
) -> Iterator[Conversation]:
    """Read the conversations of data set `name` that pass its filters, each prompt once; with `answers`, each
    conversation once, those of token ids included, which have no prompt to answer.

    `seen` collects the digests of prompts over several data sets. The filters see the text as it is in the file, before
    `Conversation.with_instruction`.

    Raises:
        SourceError: the file is not in the format that `spec` says, or is damaged and `spec.on_damage` is `error`.
    """
    ids: set[str] = set()
    for conversation in read_conversations(path, name, spec, counts):
        text = json.dumps(conversation.row(conversation.messages)["messages"]) if answers else conversation.prompt
        digest = text_digest(text if conversation.messages else conversation.first)
        if reason := _filtered(conversation.first, spec) if conversation.messages else None:
            counts.dropped[reason] += 1
        elif digest in seen:
            counts.dropped["same conversation as another" if answers else "same prompt as another"] += 1
        elif not conversation.messages and not answers:
            counts.dropped["token ids, which pipeline=off_policy uses"] += 1
        elif conversation.row_id in ids:
            counts.dropped["same id as another"] += 1
        else:
            seen.add(digest)
            ids.add(conversation.row_id)
            yield conversation


def text_digest(text: str) -> bytes:
    """Compute the SHA-256 of a text, ignoring case and white space, in which copies of a prompt tend to differ."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).digest()


def in_evaluation_holdout(prompt: str, ratio: float) -> bool:
    """Whether a conversation is kept from training, for evaluation.

    The text of the prompt (`Conversation.prompt`) determines it, and nothing else: a copy under another id or in
    another data set falls on the same side, and rows that are added to a file change nothing for the others.
    """
    return int.from_bytes(text_digest(prompt)[:8], "big") < ratio * 2**64


def read_conversations(path: Path, name: str, spec: Dataset, counts: RowCounts) -> Iterator[Conversation]:
    """Read every well-formed row of a dataset, in order; `counts` grows with the iteration.

    Raises:
        SourceError: a file is nothing that can be read, or more of it is lost than `spec.on_damage` lets pass.
    """
    try:
        for label, file in data_files(path, spec.subset, spec.split):
            yield from _file_conversations(file, label, name, spec, counts)
    except SourceError as error:
        prefix = "" if f"`{name}`" in error.message else f"data set `{name}`: "
        raise SourceError(f"{prefix}{error.message}", error.hint) from None


def _file_conversations(file: Path, label: str, name: str, spec: Dataset, counts: RowCounts) -> Iterator[Conversation]:
    before, not_read = counts.rows, counts.bytes.not_read
    try:
        for row in data_rows(file, counts.bytes):
            counts.rows += 1
            try:
                position = counts.rows - before
                yield _conversation(row, f"{label}:{position}" if label else f"row-{position}", name, spec, counts)
            except BadRowError as bad:
                counts.dropped[str(bad)] += 1
    except DamageError as error:
        rows, lost = counts.rows - before, counts.bytes.not_read - not_read
        where = {"file": label or file.name, "byte": error.byte, "row_starts_at_byte": error.row}
        counts.damage.append({**where, "reason": str(error), "rows_before": rows, "bytes_not_read": lost})
        if spec.on_damage is OnDamage.error or (spec.on_damage is OnDamage.auto and not error.last_row_only):
            raise SourceError(
                f"{file.name} of data set `{name}`: {error} at byte {error.byte}, after {rows} rows; {lost} bytes "
                "were not read",
                f"get the file again, or use the rows before the damage: data.{name}.on_damage=report",
            ) from None


def _filtered(first: str, spec: Dataset) -> str | None:
    if len(first) < spec.min_chars:
        return "first message shorter than min_chars"
    if spec.max_chars is not None and len(first) > spec.max_chars:
        return "first message longer than max_chars"
    if spec.ascii_only and not first.isascii():
        return "first message not ASCII"
    return None


def _conversation(row: Any, position: str, name: str, spec: Dataset, counts: RowCounts) -> Conversation:
    if isinstance(row, BrokenRow):
        raise BadRowError(row.reason)
    if not isinstance(row, dict):
        raise BadRowError("not an object")
    if not counts.columns:
        counts.columns = list(row)
        form = row_form(row, replace(spec, format=None))
        counts.fits = form.format.name if form else ""
    form = row_form(row, spec)
    if form is None:
        raise BadRowError("no messages" if spec.format is not DataFormat.prompts else "no prompt")
    content = row_content(row, form, spec)
    row_id = row.get(form.id) if form.id is not None else None
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        row_id = position
    _check_text(str(row_id), content)
    counts.forms[form.format.name] += 1
    return Conversation(name, str(row_id), content)


def _check_text(row_id: str, content: RowContent) -> None:
    """Raise BadRowError for text that no file can hold."""
    try:
        row_id.encode()
        for message in content.messages:
            message["content"].encode()
        rest = [{**message, "content": ""} for message in content.messages if len(message) > 2]
        json.dumps([rest, content.tools, content.chat_template_kwargs], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRowError("text with half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError):
        raise BadRowError("tools or calls that JSON cannot hold") from None


def counts_record(counts: dict[str, RowCounts]) -> dict[str, Any]:
    """The counts of several data sets for an artifact's record."""
    return {name: row_counts.record() for name, row_counts in sorted(counts.items())}
