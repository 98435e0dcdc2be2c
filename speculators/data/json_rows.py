"""Reads the rows of JSON lines and JSON lists; goes on after a row that is broken where the next one can be found."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from speculators.data.damage import BrokenRow, ByteCounts, CutError, DamageError, raise_cut

_SEPARATORS = re.compile(r"[\s,]*")
_ROW_START = re.compile(r"(?<!:)(?<!:\s)\{")
"""An object that is no value of another one."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_PARTS_OF_ROWS = {"from", "value", "role", "content", "type", "text", "name", "arguments", "function", "parameters"}
_DECODER = json.JSONDecoder(strict=False)
_LONGEST_TOKEN = 16
"""A JSON literal or escape that lacks its end is an error at most this many characters before the end of the text."""


def line_rows(blocks: Iterator[bytes], counts: ByteCounts) -> Iterator[Any]:
    """Read the rows of JSON lines."""
    rest, passed, cut = b"", 0, None
    try:
        for block in blocks:
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                passed += len(line) + 1
                yield from _parsed(line, counts)
    except CutError as error:
        cut = error
    rows = list(_parsed(rest, counts)) if rest.strip() else []
    complete = not any(isinstance(row, BrokenRow) for row in rows) or (cut is None and not is_beginning(rest))
    yield from rows if complete else [row for row in rows if not isinstance(row, BrokenRow)]
    raise_cut(cut, passed + len(rest), passed, counts, complete=complete)


