"""Reads the rows of Parquet and Arrow files, which pyarrow decodes, as objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from speculators.data.damage import BrokenRow, ByteCounts, DamageError

_ROWS = 256
"""Rows that are converted at once."""


def table_rows(path: Path, counts: ByteCounts) -> Iterator[dict[str, Any] | BrokenRow]:
    """Read the rows of a file; Parquet cannot be read at all if its end is missing, Arrow up to there.

    Raises:
        DamageError: not all of its rows can be read.
    """
    size, passed = path.stat().st_size, 0
    counts.total += size
    total = 0
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                parquet = pyarrow.parquet.ParquetFile(path)
                total = parquet.metadata.num_rows
                batches: Iterator[Any] = parquet.iter_batches(batch_size=_ROWS)
            else:
                batches = _arrow_batches(path)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield from _objects(batch.slice(start, _ROWS))
            passed += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        lost = size - (size * passed // total if total else 0)
        counts.not_read += lost
        reason = str(error).splitlines()[0]
        raise DamageError(f"broken ({reason})", size - lost, size - lost, last_row_only=False) from None


def _objects(batch: Any) -> list[dict[str, Any] | BrokenRow]:
    """The rows of a batch; one of text that is not UTF-8, or of a date that Python does not have, is a BrokenRow."""
    reason = "not UTF-8"
    try:
        batch.validate(full=True)  # or offsets that are damaged are followed
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if not isinstance(error, UnicodeDecodeError) and "UTF8" not in str(error):
            if isinstance(error, pyarrow.ArrowException):
                raise
            reason = "a date or time out of range"
    rows = (batch.slice(row, 1) for row in range(batch.num_rows))
    return [BrokenRow(reason)] if batch.num_rows == 1 else [value for row in rows for value in _objects(row)]


def _arrow_batches(path: Path) -> Iterator[Any]:
    with pyarrow.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
