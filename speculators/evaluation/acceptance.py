"""Counts what a server would accept of a draft, from one pass of the draft over known answers.

A server that decodes greedily verifies a proposal, keeps the tokens that the target agrees with, adds the target's own
next token, and proposes again after it (speculative decoding; Leviathan et al. 2023, arXiv:2211.17192). The answer is
the target's whatever the draft proposes. So given the answer, and whether the draft is right at each position, the
server's proposals follow: the first one starts at the answer's first token, each next one after the accepted tokens
and the bonus token. Positions in between start no proposal and do not count. They are the easier ones, so a mean over
all positions would be higher than what a server reaches.

Checked against vLLM's own counters on the same prompts (docs/log.md).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class AcceptanceCounts:
    """Number of proposals, and of those that were accepted up to each position."""

    proposals: int
    accepted: list[int]
    """By position of a proposal: proposals that were accepted up to and including it."""

    @classmethod
    def empty(cls, positions: int) -> AcceptanceCounts:
        """Start counting proposals of `positions` tokens."""
        return cls(0, [0] * positions)

    def add(self, positions: Sequence[int], accepted: Tensor) -> None:
        """Count the proposals that a server would make in a packed batch.

        Args:
            positions: R possible starts of a proposal, ascending; consecutive within an answer, with a gap between two
                answers.
            accepted: bool [K, R], true where a proposal from there is accepted up to and including its k-th token.
        """
        lengths = accepted.sum(0).tolist()
        rows = accepted.T.tolist()
        index = 0
        while index < len(positions):
            self.proposals += 1
            for k, is_accepted in enumerate(rows[index]):
                self.accepted[k] += is_accepted
            index = bisect.bisect_left(positions, positions[index] + lengths[index] + 1, lo=index + 1)

    def join(self, other: AcceptanceCounts) -> None:
        """Add the counts of `other`."""
        self.proposals += other.proposals
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    def metrics(self) -> dict[str, float]:
        """`acceptance_length`, tokens per proposal with the bonus token, and from position 1 on `acceptance_pos_i`, the
        share of proposals that are accepted up to and including position i."""
        shares = [count / max(self.proposals, 1) for count in self.accepted]
        positions = {f"acceptance_pos_{i}": share for i, share in enumerate(shares, 1)}
        return {"acceptance_length": 1.0 + sum(shares)} | positions
