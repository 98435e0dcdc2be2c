"""Propose and verify, without an engine: what a server would accept of a draft, from one pass over known answers.

A server that decodes greedily proposes, keeps what the target agrees with, adds the target's own next token, and goes
on behind it (Leviathan et al. 2023, arXiv:2211.17192). The answer is the target's whatever the draft says, so given
the answer and whether the draft is right at each of its places, the proposals that the server would make are a walk:
from the answer's first token, each time on by what was accepted and one. Places in between start no proposal and do
not count, and they are the easier ones: the mean over all places is higher than what is served.

Checked against vLLM's own counters on the same prompts (docs/log.md).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class AcceptanceCounts:
    """Proposals that were made, and how many of them were accepted up to each position."""

    proposals: int
    accepted: list[int]
    """For position k of a proposal: how many were accepted up to and with it."""

    @classmethod
    def empty(cls, positions: int) -> AcceptanceCounts:
        """No proposal yet, each to be of `positions` tokens."""
        return cls(0, [0] * positions)

    def add(self, places: Sequence[int], accepted: Tensor) -> None:
        """Walk through a pack.

        Args:
            places: ascending, where a proposal could start; those of one answer follow each other without a gap, and
                between two answers there is one.
            accepted: bool [K, R], for each of them and each position: accepted up to and with it.
        """
        lengths = accepted.sum(0).tolist()
        rows = accepted.T.tolist()
        at = 0
        while at < len(places):
            self.proposals += 1
            for position, yes in enumerate(rows[at]):
                self.accepted[position] += yes
            at = bisect.bisect_left(places, places[at] + lengths[at] + 1, lo=at + 1)

    def join(self, other: AcceptanceCounts) -> None:
        """Count the proposals of `other` too."""
        self.proposals += other.proposals
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    def metrics(self) -> dict[str, float]:
        """`acceptance_length`: tokens a proposal, the target's own one included; `accepted_k`: share of proposals."""
        shares = [count / max(self.proposals, 1) for count in self.accepted]
        return {"acceptance_length": 1.0 + sum(shares)} | {f"accepted_{k}": share for k, share in enumerate(shares)}
