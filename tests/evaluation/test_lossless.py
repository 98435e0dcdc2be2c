from __future__ import annotations

import pytest

from speculators.evaluation.lossless import TOLERANCES, common_prefix, verdict

TOLERANCE = TOLERANCES["float32"]


def test_the_common_prefix_ends_at_the_first_difference_or_the_shorter_end() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([5, 6], [5, 6]) == 2


def test_two_tokens_as_likely_as_each_other_are_a_tie_with_their_gap() -> None:
    result, gap = verdict({7: -0.70, 9: -0.7004, 1: -5.0}, baseline=7, speculative=9, tolerance=TOLERANCE)
    assert result == "tie"
    assert gap == pytest.approx(0.0004)


def test_a_token_that_is_less_likely_by_more_than_rounding_is_a_fault() -> None:
    result, gap = verdict({7: -0.70, 9: -0.72}, baseline=7, speculative=9, tolerance=TOLERANCE)
    assert result == "fault"
    assert gap == pytest.approx(0.02)
    assert gap > TOLERANCE


def test_a_token_that_is_not_among_the_top_logprobs_is_a_fault() -> None:
    assert verdict({7: -0.1, 8: -3.0}, baseline=7, speculative=9, tolerance=TOLERANCE) == ("fault", None)


def test_an_answer_that_ends_too_early_is_a_fault() -> None:
    assert verdict({7: -0.1, 8: -0.1}, baseline=7, speculative=None, tolerance=TOLERANCE) == ("fault", None)
