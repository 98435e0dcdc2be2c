"""Answers that are cut, loop or are empty: found by token ids, and handled by the recipe's rules."""

from __future__ import annotations

import random
import time

import pytest

from speculators.config.choices import OnFault
from speculators.config.schema import Regenerate
from speculators.data.answer_faults import judge, repetition_start
from speculators.data.template import ChatTurn, merge_turns

END = 2
WORDS = list(range(10, 30))


def slow_start(ids: list[int]) -> int | None:
    """The definition, in quadratic time."""
    for period in range(1, len(ids)):
        length = 0
        while period + length < len(ids) and ids[-1 - length] == ids[-1 - length - period]:
            length += 1
        if length >= 32 and length >= 2 * period:
            return len(ids) - length
    return None


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([*WORDS, *[5] * 33], 21),  # the first 5 is the cycle, 32 repeat it
        ([*WORDS, *[5] * 32], None),
        ([*WORDS, *[1, 2, 3] * 12], 23),
        ([*WORDS, *[1, 2, 3] * 12, 1, 2], 23),  # in the middle of a cycle
        ([*range(100, 140)] * 3, 40),
        ([*range(100, 140)] * 2, None),  # two cycles: something is said twice
        ([*[5] * 60, 6], None),
        ([], None),
        ([7], None),
    ],
)
def test_a_loop_is_three_cycles_and_32_repeated_tokens_at_the_end(ids: list[int], start: int | None) -> None:
    assert repetition_start(ids) == slow_start(ids) == start


def test_loops_are_those_of_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(300):
        cycle = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        ids = [rng.randrange(3) for _ in range(rng.randrange(30))] + (cycle * 60)[: rng.randrange(120)]
        assert repetition_start(ids) == slow_start(ids)


def test_loops_are_found_in_linear_time() -> None:
    """What a quadratic search takes longest for: long agreement at every period, and no loop."""
    ids = ([5] * 30 + [6]) * 2 + [7, *[5] * 30] * 3000
    start = time.process_time()
    repetition_start([*ids[:-40], 8])
    assert time.process_time() - start < 2


LOOP = [*WORDS, *[5] * 40]
CASES = {
    "keep": ((LOOP, "length"), {}, (("cut", "looping"), None, "", False)),
    "mask a loop": ((LOOP, "length"), {"on_loop": "mask"}, (("cut", "looping"), (0, 21), "", False)),
    "end after a cut answer, and mask its loop": (
        (LOOP, "length"), {"on_loop": "mask", "on_cut": "end"}, (("cut", "looping"), (0, 21), "cut", False),
    ),
    "mask a cut answer": (
        (LOOP, "length"), {"on_loop": "mask", "on_cut": "mask"}, (("cut", "looping"), (0, 0), "", False),
    ),
    "end with a loop": ((LOOP, "stop"), {"on_loop": "end"}, (("looping",), (0, 21), "looping", False)),
    "a loop before the end token": (([*LOOP, END], "stop"), {"on_loop": "mask"}, (("looping",), (0, 21), "", False)),
    "drop is the strictest": (
        (LOOP, "length"), {"on_loop": "drop", "on_cut": "end"}, (("cut", "looping"), None, "looping", True),
    ),
    "end a cut answer": (([*WORDS], "length"), {"on_cut": "end"}, (("cut",), None, "cut", False)),
    "nothing wrong": (([*WORDS, END], "stop"), {"on_cut": "drop", "on_loop": "drop"}, ((), None, "", False)),
    "empty ends by default": (([END], "stop"), {}, (("empty",), None, "empty", False)),
    "no token at all": (([], "stop"), {"on_empty": "drop"}, (("empty",), None, "empty", True)),
    "an empty answer is context": (([END], "stop"), {"on_empty": "mask"}, (("empty",), (0, 0), "", False)),
    "a thought is not empty": (([40, 41, END], "stop"), {"on_empty": "drop"}, ((), None, "", False)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_judged_by_its_tokens_and_by_the_rules(case: str) -> None:
    (ids, reason), rules, (faults, supervised, ended_by, drops) = CASES[case]
    config = Regenerate(**{name: OnFault[rule] for name, rule in rules.items()})  # type: ignore[arg-type]
    found = judge(ids, reason, {END}, config)
    assert (found.faults, found.supervised, found.ended_by, found.drops) == (faults, supervised, ended_by, drops)


def test_tokens_outside_the_supervised_range_are_context() -> None:
    turns = [
        ChatTurn(prompt_ids=[1], answer_ids=[2, 3, 4], supervised=(0, 1)),
        ChatTurn(prompt_ids=[1, 2, 3, 4, 5], answer_ids=[6, 7], supervised=(0, 0)),
        ChatTurn(prompt_ids=[9], answer_ids=[8, 8], supervised=(1, 2)),
    ]
    first, second = merge_turns(turns)
    assert (first.input_ids, first.loss_mask) == ([1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 0, 0, 0])
    assert (second.input_ids, second.loss_mask) == ([9, 8, 8], [0, 0, 1])
