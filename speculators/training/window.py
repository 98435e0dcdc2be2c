"""Which hidden states are in memory when they come out of a live server: what to ask for next, and what may go.

The order in which training wants its rows is known to the end, so nothing is guessed. Rows are asked for in that
order, a number of batches ahead: far enough that none is waited for, and no further, since a row that was used stays
in the room that is left. It is wanted again in the next epoch, and before that where it is trained on in pieces. Where
room is needed, the row goes that is wanted last, and only for one that is wanted before it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Container, Mapping, Sequence

from torch import Tensor

NEVER = 2**62


class Window:
    """The rows in memory and on their way there. Not safe to be used by two threads at once.

    Args:
        sizes: bytes of every row.
        room: bytes that rows may take.
        ahead: batches, the next one included, whose rows are asked for.
    """

    def __init__(self, sizes: Mapping[int, int], room: int, ahead: int) -> None:
        self.held: dict[int, Mapping[str, Tensor] | None] = {}
        """Rows that room is taken for; None while a row is on its way."""
        self.bytes = 0
        """Of them."""
        self.peak = 0
        """The most that it has been."""
        self.waited_for: Collection[int] = ()
        """Rows that training cannot go on without: they get in even where there is no room, and do not go."""
        self._sizes = sizes
        self._room, self._ahead = room, ahead
        self._batches: list[tuple[int, ...]] = []
        self._at = 0
        """The batch that is wanted next."""
        self._asked = 0
        """Of every batch before this one, all rows are held or elsewhere."""
        self._uses: dict[int, list[int]] = {}
        """Row -> the batches that want it, the next one last."""
        self._latest: list[tuple[int, int]] = []
        """Heap of (-next use, row), with entries that hold no more."""

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """The rows of each batch, in the order in which batches will be wanted, from now to the end."""
        self._batches = [tuple(dict.fromkeys(batch)) for batch in batches]
        self._at = self._asked = 0
        self._uses = defaultdict(list)
        for index in reversed(range(len(self._batches))):
            for row in self._batches[index]:
                self._uses[row].append(index)
        for row in [row for row in self.held if self._next_use(row) == NEVER]:
            self._forget(row)
        self._latest = [(-self._next_use(row), row) for row, states in self.held.items() if states is not None]
        heapq.heapify(self._latest)

    def ask(self, elsewhere: Container[int]) -> int | None:
        """The row to be asked for next, for which room is taken from now on; None while there is none or no room.

        `elsewhere` are rows that need not be asked for.
        """
        for row in self.waited_for:
            if row not in self.held and row not in elsewhere:
                self._make_room(self._sizes[row], before=self._at, as_much_as_there_is=True)
                return self._take_in(row)
        while self._asked < min(len(self._batches), self._at + self._ahead):
            for row in self._batches[self._asked]:
                if row not in self.held and row not in elsewhere:
                    return self._take_in(row) if self._make_room(self._sizes[row], before=self._asked) else None
            self._asked += 1
        return None

    def arrived(self, row: int, states: Mapping[str, Tensor] | None) -> None:
        """The row is there; None: it was put elsewhere and needs no room here."""
        if states is None or self._next_use(row) == NEVER:
            self._forget(row)
        elif row in self.held:  # else nobody wants it any more
            self.held[row] = states
            heapq.heappush(self._latest, (-self._next_use(row), row))

    def used(self) -> None:
        """Training has taken the rows that it waited for. Those that it never wants again go."""
        taken, self.waited_for = set(self.waited_for), ()
        if self._at < len(self._batches) and taken == set(self._batches[self._at]):
            for row in taken:
                self._uses[row].pop()
            self._at += 1
            self._asked = max(self._asked, self._at)
        for row in taken & self.held.keys():
            if self._next_use(row) == NEVER:
                self._forget(row)
            else:
                heapq.heappush(self._latest, (-self._next_use(row), row))
        self._make_room(0, before=self._at - 1, as_much_as_there_is=True)

    def _next_use(self, row: int) -> int:
        if row in self.waited_for:
            return self._at
        uses = self._uses.get(row)
        return uses[-1] if uses else NEVER

    def _take_in(self, row: int) -> int:
        self.held[row] = None
        self.bytes += self._sizes[row]
        self.peak = max(self.peak, self.bytes)
        return row

    def _forget(self, row: int) -> None:
        if row in self.held:
            del self.held[row]
            self.bytes -= self._sizes[row]

    def _make_room(self, size: int, before: int, as_much_as_there_is: bool = False) -> bool:
        """Let rows go that are wanted after the batch `before`, if that makes enough room; whether there is enough."""
        going: dict[int, tuple[int, int]] = {}
        free = self._room - self.bytes
        while free < size and self._latest and -self._latest[0][0] > before:
            entry = heapq.heappop(self._latest)
            row = entry[1]
            if row not in going and self.held.get(row) is not None and self._next_use(row) == -entry[0]:
                going[row] = entry
                free += self._sizes[row]
        if free < size and not as_much_as_there_is:
            for entry in going.values():
                heapq.heappush(self._latest, entry)
            return False
        for row in going:
            self._forget(row)
        return free >= size
