"""The token table: one row a sequence, as a `datasets` directory whose bytes depend on the rows and on nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def give_table(job: Job, rows: Iterable[dict[str, Any]], tally: Counter[str], what: str, hint: str) -> None:
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


def save_table(arrow: Path, directory: Path) -> None:
    """As `datasets` writes it; `arrow` is deleted. The fingerprint is ours: the library's own has the time in it."""
    from datasets import Dataset, disable_progress_bars
    from datasets.table import MemoryMappedTable

    disable_progress_bars()
    with arrow.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    Dataset(MemoryMappedTable.from_file(str(arrow)), fingerprint=fingerprint).save_to_disk(directory)
    arrow.unlink()
