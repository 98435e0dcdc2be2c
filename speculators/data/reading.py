"""Reads the rows of data files one by one: whatever can be read is, and what cannot is counted, with its position."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators.errors import SourceError

_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"
_SEPARATORS = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16
"""A JSON literal or escape that lacks its end is an error at most this many characters before the end of the text."""


class DamageError(Exception):
    """The file ends early or is damaged at `byte`, in the row that starts at byte `row`."""

    def __init__(self, reason: str, byte: int, row: int) -> None:
        super().__init__(reason)
        self.byte = byte
        self.row = row


def data_rows(path: Path) -> Iterator[Any]:
    """Read the rows of a file, a JSON list or JSON lines."""
    start = b""
    for block in _file_blocks(path):
        start = (start + block).lstrip()
        if start:
            break
    return _list_rows(path) if start.startswith(b"[") else _line_rows(path)


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
        raise DamageError("the compressed file ends too early", passed + len(rest), passed) from None
    except zlib.error as error:
        raise DamageError(f"the compressed file is broken ({error})", passed + len(rest), passed) from None
    if rest.strip():
        row = _parsed(rest)
        if row is None:
            raise DamageError("the file ends in the middle of a row", passed + len(rest), passed)
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
            raise DamageError(f"broken JSON ({error.msg})", passed + len(text[: error.pos - end].encode()), passed)
        min_length = 2 * len(text)  # a row longer than a block is parsed again when there is twice as much of it
    rows, end, _ = _whole_values(text)
    yield from rows
    if not text.startswith("]", end):
        row = passed + len(text[:end].encode())
        reason = "the file ends in the middle of a row" if end < len(text) else "the file ends before the list does"
        raise DamageError(reason, _content_size(path), row)


def _texts(path: Path) -> Iterator[str]:
    decoder, passed = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for block in _file_blocks(path):
            yield decoder.decode(block)
            passed += len(block)
    except UnicodeDecodeError as error:
        pending = len(error.object) - len(block)  # bytes of a character that the block before began
        raise DamageError("not UTF-8", passed - pending + error.start, passed) from None
    except EOFError:
        return  # `_list_rows` reports the list that is not closed
    except zlib.error as error:
        raise DamageError(f"the compressed file is broken ({error})", passed, passed) from None


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
