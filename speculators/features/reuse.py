"""Copies rows of hidden states out of the shards of an earlier artifact, which may have more layers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators.errors import ContractError
from speculators.features.contract import check_contract
from speculators.features.encoding import LAST
from speculators.features.shards import ShardReader

VERIFY = (
    "`speculators-run verify --quarantine` removes damaged artifacts from the store; then run the same command again"
)
FREE = ("tokens", "layer_ids", "last_state")
"""Fields of the contract that may differ: rows are found by their answers, and some layers and positions are enough."""


class EarlierHiddenStates:
    """The hidden states in `directory`, as rows for shards of `contract`.

    Raises:
        ContractError: they are damaged, have another format, or lack a layer.
    """

    def __init__(self, directory: Path, contract: Mapping[str, Any]) -> None:
        self._directory = directory
        *layers, last = contract["layer_ids"]
        with _verify_hint(directory):
            self._reader = ShardReader(directory)
            check_contract(self._reader.contract, {name: v for name, v in contract.items() if name not in FREE})
            stored: list[int] = self._reader.contract["layer_ids"]
            if not set(layers) <= set(stored[:-1]) or stored[-1] != last:
                raise ContractError(f"the layers are {stored}, not all of {contract['layer_ids']}", "")
        self._columns = [stored.index(layer) for layer in layers]

    def rows(self) -> dict[bytes, int]:
        """The row of each `token_digest`."""
        with _verify_hint(self._directory):
            return {token_digest(self._reader.token_ids(row)): row for row in self._reader.rows}

    def covers(self, row: int, mask: Tensor) -> bool:
        """Whether a row of these tokens has the last layer wherever the bool mask [T] is true."""
        return not bool((mask & ~torch.from_numpy(self._reader.last_layer_mask(row, len(mask)))).any())

    def read(self, row: int, token_ids: Sequence[int], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Read a row: its token ids [T], and the tensors of `split_last_layer` with the last layer where `mask` is.

        Raises:
            ContractError: it is of other tokens, is damaged, or lacks the last layer somewhere.
        """
        with _verify_hint(self._directory):
            stored_ids, encoded, stored_mask = self._reader.encoded_row(row)
            if stored_ids.tolist() != list(token_ids):
                raise ContractError(f"row {row} is of other tokens", "")
            if bool((mask & ~stored_mask).any()):
                raise ContractError(f"row {row} lacks the last layer at some positions", "")
        last = set(LAST.values())
        return stored_ids, {
            name: tensor[mask[stored_mask]] if name in last else tensor[:, self._columns].contiguous()
            for name, tensor in encoded.items()
        }


def token_digest(token_ids: Tensor) -> bytes:
    """sha256 of token ids [T]."""
    return hashlib.sha256(token_ids.to(torch.int64).numpy().tobytes()).digest()


@contextlib.contextmanager
def _verify_hint(directory: Path) -> Iterator[None]:
    try:
        yield
    except ContractError as error:
        raise ContractError(f"hidden states that were to be reused: {directory}: {error.message}", VERIFY) from None
