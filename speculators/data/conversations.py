"""Reads conversations from data files in three formats, row by row; every row that is dropped is counted.

A file is never loaded whole, and a file that was cut off gives every row before the cut. Training and evaluation use
the same rules here: which rows are usable (`Conversation`), and which are kept for evaluation
(`in_evaluation_holdout`). `ConversationRow` is a line of `conversations.jsonl`, which the stages pass on.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from speculators.config.choices import DataFormat, OnDamage
from speculators.config.schema import Dataset
from speculators.errors import SourceError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    "system": "system",
}
"""Speaker in a data file -> role in chat templates."""

_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"
_SEPARATORS = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16
"""A JSON literal or escape that lacks its end is an error at most this many characters before the end of the text."""


class Message(TypedDict):
    """One chat turn."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class Answer(TypedDict):
    """An answer of the target: token ids of the rendered prompt and of the answer as sampled."""

    prompt_ids: list[int]
    answer_ids: list[int]
    finish_reason: str
    """`stop` or `length`."""
    states: NotRequired[list[int]]
    """[row, start, length]: the slice of a row of `states/` that has the hidden states of prompt and answer."""
    picks: NotRequired[list[tuple[int, int, float | None]]]
    """(index in the answer, token, log-probability) of some of the server's greedy tokens."""


class ConversationRow(TypedDict):
    """A line of `conversations.jsonl`."""

    id: str
    """`DATASET/ID`, unique in the file."""
    source: str  # name of the data set
    messages: list[Message]
    turns: NotRequired[list[Answer]]
    """One for each answer of the target; without it, the data's own answers are used."""


@dataclass(slots=True)
class Conversation:
    """A usable row of a data file: an optional system message, then user and assistant alternating, user first."""

    dataset: str
    row_id: str
    messages: list[Message]

    @property
    def id(self) -> str:
        """Unique over all data sets."""
        return f"{self.dataset}/{self.row_id}"

    @property
    def first(self) -> str:
        """The first user message."""
        return next(message["content"] for message in self.messages if message["role"] == "user")

    def with_instruction(self, instruction: str) -> list[Message]:
        """Return the messages; an instruction and an empty line come before the first user message."""
        if not instruction:
            return self.messages
        index = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        prompt: Message = {"role": "user", "content": f"{instruction}\n\n{self.first}"}
        return [*self.messages[:index], prompt, *self.messages[index + 1 :]]


@dataclass(slots=True)
class RowCounts:
    """Counts of the rows of one file; `rows` is the number of dropped and of usable rows."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    damage: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The counts for an artifact's record."""
        return {"read": self.rows, "dropped": dict(sorted(self.dropped.items())), "damage": self.damage}

    def why_unusable(self, name: str) -> SourceError:
        """The error for a file without a usable row, with the reasons for which its rows were dropped."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common()) or "it is empty"
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


def usable(path: Path, name: str, spec: Dataset, counts: RowCounts, seen: set[bytes]) -> Iterator[Conversation]:
    """Read the conversations of data set `name` that pass its filters, each first user message once.

    `seen` collects the digests of first messages over several data sets. The filters see the text as it is in the
    file, before `Conversation.with_instruction`.

    Raises:
        SourceError: the file is not in the format that `spec` says, or is damaged and `spec.on_damage` is `error`.
    """
    ids: set[str] = set()
    for conversation in read_conversations(path, name, spec, counts):
        first = conversation.first
        digest = text_digest(first)
        if reason := _filtered(first, spec):
            counts.dropped[reason] += 1
        elif digest in seen:
            counts.dropped["same first message as another"] += 1
        elif conversation.row_id in ids:
            counts.dropped["same id as another"] += 1
        else:
            seen.add(digest)
            ids.add(conversation.row_id)
            yield conversation


def text_digest(text: str) -> bytes:
    """Compute the SHA-256 of a text, ignoring case and white space, in which copies of a prompt tend to differ."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).digest()


