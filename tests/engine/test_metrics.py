from __future__ import annotations

import pytest

from speculators.engine.metrics import DraftCounters, parse_counters

PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 0.0
vllm:num_requests_running{engine="0",model_name="m"} 4.0
"""


def test_the_counters_are_read_off_the_page() -> None:
    assert parse_counters(PAGE) == DraftCounters(
        drafts=10, proposed=30, accepted=9, accepted_per_position={1: 6, 2: 3, 3: 0}
    )


def test_a_server_without_speculation_counts_nothing() -> None:
    assert parse_counters("vllm:num_requests_running 4.0\n") == DraftCounters()


def test_the_engines_of_one_server_are_summed() -> None:
    both = parse_counters(PAGE + PAGE.replace('engine="0"', 'engine="1"'))
    assert both == DraftCounters(drafts=20, proposed=60, accepted=18, accepted_per_position={1: 12, 2: 6, 3: 0})


def test_acceptance_is_computed_from_the_difference_of_two_readings() -> None:
    earlier = DraftCounters(drafts=4, proposed=12, accepted=4, accepted_per_position={1: 2, 2: 2, 3: 0})
    counted = parse_counters(PAGE) - earlier
    assert counted == DraftCounters(drafts=6, proposed=18, accepted=5, accepted_per_position={1: 4, 2: 1, 3: 0})
    assert counted.acceptance_length() == pytest.approx(1 + 5 / 6)
    assert counted.per_position_acceptance(3) == pytest.approx([4 / 6, 1 / 6, 0])
    assert counted.conditional_acceptance(3) == [pytest.approx(4 / 6), pytest.approx(1 / 4), 0.0]


def test_a_position_that_is_never_reached_has_no_conditional_acceptance() -> None:
    counted = DraftCounters(drafts=5, proposed=15, accepted=0, accepted_per_position={1: 0, 2: 0, 3: 0})
    assert counted.acceptance_length() == 1.0
    assert counted.conditional_acceptance(3) == [0.0, None, None]