def is_beginning(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON value."""
    try:
        _DECODER.decode(line.decode(errors="replace").lstrip())
    except json.JSONDecodeError as error:
        return _unfinished(error)
    except (ValueError, RecursionError):
        return False
    return False


def _parsed(line: bytes, counts: ByteCounts) -> Iterator[Any]:
    """The values of a line, mostly one; nothing for an empty one."""
    try:
        text, index = line.decode(), 0
        while (index := _after(_SEPARATORS, text, index)) < len(text):
            value, index = _DECODER.raw_decode(text, index)
            yield value
    except (ValueError, RecursionError) as error:
        counts.not_read += len(line)
        yield BrokenRow(_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "broken JSON" if isinstance(error, json.JSONDecodeError) else "an integer with too many digits"


def _after(pattern: re.Pattern[str], text: str, index: int) -> int:
    match = pattern.match(text, index)
    return match.end() if match else index


@dataclass(frozen=True, slots=True)
class _Unparsed:
    """A row that cannot be parsed."""

    begin: int
    """Its first byte."""
    byte: int
    """The byte where the parser fails."""
    reason: str
    message: str
    unfinished: bool
    """Whether more text could complete it."""


class _Values:
    """Parser of JSON values that follow each other or are the items of lists; text is added as it is read."""

    def __init__(self, counts: ByteCounts) -> None:
        self.counts = counts
        self.text = ""
        self.passed = 0
        """Bytes before the text."""
        self.in_list = False
        self.unparsed: _Unparsed | None = None
        """The row at the beginning of the text, if it cannot be parsed and the next one is not known yet."""
        self._searched = 0
        self._keys: list[str] = []
        self._longest_row = 0
        self._many = False
        self._needed = 0

    def add(self, text: str, *, last: bool) -> Iterator[Any]:
        """Yield the values that are complete with this text, and a BrokenRow before one that follows a broken row."""
        self.text += text
        if len(self.text) < self._needed and not last:
            return
        index = 0
        while True:
            if self.unparsed is not None:
                row = self._next_row(last=last)
                if row is None:
                    break
                self.counts.not_read += self._byte(row) - self.unparsed.begin
                yield BrokenRow(self.unparsed.reason)
                index, self.unparsed = row, None
            index = _after(_SEPARATORS, self.text, index)
            if index == len(self.text):
                break
            if self.text[index] in "[]" and self.in_list == (self.text[index] == "]"):
                self.in_list = self.text[index] == "["
                index += 1
                continue
            try:
                value, end = _DECODER.raw_decode(self.text, index)
            except (ValueError, RecursionError) as error:
                syntax = error if isinstance(error, json.JSONDecodeError) else None
                unfinished = syntax is not None and _unfinished(syntax)
                if unfinished and not last:
                    break
                byte = self._byte(syntax.pos if syntax else index)
                message = f"broken JSON ({syntax.msg})" if syntax else _reason(error)
                self.unparsed = _Unparsed(self._byte(index), byte, _reason(error), message, unfinished)
                self._trim(index)
                self._searched = index = 0
                continue
            yield self._row(value, index, end)
            index = end
        self._trim(index if self.unparsed is None else 0)
        self._needed = 2 * len(self.text)  # a row longer than a block is parsed again when there is twice as much of it

    def _byte(self, index: int) -> int:
        """Position of a character in the content."""
        return self.passed + len(self.text[:index].encode(errors="surrogateescape"))

    def _trim(self, index: int) -> None:
        self.passed, self.text = self._byte(index), self.text[index:]

    def _row(self, value: Any, begin: int, end: int) -> Any:
        self._longest_row = max(self._longest_row, end - begin)
        if _NOT_UTF8.search(self.text, begin, end):
            self.counts.not_read += len(self.text[begin:end].encode(errors="surrogateescape"))
            return BrokenRow("not UTF-8")
        if isinstance(value, dict) and value:
            self._keys = list(value)
        return value

    def _next_row(self, *, last: bool) -> int | None:
        """Index of the next object that looks like a row; None if there is none yet."""
        for match in _ROW_START.finditer(self.text, self._searched):
            try:
                value, _ = _DECODER.raw_decode(self.text, match.start())
            except json.JSONDecodeError as error:
                if _unfinished(error) and not last:
                    self._searched = match.start()
                    return None
                continue
            except (ValueError, RecursionError):
                continue
            shared = value.keys() & set(self._keys)
            if len(shared) * 2 > len(self._keys) if self._keys else not value.keys() <= _PARTS_OF_ROWS:
                return match.start()
        self._searched = max(self._searched, len(self.text) - _LONGEST_TOKEN)
        if len(self.text) > 2 * self._longest_row + (1 << 20):  # more than a row: not needed any more
            self._many = True
            dropped = self._searched
            self._trim(dropped)
            self._searched = 0
        return None

    def lost(self) -> DamageError | None:
        """The damage at the end of the content, whose bytes are counted; None if it ends as it should."""
        size = self._byte(len(self.text))
        if self.unparsed is None:
            reason = "the file ends before the list does"
            return DamageError(reason, size, size, last_row_only=True) if self.in_list else None
        row = self.unparsed
        self.counts.not_read += size - row.begin
        if row.unfinished:
            return DamageError("the file ends in the middle of a row", size, row.begin, last_row_only=True)
        signature = json.dumps(self._keys[0]) if self._keys else "{"
        one = not self._many and self.text.count(signature) <= 1 and size - row.begin <= 2 * self._longest_row + 65536
        return DamageError(row.message, row.byte, row.begin, last_row_only=one)


def value_rows(blocks: Iterator[bytes], counts: ByteCounts) -> Iterator[Any]:
    """Read JSON values that follow each other, or the items of one or more lists."""
    values, cut, done = _Values(counts), None, False
    # Bytes that are not UTF-8 become single surrogates, so that positions are those of the file.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    while not done:
        try:
            block = next(blocks, b"")
        except CutError as error:
            cut, block = error, b""
        done = not block
        yield from values.add(decoder.decode(block, final=done), last=done)
    damage = values.lost()
    if cut is not None:
        row = damage.row if damage else values.passed
        raise_cut(cut, values.passed + len(values.text), row, counts, complete=True)
    if damage is not None:
        raise damage


def _unfinished(error: json.JSONDecodeError) -> bool:
    """Whether more text could complete the value: a string without its end, or an error at the very end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _LONGEST_TOKEN