def in_evaluation_holdout(first_message: str, ratio: float) -> bool:
    """Whether a conversation is kept from training, for evaluation.

    The text of the first user message alone decides: a copy under another id or in another data set falls on the same
    side, and rows that are added to a file change nothing for the others.
    """
    return int.from_bytes(text_digest(first_message)[:8], "big") < ratio * 2**64


def read_conversations(path: Path, name: str, spec: Dataset, counts: RowCounts) -> Iterator[Conversation]:
    """Read every well-formed row of a file, in order; `counts` grows with the iteration."""
    rows = _list_rows(path) if spec.format is DataFormat.sharegpt else _line_rows(path)
    try:
        for row in rows:
            counts.rows += 1
            try:
                yield _conversation(row, name, spec)
            except _BadRowError as bad:
                counts.dropped[str(bad)] += 1
    except _DamageError as error:
        where = {"file": path.name, "byte": error.byte, "row_starts_at_byte": error.row}
        counts.damage = {**where, "reason": str(error)}
        if spec.on_damage is OnDamage.error:
            raise SourceError(
                f"{path.name} of data set `{name}`: {error} at byte {error.byte}, after {counts.rows} whole rows",
                f"get a whole file, or set `on_damage: report` for `{name}` to use the rows before the damage",
            ) from None


class _BadRowError(Exception):
    """The row is complete, but is not a conversation; the text is the reason under which it is counted."""


class _DamageError(Exception):
    """The file ends early or is damaged at `byte`, in the row that starts at byte `row`."""

    def __init__(self, reason: str, byte: int, row: int) -> None:
        super().__init__(reason)
        self.byte = byte
        self.row = row


def _filtered(first: str, spec: Dataset) -> str | None:
    if len(first) < spec.min_chars:
        return "first message shorter than min_chars"
    if spec.max_chars is not None and len(first) > spec.max_chars:
        return "first message longer than max_chars"
    if spec.ascii_only and not first.isascii():
        return "first message not ASCII"
    return None


def _conversation(row: Any, name: str, spec: Dataset) -> Conversation:
    if not isinstance(row, dict):
        raise _BadRowError("not a JSON object")
    row_id = row.get(spec.id_field)
    if not isinstance(row_id, (str, int)) or row_id == "":
        raise _BadRowError("no id")
    if spec.format is DataFormat.prompts:
        turns: Any = [{"from": "user", "value": row.get(spec.prompt_field)}]
    else:
        turns = row.get("conversations" if spec.format is DataFormat.sharegpt else "messages")
    if not isinstance(turns, list) or not turns:
        raise _BadRowError("no messages")
    speaker, text = ("role", "content") if spec.format is DataFormat.messages else ("from", "value")
    messages = [_message(turn, speaker, text) for turn in turns]
    roles = [message["role"] for message in messages]
    if roles[0] == "system":
        roles = roles[1:]
    if not roles or roles[0] != "user":
        raise _BadRowError("first turn is not the user's")
    if roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]:
        raise _BadRowError("turns do not alternate")
    return Conversation(name, str(row_id), messages)


def _message(turn: Any, speaker: str, text: str) -> Message:
    role = ROLES.get(str(turn.get(speaker))) if isinstance(turn, dict) else None
    if role is None:
        raise _BadRowError("unknown role")
    content = turn.get(text)
    if not isinstance(content, str):
        raise _BadRowError("message is not text")
    if not content.strip():
        raise _BadRowError("empty message")
    return {"role": role, "content": content}


