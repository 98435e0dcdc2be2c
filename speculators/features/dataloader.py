"""What is trained on: the rows of a token table beside their hidden states, split by conversation.

Where states come from is a `HiddenStatesSource`: the shards of an artifact (`ShardSource`), or a live server
(`training.live_features`). Which batches there are depends on the tokens and the seed alone, so it is the same for all
sources that cover whole rows.
While one batch is trained on, threads read the next ones (`prefetch`), into memory that is used again.

Every row of the table has to have its states, but for those that extraction left out and named, and the states have
to be of the row's own tokens. Neither is assumed: a row that does not fit stops the training, since leaving it out
would go unnoticed. States that were taken while the target answered lack those of a row's last token; the row is taken
one token shorter then.
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

Parts = Sequence[tuple[int, int]]
"""Rows, and how many of each one's tokens are wanted, from its beginning."""


class HiddenStatesSource(Protocol):
    """Hidden states by row of the token table."""

    concurrent_fills: int
    """Batches that may be filled at the same time."""

    @property
    def layout(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What `encoding` keeps of one token, and in `LAST` of one place, by name: its type, and its shape."""

    def lengths(self, whole: Sequence[int]) -> dict[int, int]:
        """How many tokens of each row have states; `whole` are the rows' lengths in tokens.

        Raises:
            ContractError: not all rows have states.
        """

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """A row's first tokens, true where there is what leaves the last layer."""

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """From now on the rows will be asked for in this order, a batch at a time. Replaces what was said before."""

    def fill(self, parts: Parts, token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]) -> None:
        """Put the states of a batch, one row after the other, where they are wanted; waits until they are there.

        Args:
            parts: of the batch.
            token_ids: of all parts, which the states have to be of.
            into: contiguous tensors by name, as `layout` has them, of as many tokens or places of the last layer.

        Raises:
            ContractError: they are of other tokens.
        """

    def close(self) -> None:
        """Nothing more will be asked for; whoever waits for states gets an error."""


FAR_BYTES = 64 << 20
"""How much is asked of the disk ahead, and no less than a batch: one batch alone leaves it idle in between."""


