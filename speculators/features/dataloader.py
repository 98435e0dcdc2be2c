"""The data loader: rows of a token table with their hidden states, as packed batches.

Hidden states come from a `HiddenStatesSource`: the shards of an artifact (`ShardSource`) or a live server
(`training.live_features`). The batches depend on the tokens and the seed alone, so all sources that have every row
give the same ones. While one batch is trained on, threads read the next ones (`prefetch`).

Every row of the table needs hidden states of its own tokens, except those that extraction names as skipped. A row that
does not fit stops the training, because leaving it out would go unnoticed. Hidden states that were kept while the
target answered lack those of a row's last token; such a row is used one token shorter.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speculators.data.packing import RowSlice, in_validation_split, slice_row
from speculators.data.token_table import TokenTable
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch
from speculators.features.encoding import LAST, decode, last_layer_part
from speculators.features.prefetch import BufferPool, Prefetcher
from speculators.features.shards import ShardReader
from speculators.features.writer import read_skipped

RowPrefixes = Sequence[tuple[int, int]]
"""(row, number of tokens from its beginning) of the rows of a batch."""


class HiddenStatesSource(Protocol):
    """Provides encoded hidden states by row of the token table."""

    concurrent_fills: int
    """Batches that may be filled at the same time."""

    @property
    def layout(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape) of one token; for the tensors in `LAST`, of one entry. See `encoding`."""

    def lengths(self, token_counts: Sequence[int]) -> dict[int, int]:
        """Return row -> number of tokens that have hidden states; `token_counts` are the lengths of all rows.

        Raises:
            ContractError: a row has no hidden states.
        """

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """Return bool [tokens] over a row's first positions, true where the last layer is available."""

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """Announce the rows of the coming batches, in order; replaces an earlier announcement."""

    def fill(self, prefixes: RowPrefixes, token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]) -> None:
        """Write the hidden states of a batch into tensors, row after row; waits until they are available.

        Args:
            prefixes: the rows of the batch.
            token_ids: int64, of all prefixes; the hidden states have to be of these tokens.
            into: contiguous tensors by name, as `layout` has them, with an element for each token or entry.

        Raises:
            ContractError: the hidden states are of other tokens.
        """

    def close(self) -> None:
        """End all work; whoever waits for hidden states gets an error."""


READAHEAD_BYTES = 64 << 20
"""Bytes that the kernel reads ahead of time, and no less than a batch: with one batch alone, the disk would idle."""