def _file_blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks, decompressed if it is gzip (by its first bytes). A cut gzip file ends in EOFError."""
    with path.open("rb") as file:
        if file.read(len(_GZIP)) != _GZIP:
            file.seek(0)
            yield from iter(lambda: file.read(_BLOCK), b"")
            return
        file.seek(0)
        inflate, incomplete = zlib.decompressobj(wbits=31), False
        for block in iter(lambda: file.read(_BLOCK), b""):
            while block:
                yield inflate.decompress(block)
                block, incomplete = inflate.unused_data, not inflate.eof
                if inflate.eof:
                    inflate = zlib.decompressobj(wbits=31)
        if incomplete:
            raise EOFError


def _line_rows(path: Path) -> Iterator[Any]:
    """Read the rows of a JSON-lines file; a line that is not JSON gives None, unless the file ends in it."""
    rest, passed = b"", 0
    try:
        for block in _file_blocks(path):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                passed += len(line) + 1
                if line.strip():
                    yield _parsed(line)
    except EOFError:
        raise _DamageError("the compressed file ends too early", passed + len(rest), passed) from None
    except zlib.error as error:
        raise _DamageError(f"the compressed file is broken ({error})", passed + len(rest), passed) from None
    if rest.strip():
        row = _parsed(rest)
        if row is None:
            raise _DamageError("the file ends in the middle of a row", passed + len(rest), passed)
        yield row


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _list_rows(path: Path) -> Iterator[Any]:
    """Read the items of a file that is one JSON list, without loading the whole list."""
    text, passed, opened, min_length = "", 0, False, 0
    for block in _texts(path):
        text += block
        if not opened and text.lstrip():
            passed, text, opened = len(text) - len(text.lstrip()) + 1, _after_bracket(text.lstrip(), path), True
        if len(text) < min_length:
            continue
        rows, end, error = _whole_values(text)
        yield from rows
        passed, text = passed + len(text[:end].encode()), text[end:]
        if text.startswith("]"):
            return
        if error is not None and not _unfinished(error):
            raise _DamageError(f"broken JSON ({error.msg})", passed + len(text[: error.pos - end].encode()), passed)
        min_length = 2 * len(text)  # a row longer than a block is parsed again when there is twice as much of it
    rows, end, _ = _whole_values(text)
    yield from rows
    if not text.startswith("]", end):
        row = passed + len(text[:end].encode())
        reason = "the file ends in the middle of a row" if end < len(text) else "the file ends before the list does"
        raise _DamageError(reason, _content_size(path), row)


def _texts(path: Path) -> Iterator[str]:
    decoder, passed = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for block in _file_blocks(path):
            yield decoder.decode(block)
            passed += len(block)
    except UnicodeDecodeError as error:
        pending = len(error.object) - len(block)  # bytes of a character that the block before began
        raise _DamageError("not UTF-8", passed - pending + error.start, passed) from None
    except EOFError:
        return  # `_list_rows` reports the list that is not closed
    except zlib.error as error:
        raise _DamageError(f"the compressed file is broken ({error})", passed, passed) from None


def _content_size(path: Path) -> int:
    """Count the bytes of the content, decompressed."""
    total = 0
    try:
        for block in _file_blocks(path):
            total += len(block)
    except EOFError:
        pass
    return total


def _after_bracket(text: str, path: Path) -> str:
    if not text.startswith("["):
        raise SourceError(
            f"{path.name} is not a JSON list, which `format: sharegpt` reads",
            "use `format: messages` or `format: prompts` for JSON lines",
        )
    return text[1:]


def _whole_values(text: str) -> tuple[list[Any], int, json.JSONDecodeError | None]:
    """Parse the complete JSON values; also the index after them, and the parser's error there."""
    values: list[Any] = []
    index = 0
    while True:
        match = _SEPARATORS.match(text, index)
        index = match.end() if match else index
        if index == len(text) or text[index] == "]":
            return values, index, None
        try:
            value, index = _DECODER.raw_decode(text, index)
        except json.JSONDecodeError as error:
            return values, index, error
        values.append(value)


def _unfinished(error: json.JSONDecodeError) -> bool:
    """Whether more text could complete the value: a string without its end, or an error at the very end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _LONGEST_TOKEN


def counts_record(counts: dict[str, RowCounts]) -> dict[str, Any]:
    """The counts of several data sets for an artifact's record."""
    return {name: row_counts.record() for name, row_counts in sorted(counts.items())}
