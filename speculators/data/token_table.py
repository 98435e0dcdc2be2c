"""The token table: one row a sequence, as a `datasets` directory whose bytes depend on the rows and on nothing else."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from speculators.errors import SourceError
from speculators.job import Job

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int64()),
        "loss_mask": pa.list_(pa.int64()),
        "seq_len": pa.int64(),
        "id": pa.string(),
        "source": pa.string(),
    }
)

_BATCH = 1024
"""Rows held in memory before they are written."""


def publish_table(job: Job, rows: Iterable[dict[str, Any]], tally: Counter[str], what: str, hint: str) -> None:
    """Write rows into the job's output; what `rows` counts into `tally` on the way goes into the record.

    Raises:
        SourceError: `tally["rows"]` is 0, of so many `what`.
    """
    arrow = job.scratch / "rows.arrow"
    write_table(rows, arrow)
    job.record |= dict(sorted(tally.items()))
    if not tally["rows"]:
        raise SourceError(f"no row is left of {tally[what]} {what}: {dict(tally)}", hint)
    save_table(arrow, job.output)


def write_table(rows: Iterable[dict[str, Any]], arrow: Path) -> None:
    """Write rows with the columns of `SCHEMA` to a file from which `save_table` makes the directory."""
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                batch.clear()
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))


def save_table(arrow: Path, directory: Path, row_format: str | None = None) -> None:
    """As `datasets` writes it; `arrow` is deleted. The fingerprint is ours: the library's own has the time in it.

    Args:
        arrow: what `write_table` wrote.
        directory: is made.
        row_format: what `datasets` gives rows as to whoever loads the table, "torch" say; Python's lists if None.
    """
    from datasets import Dataset, disable_progress_bars
    from datasets.table import MemoryMappedTable

    disable_progress_bars()
    with arrow.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    table = Dataset(MemoryMappedTable.from_file(str(arrow)), fingerprint=fingerprint)
    table.set_format(row_format)
    table.save_to_disk(directory)
    arrow.unlink()


class TokenTable:
    """Rows by number, as views of the mapped file: `datasets` takes longer for a row than its states take to read."""

    def __init__(self, directory: Path) -> None:
        from datasets import load_from_disk

        columns: Any = load_from_disk(str(directory)).data
        self.conversations: list[str] = columns.column("id").to_pylist()
        self.lengths: list[int] = columns.column("seq_len").to_pylist()
        """Tokens of each row."""
        self._token_ids = _Lists(columns.column("input_ids"))
        self._loss_mask = _Lists(columns.column("loss_mask"))

    def __len__(self) -> int:
        return len(self.lengths)

    def token_ids(self, row: int) -> npt.NDArray[np.integer[Any]]:
        """Of a row, not to be written to."""
        return self._token_ids[row]

    def loss_mask(self, row: int) -> npt.NDArray[np.integer[Any]]:
        """1 where the target said a row's token; not to be written to."""
        return self._loss_mask[row]


def prediction_mask(loss_mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Where a draft may be asked for what the target says next, by a row's loss mask.

    Some algorithms are supervised at the tokens themselves, others at the tokens before them.
    """
    supervised = np.asarray(loss_mask) != 0
    return np.logical_or(supervised, np.append(supervised[1:], False))


class _Lists:
    """A column of lists of integers."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._parts = [(chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)) for chunk in chunks]
        self._firsts = list(itertools.accumulate(map(len, chunks), initial=0))

    def __getitem__(self, row: int) -> npt.NDArray[np.integer[Any]]:
        part = bisect.bisect_right(self._firsts, row) - 1
        offsets, values = self._parts[part]
        place = row - self._firsts[part]
        found: npt.NDArray[np.integer[Any]] = values[offsets[place] : offsets[place + 1]]
        return found
