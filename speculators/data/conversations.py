"""Conversations as they lie in files of other people: three formats, read row by row, nothing lost uncounted.

A file is never loaded whole, and a file that was cut off in the middle gives every row before the cut. What a
row must be to be used (`Conversation`) is decided here once, for training and evaluation alike, and so is which
conversations are held out: both sides ask `in_evaluation_holdout`, so they cannot disagree.
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
from typing import Any

from speculators.config.choices import DataFormat, OnDamage
from speculators.config.schema import Dataset
from speculators.errors import SourceError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Speakers in the wild and what chat templates call them."""

_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"
_SEPARATORS = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16
"""A JSON literal or escape that lacks its end is an error at most this many characters before the end of the text."""


@dataclass(slots=True)
class Conversation:
    """A row that can be used: an optional system message, then user and assistant in turns, user first."""

    dataset: str
    row_id: str
    messages: list[dict[str, str]]

    @property
    def id(self) -> str:
        """Unique over all data sets."""
        return f"{self.dataset}/{self.row_id}"

    @property
    def first(self) -> str:
        """The first user message."""
        return next(message["content"] for message in self.messages if message["role"] == "user")


@dataclass(slots=True)
class RowCounts:
    """What became of the rows of one file; `read` is the sum of what is dropped and what is used."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    damage: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return {"read": self.read, "dropped": dict(sorted(self.dropped.items())), "damage": self.damage}

    def note(self, name: str) -> str:
        """What to tell a person about a file that is cut off; nothing about one that is whole."""
        if self.damage is None:
            return ""
        return f"{name}: {self.damage['reason']} at byte {self.damage['byte']}; {self.read} whole conversations before"


def data_file(place: Path) -> Path:
    """The one file that a data set consists of: `place` itself, or the only file in the directory `place`."""
    if place.is_file():
        return place
    files = sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith(".")) if place.is_dir() else []
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "nothing"
        raise SourceError(f"{place} must hold exactly one data file, it holds: {found}", "name a file as the source")
    return files[0]


def usable(path: Path, name: str, spec: Dataset, tally: RowCounts, seen: set[bytes]) -> Iterator[Conversation]:
    """The conversations of data set `name` that pass its filters, each first user message once.

    `seen` carries the digests of first messages from one data set to the next. The filters look at the text as it is
    in the file; the instruction of the data set is put before it afterwards.

    Raises:
        SourceError: the file is not in the format that `spec` says, or is damaged and `spec.on_damage` is `error`.
    """
    ids: set[str] = set()
    for conversation in read_conversations(path, name, spec, tally):
        first = conversation.first
        digest = text_digest(first)
        if reason := _filtered(first, spec):
            tally.dropped[reason] += 1
        elif digest in seen:
            tally.dropped["same first message as another"] += 1
        elif conversation.row_id in ids:
            tally.dropped["same id as another"] += 1
        else:
            seen.add(digest)
            ids.add(conversation.row_id)
            yield conversation


def with_instruction(conversation: Conversation, instruction: str) -> list[dict[str, str]]:
    """The messages, with `instruction` and an empty line before the first user message if there is an instruction."""
    if not instruction:
        return conversation.messages
    first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "user")
    asked = {"role": "user", "content": f"{instruction}\n\n{conversation.first}"}
    return [*conversation.messages[:first], asked, *conversation.messages[first + 1 :]]


def text_digest(text: str) -> bytes:
    """SHA-256 of a text without regard to case and white space, in which copies of a prompt tend to differ."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).digest()


def in_evaluation_holdout(first_message: str, share: float) -> bool:
    """Whether a conversation is kept from training, for evaluation.

    Decided by the text of the first user message and nothing else: a copy of it under another id or in another data
    set falls on the same side, and rows added to a file move nobody.
    """
    return int.from_bytes(text_digest(first_message)[:8], "big") < share * 2**64


def read_conversations(path: Path, name: str, spec: Dataset, tally: RowCounts) -> Iterator[Conversation]:
    """Every well-formed row of a file, in its order; `tally` is filled as far as the iteration went."""
    rows = _list_rows(path) if spec.format is DataFormat.sharegpt else _line_rows(path)
    try:
        for row in rows:
            tally.read += 1
            try:
                yield _conversation(row, name, spec)
            except _BadRowError as bad:
                tally.dropped[str(bad)] += 1
    except _DamageError as damage:
        tally.damage = {"file": path.name, "byte": damage.byte, "row_starts_at_byte": damage.row, "reason": str(damage)}
        if spec.on_damage is OnDamage.error:
            raise SourceError(
                f"{path.name} of data set `{name}`: {damage} at byte {damage.byte}, after {tally.read} whole rows",
                f"get a whole file, or set `on_damage: report` for `{name}` to use the rows before the damage",
            ) from None


