"""Reads the rows of CSV files as objects, whatever separates the columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from speculators.data.damage import BrokenRow, ByteCounts, CutError, raise_cut

_HEADER = re.compile(r"[\w .:/-]{1,64}")
_LONGEST_RECORD = 1 << 20
"""Characters after which a quote in CSV is taken for one that is never closed."""

csv.field_size_limit(2 * _LONGEST_RECORD)  # the module's own limit is shorter than many a conversation


def delimiter_of(header: str) -> str | None:
    """The character between the columns of a CSV header; None if the line is none."""
    for delimiter in ",;\t|":
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        if len(names) > 1 and len(set(names)) == len(names) and all(map(_HEADER.fullmatch, names)):
            return delimiter
    return "," if header.strip().strip('"') in CSV_COLUMNS else None


CSV_COLUMNS = {"prompt", "question", "problem", "instruction", "messages", "conversations"}
"""Headers of CSV files with a single column."""


def csv_rows(blocks: Iterator[bytes], counts: ByteCounts) -> Iterator[Any]:
    """Read the rows of CSV, as objects.

    A record whose quotes are not closed, or that has other columns than the header, costs its first line.
    """
    lines, cut = _Lines(blocks), None
    header = next(lines).decode(errors="replace")
    delimiter = delimiter_of(header.rstrip("\r\n")) or ","
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    try:
        while (record := lines.record()) is not None:
            try:
                text = b"".join(record).decode()
                if not text.strip():
                    continue
                # Not `splitlines`: it divides at U+2028 and others too, which are characters of a text.
                (values,) = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
                reason = "" if len(values) == len(names) else "other columns than the header's"
            except UnicodeDecodeError:
                reason = "not UTF-8"
            except (csv.Error, ValueError):
                reason = "broken CSV"
            if not reason:
                yield dict(zip(names, values, strict=True))
                continue
            lines.put_back(record[1:])
            counts.not_read += len(record[0])
            yield BrokenRow(reason)
    except CutError as error:
        cut = error
    raise_cut(cut, lines.passed, lines.passed, counts, complete=True)


class _Lines:
    """The lines of CSV, with their ends; several of them are a record, if a quote goes on."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._lines = self._split(blocks)
        self._put_back: list[bytes] = []
        self.passed = 0

    def __next__(self) -> bytes:
        line = self._put_back.pop(0) if self._put_back else next(self._lines)
        self.passed += len(line)
        return line

    def record(self) -> list[bytes] | None:
        """The lines of the next record; None at the end."""
        lines: list[bytes] = []
        quotes = size = 0
        while not lines or (quotes % 2 and size < _LONGEST_RECORD):
            try:
                lines.append(next(self))
            except StopIteration:
                return lines or None
            quotes, size = quotes + lines[-1].count(b'"'), size + len(lines[-1])
        return lines

    def put_back(self, lines: list[bytes]) -> None:
        """Let these lines be the next ones."""
        self._put_back = lines + self._put_back
        self.passed -= sum(map(len, lines))

    def _split(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        rest = b""
        for block in blocks:
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest
