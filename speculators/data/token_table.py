"""The token table: one row a sequence, as a `datasets` directory whose bytes depend on the rows alone."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from speculators.errors import SourceError
from speculators.job import Job

_INTEGERS, _INTEGER, _TEXT = pa.list_(pa.int64()), pa.int64(), pa.string()
SCHEMA = pa.schema({"input_ids": _INTEGERS, "loss_mask": _INTEGERS, "seq_len": _INTEGER, "id": _TEXT, "source": _TEXT})

_BATCH = 1024
"""Rows that are written at a time."""


class TokenRow(TypedDict):
    """A row of the token table: N tokens of one conversation of the data set `source`."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 where the token is part of an answer, else 0."""
    seq_len: int  # N
    id: str
    """The conversation."""
    source: str


@dataclass(slots=True)
class TableShape:
    """Counts rows by length, answers and source while they pass."""

    lengths: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)

    def of(self, rows: Iterable[TokenRow]) -> Iterator[TokenRow]:
        """Pass rows on."""
        for row in rows:
            mask = bytes(row["loss_mask"])
            self.lengths[1 << (len(mask) - 1).bit_length()] += 1
            self.answers[mask.count(b"\x00\x01") + mask.startswith(b"\x01")] += 1
            source = self.sources.setdefault(row["source"], Counter())
            source.update({"rows": 1, "tokens": len(mask), "supervised tokens": mask.count(1)})
            yield row

    def record(self) -> dict[str, Any]:
        """Histograms for the record: rows of at most so many tokens, each twice the one before; rows by answers."""
        lengths = {f"up to {length} tokens": count for length, count in sorted(self.lengths.items())}
        answers = {str(number): count for number, count in sorted(self.answers.items())}
        sources = {
            name: {**counts, "supervised_ratio": round(counts["supervised tokens"] / counts["tokens"], 4)}
            for name, counts in sorted(self.sources.items())
        }
        return {"lengths": lengths, "answers_per_row": answers, "by_source": sources}


def publish_table(
    job: Job, rows: Iterable[TokenRow], counts: Counter[str], inputs: str, hint: Callable[[], str]
) -> None:
    """Write rows into the job's output, and the counts that iterating over `rows` adds up into the record.

    Raises:
        SourceError: `counts["rows"]` is 0; `inputs` is the count that the message names. The hint is asked for then.
    """
    arrow = job.scratch / "rows.arrow"
    write_table(rows, arrow)
    job.record |= dict(sorted(counts.items()))
    if not counts["rows"]:
        reasons = "; ".join(f"{number} {reason}" for reason, number in counts.most_common() if reason != inputs)
        raise SourceError(f"no row is left of {counts[inputs]} {inputs}: {reasons}".rstrip(": "), hint())
    save_table(arrow, job.output)


def write_table(rows: Iterable[TokenRow], arrow: Path) -> None:
    """Write rows to an Arrow file, of which `save_table` makes the directory."""
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        batch: list[TokenRow] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                batch.clear()
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))


def save_table(arrow: Path, directory: Path, row_format: str | None = None) -> None:
    """Save a table as a `datasets` directory, and delete the Arrow file.

    The fingerprint is a digest of the rows: the library's own contains the time. `row_format` is the type in which
    `datasets` returns the rows of the loaded table, such as "torch"; None returns lists.
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
    """Reads rows by number, as views of the mapped file: `datasets` takes longer than reading their hidden states."""

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
        """Return the token ids of a row, [N]; read-only."""
        return self._token_ids[row]

    def loss_mask(self, row: int) -> npt.NDArray[np.integer[Any]]:
        """Return the loss mask of a row, [N]; read-only."""
        return self._loss_mask[row]


def prediction_mask(loss_mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """bool [N], true where training may need the target's distribution over the next token, from a loss mask [N].

    Some algorithms are supervised at the masked tokens themselves, others at the tokens before them.
    """
    supervised = np.asarray(loss_mask) != 0
    return np.logical_or(supervised, np.append(supervised[1:], False))


class _Lists:
    """Reads a column of lists of integers."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)) for chunk in chunks]
        self._firsts = list(itertools.accumulate(map(len, chunks), initial=0))

    def __getitem__(self, row: int) -> npt.NDArray[np.integer[Any]]:
        chunk = bisect.bisect_right(self._firsts, row) - 1
        offsets, values = self._chunks[chunk]
        index = row - self._firsts[chunk]
        numbers: npt.NDArray[np.integer[Any]] = values[offsets[index] : offsets[index + 1]]
        return numbers