class _BadRowError(Exception):
    """The row is whole, but is not a conversation; the text is the reason, counted as it is."""


class _DamageError(Exception):
    """The file breaks off, or cannot be read further, at `byte`, in the row that starts at byte `row`."""

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
    spoken = [message["role"] for message in messages]
    if spoken[0] == "system":
        spoken = spoken[1:]
    if not spoken or spoken[0] != "user":
        raise _BadRowError("first turn is not the user's")
    if spoken != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]:
        raise _BadRowError("turns do not alternate")
    return Conversation(name, str(row_id), messages)


def _message(turn: Any, speaker: str, text: str) -> dict[str, str]:
    role = ROLES.get(str(turn.get(speaker))) if isinstance(turn, dict) else None
    if role is None:
        raise _BadRowError("unknown role")
    content = turn.get(text)
    if not isinstance(content, str):
        raise _BadRowError("message is not text")
    if not content.strip():
        raise _BadRowError("empty message")
    return {"role": role, "content": content}


def _blocks(path: Path) -> Iterator[bytes]:
    """The content in pieces, decompressed if it is gzip (told by its first bytes). A cut gzip file ends in EOFError."""
    with path.open("rb") as file:
        if file.read(len(_GZIP)) != _GZIP:
            file.seek(0)
            yield from iter(lambda: file.read(_BLOCK), b"")
            return
        file.seek(0)
        inflate, inside = zlib.decompressobj(wbits=31), False
        for block in iter(lambda: file.read(_BLOCK), b""):
            while block:
                yield inflate.decompress(block)
                block, inside = inflate.unused_data, not inflate.eof
                if inflate.eof:
                    inflate = zlib.decompressobj(wbits=31)
        if inside:
            raise EOFError


def _line_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON-lines file; a line that is not JSON gives None, unless the file ends in it."""
    rest, passed = b"", 0
    try:
        for block in _blocks(path):
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
    """The items of a file that is one JSON list, without reading the list as a whole."""
    text, passed, opened, patience = "", 0, False, 0
    for block in _texts(path):
        text += block
        if not opened and text.lstrip():
            passed, text, opened = len(text) - len(text.lstrip()) + 1, _after_bracket(text.lstrip(), path), True
        if len(text) < patience:
            continue
        rows, end, error = _whole_values(text)
        yield from rows
        passed, text = passed + len(text[:end].encode()), text[end:]
        if text.startswith("]"):
            return
        if error is not None and not _unfinished(error):
            raise _DamageError(f"broken JSON ({error.msg})", passed + len(text[: error.pos - end].encode()), passed)
        patience = 2 * len(text)  # a row longer than a block is tried again only when there is twice as much of it
    rows, end, _ = _whole_values(text)
    yield from rows
    if not text.startswith("]", end):
        row = passed + len(text[:end].encode())
        reason = "the file ends in the middle of a row" if end < len(text) else "the file ends before the list does"
        raise _DamageError(reason, _size(path), row)


def _texts(path: Path) -> Iterator[str]:
    decoder, passed = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for block in _blocks(path):
            yield decoder.decode(block)
            passed += len(block)
    except UnicodeDecodeError as error:
        pending = len(error.object) - len(block)  # bytes of a character that the block before began
        raise _DamageError("not UTF-8", passed - pending + error.start, passed) from None
    except EOFError:
        return  # the list is not closed then, which is told with its position
    except zlib.error as error:
        raise _DamageError(f"the compressed file is broken ({error})", passed, passed) from None


def _size(path: Path) -> int:
    """Bytes of the content, decompressed."""
    total = 0
    try:
        for block in _blocks(path):
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
    """The JSON values that are whole, where the first one that is not starts, and what the parser says about it."""
    values: list[Any] = []
    at = 0
    while True:
        at = _skip_separators(text, at)
        if at == len(text) or text[at] == "]":
            return values, at, None
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return values, at, error
        values.append(value)


def _skip_separators(text: str, at: int) -> int:
    match = _SEPARATORS.match(text, at)
    return match.end() if match else at


def _unfinished(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend it: a string without its end, or an error at the very end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _LONGEST_TOKEN


def counts(tallies: dict[str, RowCounts]) -> dict[str, Any]:
    """The tallies of several data sets for an artifact's record."""
    return {name: tally.record() for name, tally in sorted(tallies.items())}