class ShardSource:
    """Hidden states of an artifact."""

    concurrent_fills = 2
    """With one, the disk would idle between the end of a batch and the beginning of the next."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.layout = {name: column for name, column in reader.layout.items() if name != "token_ids"}
        self._lengths = {row: reader.length(row) for row in reader.rows}
        token_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in reader.layout.values())
        self._readahead_tokens = -(-READAHEAD_BYTES // token_bytes)
        self._expected: deque[list[int]] = deque()
        """Rows of the coming batches."""
        self._advised: deque[int] = deque()
        """Tokens of each of the first of these, which the kernel reads already."""
        self._lock = threading.Lock()

    def lengths(self, token_counts: Sequence[int]) -> dict[int, int]:
        """See `HiddenStatesSource`."""
        rows = self.reader.rows
        required = sorted(set(range(len(token_counts))) - set(read_skipped(self.reader.directory)))
        if rows != required:
            missing = sorted(set(required) - set(rows))
            raise ContractError(
                f"there are hidden states of {len(rows)} rows, and tokens of {len(token_counts)} "
                f"(first row without: {missing[0] if missing else 'none'})",
                "extract the hidden states of these tokens again",
            )
        for row, length in self._lengths.items():
            if not token_counts[row] - 1 <= length <= token_counts[row]:
                raise ContractError(
                    f"row {row} has {token_counts[row]} tokens and hidden states of {length}",
                    "extract the hidden states of these tokens again",
                )
        return self._lengths

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """See `HiddenStatesSource`."""
        return self.reader.last_layer_mask(row, tokens)

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """See `HiddenStatesSource`."""
        with self._lock:
            self._expected, self._advised = deque(list(batch) for batch in batches), deque()
            self._advise()

    def fill(self, prefixes: RowPrefixes, token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]) -> None:
        """See `HiddenStatesSource`."""
        rows = [row for row, _ in prefixes]
        with self._lock:
            for index in range(min(self.concurrent_fills, len(self._advised))):
                if self._expected[index] == rows:
                    del self._expected[index], self._advised[index]
                    break
            self._advise()
        stored_ids = np.empty_like(token_ids)
        self.reader.fill(prefixes, {**into, "token_ids": torch.from_numpy(stored_ids)})
        if not np.array_equal(stored_ids, token_ids):
            ends = np.cumsum([tokens for _, tokens in prefixes])
            row = prefixes[int(np.searchsorted(ends, (stored_ids != token_ids).argmax(), side="right"))][0]
            raise ContractError(
                f"the hidden states of row {row} are of other tokens",
                "extract the hidden states of these tokens again",
            )

    def _advise(self) -> None:
        """Have the kernel read the coming batches while those before them are copied, checked and trained on."""
        for batch in itertools.islice(self._expected, len(self._advised), None):
            if self._advised and sum(self._advised) >= self._readahead_tokens:
                break
            rows = [(row, self._lengths[row]) for row in dict.fromkeys(batch)]
            self.reader.will_need(rows)
            self._advised.append(sum(tokens for _, tokens in rows))

    def close(self) -> None:
        """See `HiddenStatesSource`."""


class DataLoader:
    """Makes packed batches of the rows of a token table (directory `tokens`) and their hidden states.

    Raises:
        ContractError: a row has no hidden states, or those of other tokens.
    """

    def __init__(self, tokens: Path, source: HiddenStatesSource) -> None:
        self.table = TokenTable(tokens)
        self.source = source
        self.lengths: dict[int, int] = source.lengths(self.table.lengths)
        """Row -> number of tokens that have hidden states."""
        self._fully_supervised: set[int] = set()
        self._device = torch.device("cpu")
        self._buffers = BufferPool()
        self._stream: torch.cuda.Stream | None = None
        self._prefetcher: Prefetcher[list[RowSlice], EncodedBatch] = Prefetcher(self._read, source.concurrent_fills)

    def split(self, ratio: float) -> tuple[list[int], list[int]]:
        """Return the rows to train on and those of the validation split, about `ratio` of the conversations."""
        validation = {row for row in self.lengths if in_validation_split(self.table.conversations[row], ratio)}
        return [row for row in self.lengths if row not in validation], sorted(validation)

    def supervise_all(self, rows: Iterable[int]) -> None:
        """Supervise every token of these rows from now on, whatever their loss mask is."""
        self._fully_supervised.update(rows)

    def row_slices(self, rows: Sequence[int], batch_tokens: int) -> list[RowSlice]:
        """Return each row as one slice, or as several where it is longer than a batch."""
        slices = []
        for row in rows:
            length, supervised = self.lengths[row], []
            if length > batch_tokens:
                supervised = np.flatnonzero(self._supervised(row, 0, length)).tolist()
            slices += slice_row(row, length, supervised, batch_tokens)
        return slices

    def expect(self, batches: Sequence[Sequence[RowSlice]]) -> None:
        """Announce the batches that `pack` will be called with, in order."""
        started = self._prefetcher.expect([list(batch) for batch in batches])
        self.source.expect([[row_slice.row for row_slice in batch] for batch in batches[started:]])

    def pack(self, slices: Sequence[RowSlice], device: torch.device) -> PackedBatch:
        """Load row slices as one packed batch: each row up to its slice's end, supervised inside the slice.

        Raises:
            RunError: the hidden states of these rows could not be read.
        """
        self._set_device(device)
        batch = self.read(slices)
        if self._stream is not None:
            for tensor in (batch.token_ids, batch.loss_mask, batch.last_index, *batch.encoded.values()):
                tensor.record_stream(torch.cuda.current_stream(device))
        return PackedBatch(
            rows=[row_slice.row for row_slice in slices],
            lengths=[row_slice.end for row_slice in slices],
            token_ids=batch.token_ids,
            loss_mask=batch.loss_mask,
            **self._decode(batch.encoded),
            last_index=batch.last_index,
        )

    def read(self, slices: Sequence[RowSlice]) -> EncodedBatch:
        """Load row slices without decoding their hidden states, to the device of the last `pack`."""
        return self._prefetcher.take(list(slices))

    def close(self) -> None:
        """Stop reading ahead."""
        self._prefetcher.stop()
        self.source.close()
        self._prefetcher.join()

    def mask(self, row_slice: RowSlice) -> Tensor:
        """Return bool [T] over a row up to the slice's end, true where a token of the slice is supervised."""
        mask = np.zeros(row_slice.end, np.bool_)
        mask[row_slice.begin :] = self._supervised(row_slice.row, row_slice.begin, row_slice.end)
        return torch.from_numpy(mask)

    def name(self, rows: list[int]) -> str:
        """Name rows and their conversations, for a message."""
        return ", ".join(f"{row} (conversation {self.table.conversations[row]})" for row in rows)

    def _supervised(self, row: int, begin: int, end: int) -> npt.NDArray[np.bool_]:
        mask = self.table.loss_mask(row)[begin:end] != 0
        return np.ones_like(mask) if row in self._fully_supervised else mask

    def _decode(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if self._stream is None and "scales" in encoded:
            out = self._buffers.empty({name: (torch.bfloat16, encoded[name].shape) for name in ("states", "last")})
        return {
            "hidden_states": decode(encoded, out.get("states")),
            "last_hidden_states": decode(last_layer_part(encoded), out.get("last")),
        }

    def _set_device(self, device: torch.device) -> None:
        if device != self._device:
            self._device, self._buffers = device, BufferPool(pinned=device.type == "cuda")
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _read(self, slices: list[RowSlice]) -> EncodedBatch:
        """Read a batch; runs in a thread of the prefetcher."""
        prefixes = [(row_slice.row, row_slice.end) for row_slice in slices]
        total = sum(row_slice.end for row_slice in slices)
        token_ids, loss_mask = np.empty(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)
        last = np.concatenate([self.source.last_layer_mask(row, tokens) for row, tokens in prefixes])
        start = 0
        for row_slice in slices:
            row, begin, end = row_slice.row, row_slice.begin, row_slice.end
            token_ids[start : start + end] = self.table.token_ids(row)[:end]
            loss_mask[start + begin : start + end] = self._supervised(row, begin, end)
            start += end
        if (loss_mask & ~last).any():
            raise ContractError(
                f"the last layer was not kept where rows {self.name([row for row, _ in prefixes])} are supervised",
                "extract the hidden states again, with extract.last_state=everywhere",
            )
        counts = {name: int(last.sum()) if name in LAST.values() else total for name in self.source.layout}
        layout = {name: (dtype, (counts[name], *shape)) for name, (dtype, shape) in self.source.layout.items()}
        encoded = self._buffers.empty(layout)
        self.source.fill(prefixes, token_ids, encoded)
        last_index = torch.from_numpy(np.maximum(last.cumsum() - 1, 0))
        batch = EncodedBatch(torch.from_numpy(token_ids), torch.from_numpy(loss_mask), last_index, encoded)
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        self._stream.synchronize()  # then the memory that was copied from can be reused
        return moved


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch on its device, hidden states still encoded."""

    token_ids: Tensor
    loss_mask: Tensor
    last_index: Tensor
    """See `PackedBatch`."""
    encoded: dict[str, Tensor]

    def to(self, device: torch.device) -> EncodedBatch:
        """Copy to a device; returns before the copies are complete."""
        return EncodedBatch(
            self.token_ids.to(device, non_blocking=True),
            self.loss_mask.to(device, non_blocking=True),
            self.last_index.to(device, non_blocking=True),
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.encoded.items()},
        )
