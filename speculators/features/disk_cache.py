"""A cache on disk of the hidden states that online training receives, up to a budget, in order of arrival.

    00000/   a directory of hidden states (`shards`): one shard and its index
    00001/   ...

A directory is completed when it holds `SET_TOKENS` tokens; until then its rows are in memory as well. An incomplete or
damaged directory is removed and its rows are requested again, so a killed training keeps all complete ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speculators.errors import ContractError
from speculators.features.contract import check_contract
from speculators.features.encoding import copy_prefix
from speculators.features.io import FileReader
from speculators.features.shards import INDEX, ShardReader, ShardWriter

SET_TOKENS = 4096
"""Tokens of a directory: a kill loses at most that many, and that many are in memory."""
SET_BYTES, ROW_BYTES = 4096, 128
"""Upper bounds of the bytes that headers and indices take, for a directory and for a row."""


class HiddenStatesCache:
    """Keeps hidden states of rows on disk, up to `budget` bytes. One thread may `add` while another one reads."""

    def __init__(self, directory: Path, contract: Mapping[str, Any], budget: int) -> None:
        self.bytes = 0
        """Size of the complete directories."""
        self.rows_reused = 0
        """Rows that an earlier attempt has cached."""
        self._directory = directory
        self._contract = dict(contract)
        self._budget = budget
        self._full = False
        self._sealed: dict[int, ShardReader] = {}
        self._open: dict[int, Mapping[str, Tensor]] = {}
        self._files = FileReader()
        self._writer: ShardWriter | None = None
        self._tokens, self._open_bytes = 0, 0
        self._sets = 0
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.iterdir()):
            self._adopt(path)
        self.rows_reused = len(self._sealed)

    def __contains__(self, row: object) -> bool:
        return row in self._open or row in self._sealed

    def __len__(self) -> int:
        return len(self._sealed) + len(self._open)

    def fill(self, row: int, into: Mapping[str, Tensor]) -> None:
        """Copy a row's first tokens, encoded, into tensors by name; the tensors' length is the number of tokens."""
        encoded = self._open.get(row)
        if encoded is None:
            self._sealed[row].fill([(row, len(into["states"]))], into)
        else:
            copy_prefix(encoded, into)

    def add(self, row: int, token_ids: Tensor, encoded: Mapping[str, Tensor], last: Tensor) -> bool:
        """Keep a row (see `ShardWriter.add_encoded`) unless the budget is used up; returns whether it was kept.

        After the first row that does not fit, no further row is kept.
        """
        size = token_ids.nbytes + sum(tensor.nbytes for tensor in encoded.values())
        more = size + ROW_BYTES + (SET_BYTES if self._writer is None else 0)
        if self._full or self.bytes + self._open_bytes + more > self._budget:
            self._full = True
            self.seal()
            return False
        if self._writer is None:
            self._writer = ShardWriter(self._directory / f"{self._sets:05d}", self._contract, 2 * SET_TOKENS)
        self._writer.add_encoded(row, token_ids, encoded, last)
        self._open[row] = encoded
        self._open_bytes += more
        self._tokens += len(token_ids)
        if self._tokens >= SET_TOKENS:
            self.seal()
        return True

    def seal(self) -> None:
        """Complete the directory that is being filled."""
        if self._writer is None:
            return
        self._writer.close()
        reader = ShardReader(self._writer.directory, self._files)
        # In this order, so that a row that another thread reads is always in one of the two.
        self._sealed.update(dict.fromkeys(reader.rows, reader))
        self.bytes += _size(reader.directory)
        self._open = {}
        self._writer, self._tokens, self._open_bytes = None, 0, 0
        self._sets += 1

    def _adopt(self, path: Path) -> None:
        """Use a directory of an earlier attempt if it is complete, else remove it."""
        try:
            if not (path / INDEX).exists():
                raise ContractError(f"{path} is incomplete", "its rows are requested again")
            reader = ShardReader(path, self._files)
            check_contract(reader.contract, self._contract)
            reader.check()
        except ContractError:
            shutil.rmtree(path)
            return
        self._sealed.update(dict.fromkeys(reader.rows, reader))
        self.bytes += _size(path)
        self._sets = int(path.name) + 1


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())
