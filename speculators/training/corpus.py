"""What is trained on: the rows of a token table beside their hidden states, split by conversation.

Every row of the table has to have its states, and the states have to be of the row's own tokens. Neither is
assumed: a row that does not fit stops the training, since leaving it out would go unnoticed. States that were taken
while the target answered lack those of a row's last token; the row is taken one token shorter then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from speculators.data.packing import Piece, held_out, pieces
from speculators.data.shards import ShardReader
from speculators.drafts.base import Pack
from speculators.errors import ContractError


class Corpus:
    """Tokens and states by row.

    Raises:
        ContractError: rows without states, or states of other tokens.
    """

    def __init__(self, tokens: Path, features: ShardReader) -> None:
        self.table: Any = datasets.load_from_disk(str(tokens)).with_format("torch")
        self.features = features
        plain = self.table.with_format(None)
        self.conversations: list[str] = list(plain["id"])
        whole: list[int] = list(plain["seq_len"])
        if features.rows != list(range(len(whole))):
            missing = sorted(set(range(len(whole))) - set(features.rows))
            raise ContractError(
                f"there are hidden states of {len(features.rows)} rows, and tokens of {len(whole)} "
                f"(first row without: {missing[0] if missing else 'none'})",
                "extract the hidden states of these tokens again",
            )
        self.lengths: dict[int, int] = {row: features.length(row) for row in features.rows}
        """Tokens of each row that have states."""
        for row, length in self.lengths.items():
            if not whole[row] - 1 <= length <= whole[row]:
                raise ContractError(
                    f"row {row} has {whole[row]} tokens and states of {length}",
                    "extract the hidden states of these tokens again",
                )

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Rows to train on, and rows to validate on: about `share` of the conversations."""
        held = {row for row, name in enumerate(self.conversations) if held_out(name, share)}
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

    def pack(self, wanted: Sequence[Piece], device: torch.device) -> Pack:
        """The pieces as one pack: each row up to its piece's end, supervised inside the piece."""
        tokens, masks, states = [], [], []
        for piece in wanted:
            found, row = self.table[piece.row], piece.row
            if not torch.equal(found["input_ids"][: self.lengths[row]], self.features.token_ids(row)):
                raise ContractError(
                    f"the hidden states of row {row} (conversation {self.conversations[row]}) are of other tokens",
                    "extract the hidden states of these tokens again",
                )
            mask = found["loss_mask"][: piece.end].bool()
            mask[: piece.begin] = False
            tokens.append(found["input_ids"][: piece.end])
            masks.append(mask)
            states.append(self.features.states(row)[: piece.end])
        return Pack(
            rows=[piece.row for piece in wanted],
            lengths=[len(t) for t in tokens],
            token_ids=torch.cat(tokens).to(device),
            loss_mask=torch.cat(masks).to(device),
            states=torch.cat(states).to(device),
        )

    def name(self, rows: list[int]) -> str:
        """Rows for a message."""
        return ", ".join(f"{row} (conversation {self.conversations[row]})" for row in rows)