class ShardSource:
    """States that an artifact holds. Nothing has to be waited for but the disk."""

    concurrent_fills = 2
    """Or the disk would wait while the end of one batch is looked at, and the beginning of the next."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.layout = {name: column for name, column in reader.layout.items() if name != "token_ids"}
        self._lengths = {row: reader.length(row) for row in reader.rows}
        each = sum(dtype.itemsize * math.prod(shape) for dtype, shape in reader.layout.values())
        self._far = -(-FAR_BYTES // each)
        """Tokens that the disk is told of ahead."""
        self._expected: deque[list[int]] = deque()
        """Batches to come."""
        self._asked: deque[int] = deque()
        """Tokens of the first of them, which the disk has been told of already."""
        self._telling = threading.Lock()

    def lengths(self, whole: Sequence[int]) -> dict[int, int]:
        """See `HiddenStatesSource`."""
        rows = self.reader.rows
        wanted = sorted(set(range(len(whole))) - set(read_skipped(self.reader.directory)))
        if rows != wanted:
            missing = sorted(set(wanted) - set(rows))
            raise ContractError(
                f"there are hidden states of {len(rows)} rows, and tokens of {len(whole)} "
                f"(first row without: {missing[0] if missing else 'none'})",
                "extract the hidden states of these tokens again",
            )
        for row, length in self._lengths.items():
            if not whole[row] - 1 <= length <= whole[row]:
                raise ContractError(
                    f"row {row} has {whole[row]} tokens and states of {length}",
                    "extract the hidden states of these tokens again",
                )
        return self._lengths

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """See `HiddenStatesSource`."""
        return self.reader.last_layer_mask(row, tokens)

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """See `HiddenStatesSource`."""
        with self._telling:
            self._expected, self._asked = deque(list(batch) for batch in batches), deque()
            self._tell()

    def fill(self, parts: Parts, token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]) -> None:
        """See `HiddenStatesSource`."""
        rows = [row for row, _ in parts]
        with self._telling:
            for place in range(min(self.concurrent_fills, len(self._asked))):
                if self._expected[place] == rows:
                    del self._expected[place], self._asked[place]
                    break
            self._tell()
        found = np.empty_like(token_ids)
        self.reader.fill(parts, {**into, "token_ids": torch.from_numpy(found)})
        if not np.array_equal(found, token_ids):
            ends = np.cumsum([tokens for _, tokens in parts])
            first = parts[int(np.searchsorted(ends, (found != token_ids).argmax(), side="right"))][0]
            raise ContractError(
                f"the hidden states of row {first} are of other tokens",
                "extract the hidden states of these tokens again",
            )

    def _tell(self) -> None:
        """Let the disk read what comes next while batches before it are copied, checked and trained on."""
        for batch in itertools.islice(self._expected, len(self._asked), None):
            if self._asked and sum(self._asked) >= self._far:
                break
            rows = [(row, self._lengths[row]) for row in dict.fromkeys(batch)]
            self.reader.will_need(rows)
            self._asked.append(sum(tokens for _, tokens in rows))

    def close(self) -> None:
        """Nobody waits."""


class DataLoader:
    """Tokens and states by row.

    Raises:
        ContractError: rows without states, or states of other tokens.
    """

    def __init__(self, tokens: Path, source: HiddenStatesSource) -> None:
        self.table = TokenTable(tokens)
        self.source = source
        self.lengths: dict[int, int] = source.lengths(self.table.lengths)
        """Tokens of each row that have states."""
        self._whole: set[int] = set()
        self._device = torch.device("cpu")
        self._buffers = BufferPool()
        self._stream: torch.cuda.Stream | None = None
        self._ahead: Prefetcher[list[RowSlice], EncodedBatch] = Prefetcher(self._read, source.concurrent_fills)

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Rows to train on, and rows to validate on: about `share` of the conversations."""
        held = {row for row in self.lengths if in_validation_split(self.table.conversations[row], share)}
        return [row for row in self.lengths if row not in held], sorted(held)

    def supervise_all(self, rows: Iterable[int]) -> None:
        """From now on every token of these rows is supervised, whoever said it."""
        self._whole.update(rows)

    def row_slices(self, rows: Sequence[int], batch_tokens: int) -> list[RowSlice]:
        """The rows, those that are longer than a batch in several pieces."""
        found = []
        for row in rows:
            length, supervised = self.lengths[row], []
            if length > batch_tokens:
                supervised = np.flatnonzero(self._supervised(row, 0, length)).tolist()
            found += slice_row(row, length, supervised, batch_tokens)
        return found

    def expect(self, batches: Sequence[Sequence[RowSlice]]) -> None:
        """What `pack` will be asked for from now on, in this order."""
        begun = self._ahead.expect([list(batch) for batch in batches])
        self.source.expect([[piece.row for piece in batch] for batch in batches[begun:]])

    def pack(self, wanted: Sequence[RowSlice], device: torch.device) -> PackedBatch:
        """The pieces as one pack: each row up to its piece's end, supervised inside the piece.

        Raises:
            RunError: whatever went wrong with the states of these rows.
        """
        self._to(device)
        found = self.read(wanted)
        if self._stream is not None:
            for tensor in (found.token_ids, found.loss_mask, found.last_index, *found.encoded.values()):
                tensor.record_stream(torch.cuda.current_stream(device))
        return PackedBatch(
            rows=[piece.row for piece in wanted],
            lengths=[piece.end for piece in wanted],
            token_ids=found.token_ids,
            loss_mask=found.loss_mask,
            **self._decoded(found.encoded),
            last_index=found.last_index,
        )

    def read(self, wanted: Sequence[RowSlice]) -> EncodedBatch:
        """What `pack` makes a pack of, on the device of the last one."""
        return self._ahead.take(list(wanted))

    def close(self) -> None:
        """Read no further."""
        self._ahead.stop()
        self.source.close()
        self._ahead.join()

    def mask(self, piece: RowSlice) -> Tensor:
        """bool [T]: what of a row, up to its piece's end, is supervised in this piece."""
        mask = np.zeros(piece.end, np.bool_)
        mask[piece.begin :] = self._supervised(piece.row, piece.begin, piece.end)
        return torch.from_numpy(mask)

    def name(self, rows: list[int]) -> str:
        """Rows for a message."""
        return ", ".join(f"{row} (conversation {self.table.conversations[row]})" for row in rows)

    def _supervised(self, row: int, begin: int, end: int) -> npt.NDArray[np.bool_]:
        return np.ones(end - begin, np.bool_) if row in self._whole else self.table.loss_mask(row)[begin:end] != 0

    def _decoded(self, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if self._stream is None and "scales" in encoded:
            out = self._buffers.empty({name: (torch.bfloat16, encoded[name].shape) for name in ("states", "last")})
        return {
            "hidden_states": decode(encoded, out.get("states")),
            "last_hidden_states": decode(last_layer_part(encoded), out.get("last")),
        }

    def _to(self, device: torch.device) -> None:
        """Where packs are wanted from now on."""
        if device != self._device:
            self._device, self._buffers = device, BufferPool(pinned=device.type == "cuda")
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _read(self, wanted: list[RowSlice]) -> EncodedBatch:
        """In a thread that reads ahead."""
        parts = [(piece.row, piece.end) for piece in wanted]
        total = sum(piece.end for piece in wanted)
        token_ids, loss_mask = np.empty(total, dtype=np.int64), np.zeros(total, dtype=np.bool_)
        last = np.concatenate([self.source.last_layer_mask(row, tokens) for row, tokens in parts])
        begin = 0
        for piece in wanted:
            token_ids[begin : begin + piece.end] = self.table.token_ids(piece.row)[: piece.end]
            supervised = self._supervised(piece.row, piece.begin, piece.end)
            loss_mask[begin + piece.begin : begin + piece.end] = supervised
            begin += piece.end
        if (loss_mask & ~last).any():
            raise ContractError(
                f"what leaves the last layer was not kept where rows {self.name([row for row, _ in parts])} are "
                "supervised",
                "extract the hidden states again, with extract.last_state=everywhere",
            )
        places = int(last.sum())
        encoded = self._buffers.empty(
            {
                name: (dtype, (places if name in LAST.values() else total, *each))
                for name, (dtype, each) in self.source.layout.items()
            }
        )
        self.source.fill(parts, token_ids, encoded)
        last_index = np.maximum(last.cumsum() - 1, 0)
        read = EncodedBatch(
            torch.from_numpy(token_ids), torch.from_numpy(loss_mask), torch.from_numpy(last_index), encoded
        )
        if self._stream is None:
            return read
        with torch.cuda.stream(self._stream):
            moved = EncodedBatch(
                read.token_ids.to(self._device, non_blocking=True),
                read.loss_mask.to(self._device, non_blocking=True),
                read.last_index.to(self._device, non_blocking=True),
                {name: tensor.to(self._device, non_blocking=True) for name, tensor in encoded.items()},
            )
        self._stream.synchronize()  # then what was copied can be used again
        return moved


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch on the device where it is wanted, states still encoded."""

    token_ids: Tensor
    loss_mask: Tensor
    last_index: Tensor
    """See `PackedBatch`."""
    encoded: dict[str, Tensor]
