"""What is trained on: the rows of a token table beside their hidden states, split by conversation.

Where states come from is a `Source`: the shards of an artifact (`Shards`), or a live server (`training.feed`). Which
batches there are depends on the tokens and the seed alone, so it is the same for all sources that cover whole rows.

Every row of the table has to have its states, but for those that extraction left out and named, and the states have
to be of the row's own tokens. Neither is assumed: a row that does not fit stops the training, since leaving it out
would go unnoticed. States that were taken while the target answered lack those of a row's last token; the row is taken
one token shorter then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from torch import Tensor

from speculators.data.packing import Piece, held_out, pieces
from speculators.data.shards import ShardReader
from speculators.drafts.base import Pack
from speculators.errors import ContractError
from speculators.targets.states import read_skipped


class Source(Protocol):
    """Hidden states by row of the token table."""

    def lengths(self, whole: Sequence[int]) -> dict[int, int]:
        """How many tokens of each row have states; `whole` are the rows' lengths in tokens.

        Raises:
            ContractError: not all rows have states.
        """

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """From now on the rows will be asked for in this order, a batch at a time. Replaces what was said before."""

    def states(self, wanted: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The states [T, L, H] of a batch of rows, stored dtype, not to be written to; waits until they are there.

        Args:
            wanted: row -> the token ids, int64 [T], that the states have to be of.

        Raises:
            ContractError: they are of other tokens.
        """


class Shards:
    """States that an artifact holds. Nothing has to be waited for."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def lengths(self, whole: Sequence[int]) -> dict[int, int]:
        """See `Source`."""
        rows = self.reader.rows
        wanted = sorted(set(range(len(whole))) - set(read_skipped(self.reader.directory)))
        if rows != wanted:
            missing = sorted(set(wanted) - set(rows))
            raise ContractError(
                f"there are hidden states of {len(rows)} rows, and tokens of {len(whole)} "
                f"(first row without: {missing[0] if missing else 'none'})",
                "extract the hidden states of these tokens again",
            )
        found = {row: self.reader.length(row) for row in rows}
        for row, length in found.items():
            if not whole[row] - 1 <= length <= whole[row]:
                raise ContractError(
                    f"row {row} has {whole[row]} tokens and states of {length}",
                    "extract the hidden states of these tokens again",
                )
        return found

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """Everything is there."""

    def states(self, wanted: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """See `Source`."""
        for row, token_ids in wanted.items():
            if not torch.equal(token_ids, self.reader.token_ids(row)):
                raise ContractError(
                    f"the hidden states of row {row} are of other tokens",
                    "extract the hidden states of these tokens again",
                )
        return {row: self.reader.states(row) for row in wanted}


class Corpus:
    """Tokens and states by row.

    Raises:
        ContractError: rows without states, or states of other tokens.
    """

    def __init__(self, tokens: Path, source: Source) -> None:
        self.table: Any = datasets.load_from_disk(str(tokens)).with_format("torch")
        self.source = source
        plain = self.table.with_format(None)
        self.conversations: list[str] = list(plain["id"])
        self.lengths: dict[int, int] = source.lengths(list(plain["seq_len"]))
        """Tokens of each row that have states."""

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Rows to train on, and rows to validate on: about `share` of the conversations."""
        held = {row for row in self.lengths if held_out(self.conversations[row], share)}
        return [row for row in self.lengths if row not in held], sorted(held)

    def pieces(self, rows: Sequence[int], batch_tokens: int) -> list[Piece]:
        """The rows, those that are longer than a batch in several pieces."""
        found = []
        for row in rows:
            length, supervised = self.lengths[row], []
            if length > batch_tokens:
                supervised = self.table[row]["loss_mask"][:length].nonzero()[:, 0].tolist()
            found += pieces(row, length, supervised, batch_tokens)
        return found

    def expect(self, batches: Sequence[Sequence[Piece]]) -> None:
        """What `pack` will be asked for from now on, in this order."""
        self.source.expect([[piece.row for piece in batch] for batch in batches])

    def pack(self, wanted: Sequence[Piece], device: torch.device) -> Pack:
        """The pieces as one pack: each row up to its piece's end, supervised inside the piece."""
        rows = {piece.row: self.table[piece.row] for piece in wanted}
        states = self.source.states({row: found["input_ids"][: self.lengths[row]] for row, found in rows.items()})
        masks = []
        for piece in wanted:
            mask = rows[piece.row]["loss_mask"][: piece.end].bool()
            mask[: piece.begin] = False
            masks.append(mask)
        return Pack(
            rows=[piece.row for piece in wanted],
            lengths=[piece.end for piece in wanted],
            token_ids=torch.cat([rows[piece.row]["input_ids"][: piece.end] for piece in wanted]).to(device),
            loss_mask=torch.cat(masks).to(device),
            states=torch.cat([states[piece.row][: piece.end] for piece in wanted]).to(device),
        )

    def name(self, rows: list[int]) -> str:
        """Rows for a message."""
        return ", ".join(f"{row} (conversation {self.conversations[row]})" for row in rows)
