"""What is trained on: the rows of a token table beside their hidden states, split by conversation.

Every row of the table has to have its states, and the states have to be of the row's own tokens. Neither is
assumed: a row that does not fit stops the training, since leaving it out would go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch

from speculators.data.packing import held_out
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
        self.lengths: dict[int, int] = dict(enumerate(plain["seq_len"]))
        if features.rows != list(self.lengths):
            missing = sorted(set(self.lengths) - set(features.rows))
            raise ContractError(
                f"there are hidden states of {len(features.rows)} rows, and tokens of {len(self.lengths)} "
                f"(first row without: {missing[0] if missing else 'none'})",
                "extract the hidden states of these tokens again",
            )

    def split(self, share: float) -> tuple[dict[int, int], dict[int, int]]:
        """Lengths of the rows to train on, and of the rows to validate on: about `share` of the conversations."""
        held = {row for row, name in enumerate(self.conversations) if held_out(name, share)}
        train = {row: n for row, n in self.lengths.items() if row not in held}
        return train, {row: n for row, n in self.lengths.items() if row in held}

    def pack(self, rows: list[int], device: torch.device) -> Pack:
        """The rows as one pack."""
        tokens, masks, states = [], [], []
        for row in rows:
            found = self.table[row]
            if not torch.equal(found["input_ids"], self.features.token_ids(row)):
                raise ContractError(
                    f"the hidden states of row {row} (conversation {self.conversations[row]}) are of other tokens",
                    "extract the hidden states of these tokens again",
                )
            tokens.append(found["input_ids"])
            masks.append(found["loss_mask"])
            states.append(self.features.states(row))
        return Pack(
            rows=list(rows),
            lengths=[len(t) for t in tokens],
            token_ids=torch.cat(tokens).to(device),
            loss_mask=torch.cat(masks).bool().to(device),
            states=torch.cat(states).to(device),
        )

    def name(self, rows: list[int]) -> str:
        """Rows for a message."""
        return ", ".join(f"{row} (conversation {self.conversations[row]})" for row in rows)
