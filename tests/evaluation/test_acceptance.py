"""Counting the proposals that a server would make in an answer."""

from __future__ import annotations

import random

import pytest
import torch

from speculators.evaluation.acceptance import AcceptanceCounts


def grid(*lengths: int, positions: int = 3) -> torch.Tensor:
    """Accepted lengths as a table [K, R]."""
    return torch.tensor([[k < length for length in lengths] for k in range(positions)])


def test_a_draft_that_is_never_right_makes_a_proposal_a_token() -> None:
    walk = AcceptanceCounts.empty(3)
    walk.add([4, 5, 6, 7], grid(0, 0, 0, 0))
    assert walk == AcceptanceCounts(4, [0, 0, 0])
    assert walk.metrics()["acceptance_length"] == 1.0


def test_places_inside_an_accepted_proposal_start_none() -> None:
    walk = AcceptanceCounts.empty(3)
    #         4: two, so on to 7;      7: one, so on to 9;  9: none
    walk.add([4, 5, 6, 7, 8, 9], grid(2, 3, 3, 1, 3, 0))
    assert walk == AcceptanceCounts(3, [2, 1, 0])
    assert walk.metrics() == pytest.approx(
        {"acceptance_length": 2.0, "acceptance_pos_1": 2 / 3, "acceptance_pos_2": 1 / 3, "acceptance_pos_3": 0.0}
    )


def test_a_proposal_at_the_end_of_an_answer_does_not_reach_into_the_next() -> None:
    walk = AcceptanceCounts.empty(3)
    walk.add([3, 4, 9, 10], grid(0, 1, 0, 0))  # 4 + 1 + 1 is behind the first answer, 9 begins the second
    assert walk == AcceptanceCounts(4, [1, 0, 0])


def test_what_is_walked_is_what_a_propose_and_verify_loop_counts() -> None:
    draw = random.Random(3)
    answer = [draw.randrange(4) for _ in range(300)]
    guesses = [[draw.randrange(4) for _ in range(3)] for _ in answer]  # what would be proposed after each token
    proposals, accepted, at = 0, [0, 0, 0], 0
    while at + 1 < len(answer):
        proposals += 1
        run = 0
        while run < 3 and at + 1 + run < len(answer) and guesses[at][run] == answer[at + 1 + run]:
            accepted[run] += 1
            run += 1
        at += run + 1
    places = list(range(1, len(answer)))
    table = torch.tensor(
        [
            [all(p + j < len(answer) and guesses[p - 1][j] == answer[p + j] for j in range(k + 1)) for p in places]
            for k in range(3)
        ]
    )
    walk = AcceptanceCounts.empty(3)
    walk.add(places, table)
    assert walk == AcceptanceCounts(proposals, accepted)
    assert accepted[2] > 0
