"""Conversations: what a usable row of a dataset becomes; every row that is dropped is counted by reason.

Training and evaluation use the same rules here: which rows are usable (`Conversation`), and which are kept for
evaluation (`in_evaluation_holdout`). `ConversationRow` is a line of `conversations.jsonl`, which the stages pass on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from speculators.config.choices import OnDamage
from speculators.config.schema import Dataset
from speculators.data.messages import BadRowError, RowContent, row_content, row_form
from speculators.data.messages import Message as Message
from speculators.data.reading import DamageError, data_rows
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
    damage: dict[str, Any] | None = None
    columns: list[str] = field(default_factory=list)
    """Those of the first row."""

    def record(self) -> dict[str, Any]:
        """The counts for an artifact's record."""
        dropped, forms = dict(sorted(self.dropped.items())), dict(sorted(self.forms.items()))
        return {"read": self.rows, "dropped": dropped, "forms": forms, "damage": self.damage}

    def why_unusable(self, name: str) -> SourceError:
        """The error for a file without a usable row, with the reasons for which its rows were dropped."""
        whole_rows = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        reasons = whole_rows or (self.damage["reason"] if self.damage else "it is empty")
        filtered = any(option in reason for reason in self.dropped for option in ("min_chars", "max_chars", "ASCII"))
        return SourceError(
            f"data set `{name}` has no usable row among {self.rows}: {reasons}",
            f"lower min_chars, raise max_chars or unset ascii_only of `{name}`"
            if filtered
            else f"check the file, and format, id_field and prompt_field of `{name}`: speculators-run options "
            "data.NAME.format",
        )

    def note(self, name: str) -> str:
        """A note about a file that is cut off or damaged; empty for others."""
        if self.damage is None:
            return ""
        return f"{name}: {self.damage['reason']} at byte {self.damage['byte']}; {self.rows} whole conversations before"


def data_file(path: Path) -> Path:
    """Find the one file that a data set consists of: `path` itself, or the only file in the directory `path`."""
    if path.is_file():
        return path
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else []
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "nothing"
        raise SourceError(f"{path} must hold exactly one data file, it holds: {names}", "name a file as the source")
    return files[0]


def usable(
    path: Path, name: str, spec: Dataset, counts: RowCounts, seen: set[bytes], *, answers: bool = False
) -> Iterator[Conversation]:
    """Read the conversations of data set `name` that pass its filters, each prompt once; with `answers`, each
    conversation once.

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
    """Read every well-formed row of a file, in order; `counts` grows with the iteration."""
    try:
        for row in data_rows(path):
            counts.rows += 1
            try:
                yield _conversation(row, name, spec, counts)
            except BadRowError as bad:
                counts.dropped[str(bad)] += 1
    except DamageError as error:
        where = {"file": path.name, "byte": error.byte, "row_starts_at_byte": error.row}
        counts.damage = {**where, "reason": str(error)}
        if spec.on_damage is OnDamage.error:
            raise SourceError(
                f"{path.name} of data set `{name}`: {error} at byte {error.byte}, after {counts.rows} whole rows",
                f"get a whole file, or set `on_damage: report` for `{name}` to use the rows before the damage",
            ) from None


def _filtered(first: str, spec: Dataset) -> str | None:
    if len(first) < spec.min_chars:
        return "first message shorter than min_chars"
    if spec.max_chars is not None and len(first) > spec.max_chars:
        return "first message longer than max_chars"
    if spec.ascii_only and not first.isascii():
        return "first message not ASCII"
    return None


def _conversation(row: Any, name: str, spec: Dataset, counts: RowCounts) -> Conversation:
    if not isinstance(row, dict):
        raise BadRowError("not a JSON object")
    counts.columns = counts.columns or list(row)
    form = row_form(row, spec)
    if form is None:
        raise BadRowError("no messages")
    content = row_content(row, form, spec)
    row_id = row.get(form.id) if form.id is not None else None
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        row_id = f"row-{counts.rows}"
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


def counts_record(counts: dict[str, RowCounts]) -> dict[str, Any]:
    """The counts of several data sets for an artifact's record."""
    return {name: row_counts.record() for name, row_counts in sorted(counts.items())}
