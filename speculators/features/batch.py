"""What a draft is given: documents, their tokens, and the target's hidden states of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Whole documents, one after the other."""

    rows: list[int]
    """Rows of the token table, for messages."""
    lengths: list[int]
    """Tokens of each document."""
    token_ids: Tensor
    """int64 [T]"""
    loss_mask: Tensor
    """bool [T]: the token is one that the target said."""
    hidden_states: Tensor
    """[T, A, H], stored dtype: the target's states, of the draft's layers in order."""
    last_hidden_states: Tensor
    """[U, H], stored dtype: the last layer's output, at the places where a prediction may ask for it."""
    last_index: Tensor
    """int64 [T]: of each of these places, the row of `last`; of others anything."""
    anchor_mask: Tensor | None = None
    """bool [T]: where a draft that draws places may train from, if they were drawn for a larger pack that this one is
    a part of; the draft draws them itself if None."""

    def documents(self) -> list[tuple[int, int]]:
        """(first token, length) of each document."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return list(zip(starts[:-1], self.lengths, strict=True))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """For each token, the first place of its document and the first after it, int64 [T]."""
        # By numpy: on a CPU, torch wakes its threads for this, which takes two to three times as long.
        starts, lengths = (np.array(each, dtype=np.int64) for each in zip(*self.documents(), strict=True))
        found = [np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)]
        first, past = (torch.from_numpy(each).to(self.token_ids.device) for each in found)
        return first, past
