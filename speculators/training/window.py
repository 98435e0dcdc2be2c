"""Decide which hidden states of a live server to request next, and which to evict from memory.

The order in which training uses its rows is known to the end, so eviction is optimal (Belady 1966), not a guess. Rows
are requested in that order, a number of batches ahead: far enough that training does not wait, and no further, because
a row that was used stays in the remaining memory. It is used again in the next epoch, or earlier if it is trained on in
several row slices. A row is evicted only for one that is used earlier; the one that is used last goes first.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Container, Mapping, Sequence

from torch import Tensor

NEVER = 2**62
"""Index of the next batch that uses a row which no batch uses any more."""


class RowWindow:
    """The rows in memory, or requested. Not thread-safe.

    Args:
        sizes: bytes of every row.
        capacity: bytes that rows may occupy.
        prefetch_batches: batches, the next one included, whose rows are requested.
    """

    def __init__(self, sizes: Mapping[int, int], capacity: int, prefetch_batches: int) -> None:
        self.rows: dict[int, Mapping[str, Tensor] | None] = {}
        """Rows that occupy memory, with their encoded tensors; None while a row is requested."""
        self.bytes = 0
        """Memory that they occupy."""
        self.peak = 0
        """Maximum of `bytes` so far."""
        self.awaited: Collection[int] = ()
        """Rows that training waits for now: requested even beyond the capacity, and not evicted."""
        self._sizes = sizes
        self._capacity, self._prefetch_batches = capacity, prefetch_batches
        self._batches: list[tuple[int, ...]] = []
        self._next_batch = 0
        """Index of the batch that is used next."""
        self._requested = 0
        """Every row of the batches before this index is in memory, requested or cached."""
        self._uses: dict[int, list[int]] = {}
        """Row -> indices of the batches that use it, the next one last."""
        self._latest: list[tuple[int, int]] = []
        """Heap of (-next use, row), with entries that are out of date."""

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """Set the rows of each batch, in the order of use, from now to the end."""
        self._batches = [tuple(dict.fromkeys(batch)) for batch in batches]
        self._next_batch = self._requested = 0
        self._uses = defaultdict(list)
        for index in reversed(range(len(self._batches))):
            for row in self._batches[index]:
                self._uses[row].append(index)
        for row in [row for row in self.rows if self._next_use(row) == NEVER]:
            self._evict(row)
        self._latest = [(-self._next_use(row), row) for row, tensors in self.rows.items() if tensors is not None]
        heapq.heapify(self._latest)

    def next_request(self, cached: Container[int]) -> int | None:
        """Return the row to request next, and reserve its memory; None if there is none, or no memory for it.

        Args:
            cached: rows that need not be requested.
        """
        for row in self.awaited:
            if row not in self.rows and row not in cached:
                self._free(self._sizes[row], before=self._next_batch, best_effort=True)
                return self._reserve(row)
        while self._requested < min(len(self._batches), self._next_batch + self._prefetch_batches):
            for row in self._batches[self._requested]:
                if row not in self.rows and row not in cached:
                    return self._reserve(row) if self._free(self._sizes[row], before=self._requested) else None
            self._requested += 1
        return None

    def arrived(self, row: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Store a requested row; None if it was cached and needs no memory here."""
        if tensors is None or self._next_use(row) == NEVER:
            self._evict(row)
        elif row in self.rows:  # otherwise no batch uses it any more
            self.rows[row] = tensors
            heapq.heappush(self._latest, (-self._next_use(row), row))

    def used(self) -> None:
        """Record that training has used the rows that it awaited, and evict those that it does not use again."""
        used_rows, self.awaited = set(self.awaited), ()
        if self._next_batch < len(self._batches) and used_rows == set(self._batches[self._next_batch]):
            for row in used_rows:
                self._uses[row].pop()
            self._next_batch += 1
            self._requested = max(self._requested, self._next_batch)
        for row in used_rows & self.rows.keys():
            if self._next_use(row) == NEVER:
                self._evict(row)
            else:
                heapq.heappush(self._latest, (-self._next_use(row), row))
        self._free(0, before=self._next_batch - 1, best_effort=True)

    def _next_use(self, row: int) -> int:
        if row in self.awaited:
            return self._next_batch
        uses = self._uses.get(row)
        return uses[-1] if uses else NEVER

    def _reserve(self, row: int) -> int:
        self.rows[row] = None
        self.bytes += self._sizes[row]
        self.peak = max(self.peak, self.bytes)
        return row

    def _evict(self, row: int) -> None:
        if row in self.rows:
            del self.rows[row]
            self.bytes -= self._sizes[row]

    def _free(self, size: int, before: int, best_effort: bool = False) -> bool:
        """Evict rows whose next use is after batch `before` until `size` bytes are free; return whether they are.

        Without `best_effort`, nothing is evicted if that does not free enough.
        """
        evicted: dict[int, tuple[int, int]] = {}
        free = self._capacity - self.bytes
        while free < size and self._latest and -self._latest[0][0] > before:
            entry = heapq.heappop(self._latest)
            row = entry[1]
            if row not in evicted and self.rows.get(row) is not None and self._next_use(row) == -entry[0]:
                evicted[row] = entry
                free += self._sizes[row]
        if free < size and not best_effort:
            for entry in evicted.values():
                heapq.heappush(self._latest, entry)
            return False
        for row in evicted:
            self._evict(row)
        return free >= size
