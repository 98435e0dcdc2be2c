"""Hidden states that a training keeps on disk, up to a budget, in the order in which they come in.

    00000/   a set of hidden states of its own (`shards`), one shard with its index
    00001/   ...

A set is sealed when it holds `SET_TOKENS`. One that was not sealed, or does not open, is removed and its rows are
asked for again; so a killed training finds all that was sealed. Rows that are not sealed yet are in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speculators.errors import ContractError
from speculators.features.contract import check_contract
from speculators.features.encoding import copy_first
from speculators.features.io import Reading
from speculators.features.shards import INDEX, ShardReader, ShardWriter

SET_TOKENS = 4096
"""Tokens that a kill may lose, and that are held in memory until then."""
SET_BYTES, ROW_BYTES = 4096, 128
"""What headers and indices take at most, of a set and of a row."""


class StatesCache:
    """Rows by number. One thread may `add` while another one reads."""

    def __init__(self, directory: Path, contract: Mapping[str, Any], budget: int) -> None:
        self.bytes = 0
        """Of the files of sealed sets."""
        self.found = 0
        """Rows that an earlier attempt left."""
        self._directory = directory
        self._contract = dict(contract)
        self._budget = budget
        self._full = False
        self._sealed: dict[int, ShardReader] = {}
        self._open: dict[int, Mapping[str, Tensor]] = {}
        self._reading = Reading()
        self._writer: ShardWriter | None = None
        self._tokens, self._open_bytes = 0, 0
        self._sets = 0
        directory.mkdir(parents=True, exist_ok=True)
        for place in sorted(directory.iterdir()):
            self._adopt(place)
        self.found = len(self._sealed)

    def __contains__(self, row: object) -> bool:
        return row in self._open or row in self._sealed

    def __len__(self) -> int:
        return len(self._sealed) + len(self._open)

    def fill(self, row: int, into: Mapping[str, Tensor]) -> None:
        """Put the states of a row's first tokens, as they are stored, into tensors that have room for so many."""
        found = self._open.get(row)
        if found is None:
            self._sealed[row].fill([(row, len(into["states"]))], into)
        else:
            copy_first(found, into)

    def add(self, row: int, token_ids: Tensor, sifted: Mapping[str, Tensor], last: Tensor) -> bool:
        """Keep a row, as `ShardWriter.add_sifted`, if the budget allows; once it has not, no further row is kept."""
        size = token_ids.nbytes + sum(tensor.nbytes for tensor in sifted.values())
        more = size + ROW_BYTES + (SET_BYTES if self._writer is None else 0)
        if self._full or self.bytes + self._open_bytes + more > self._budget:
            self._full = True
            self.seal()
            return False
        if self._writer is None:
            self._writer = ShardWriter(self._directory / f"{self._sets:05d}", self._contract, 2 * SET_TOKENS)
        self._writer.add_sifted(row, token_ids, sifted, last)
        self._open[row] = sifted
        self._open_bytes += more
        self._tokens += len(token_ids)
        if self._tokens >= SET_TOKENS:
            self.seal()
        return True

    def seal(self) -> None:
        """Put on the disk what is not there yet."""
        if self._writer is None:
            return
        self._writer.close()
        reader = ShardReader(self._writer.directory, self._reading)
        # In this order: a row that is asked for meanwhile is always in one of the two.
        self._sealed.update(dict.fromkeys(reader.rows, reader))
        self.bytes += _size(reader.directory)
        self._open = {}
        self._writer, self._tokens, self._open_bytes = None, 0, 0
        self._sets += 1

    def _adopt(self, place: Path) -> None:
        """Take over a set that an earlier attempt sealed."""
        try:
            if not (place / INDEX).exists():
                raise ContractError(f"{place} was not sealed", "its rows are asked for again")
            reader = ShardReader(place, self._reading)
            check_contract(reader.contract, self._contract)
            reader.check()
        except ContractError:
            shutil.rmtree(place)
            return
        self._sealed.update(dict.fromkeys(reader.rows, reader))
        self.bytes += _size(place)
        self._sets = int(place.name) + 1


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())
