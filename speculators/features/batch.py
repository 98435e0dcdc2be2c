"""The packed batch: rows laid end to end in one sequence, with the target's hidden states of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """The input of a draft: T tokens of documents, each a row of the token table up to the end of a row slice."""

    rows: list[int]
    """Row of the token table of each document, for messages."""
    lengths: list[int]
    """Tokens of each document."""
    token_ids: Tensor
    """int64 [T]."""
    loss_mask: Tensor
    """bool [T], true at supervised tokens."""
    hidden_states: Tensor
    """[T, A, H], stored dtype: the target's hidden states of the A layers that the draft reads, in order."""
    last_hidden_states: Tensor
    """[U, H], stored dtype: the last layer's output before the final norm, at the positions where it is kept."""
    last_index: Tensor
    """int64 [T]: index into `last_hidden_states` of each position where it is kept; undefined at the others."""
    anchor_mask: Tensor | None = None
    """bool [T], true at the anchors that were drawn for the larger batch of which this one is a part; None lets the
    draft draw them."""

    def documents(self) -> list[tuple[int, int]]:
        """Return (first token, length) of each document."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return list(zip(starts[:-1], self.lengths, strict=True))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return for each token the first position of its document and the first after it, int64 [T] each."""
        # With numpy: on a CPU, torch wakes its threads for this, which takes two to three times as long.
        starts, lengths = (np.array(column, dtype=np.int64) for column in zip(*self.documents(), strict=True))
        arrays = [np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)]
        first, end = (torch.from_numpy(array).to(self.token_ids.device) for array in arrays)
        return first, end
