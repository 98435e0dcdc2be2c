"""Answers that the target did not finish well: cut, looping or empty; and what becomes of them by the recipe's rules.

An answer is judged by its token ids. Its text is not the answer: the server's parsers move thoughts and calls out of
it, until nothing is left.

A rule is one of `choices.OnFault`. `keep` changes nothing. `mask` keeps the answer as context of the following ones,
and supervises no token of a cut or empty answer, and of a looping one those before the repetition. `end` ends the
conversation: a cut answer is its last and is supervised as it is, since its tokens are the target's and only what would
follow it is not; a looping one is its last and is supervised up to the repetition; an empty one is left out. `drop`
leaves the whole conversation out. Of an answer with several faults, the strictest rule counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from speculators.config.choices import OnFault
from speculators.config.schema import Regenerate

CUT, LOOPING, EMPTY = "cut", "looping", "empty"
MIN_CYCLES = 3
"""Times that a cycle stands at the end of an answer that loops: lists and verses repeat something once."""
MIN_REPEATED = 32
"""Tokens that repeat those of one period before, in an answer that loops: `ha ha ha`, a rule of dashes and the zeros of
a table have fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The faults of an answer, and what becomes of it."""

    faults: tuple[str, ...]
    supervised: tuple[int, int] | None
    """Range of the answer's tokens that are supervised; None: all."""
    ended_by: str
    """The fault whose rule ends the conversation or leaves it out; empty if it continues."""
    drops: bool
    """Whether the whole conversation is left out."""


def judge(answer_ids: Sequence[int], finish_reason: str, end_tokens: Collection[int], config: Regenerate) -> Judgement:
    """Find the faults of an answer. `end_tokens` are the ids with which the target ends its answers."""
    rules = {CUT: config.on_cut, LOOPING: config.on_loop, EMPTY: config.on_empty}
    last = len(answer_ids)
    while last and answer_ids[last - 1] in end_tokens:
        last -= 1
    repetition = repetition_start(answer_ids[:last])
    present = {CUT: finish_reason == "length", LOOPING: repetition is not None, EMPTY: not last}
    faults = tuple(name for name, is_present in present.items() if is_present)
    supervised = None
    if any(name in faults and rules[name] is OnFault.mask for name in (CUT, EMPTY)):
        supervised = (0, 0)
    elif repetition is not None and config.on_loop in (OnFault.mask, OnFault.end):
        supervised = (0, repetition)
    dropping, ending = ([name for name in faults if rules[name] is rule] for rule in (OnFault.drop, OnFault.end))
    return Judgement(
        faults=faults,
        supervised=supervised,
        ended_by=next(iter([*dropping, *ending]), ""),
        drops=bool(dropping),
    )


def repetition_start(token_ids: Sequence[int]) -> int | None:
    """Index from which the tokens repeat, to the end, those of one period before; None if they do not end in a loop.

    The first cycle of a loop is not part of the repetition. The period is the shortest for which the loop has
    `MIN_CYCLES` cycles and `MIN_REPEATED` repeated tokens. Takes linear time: how far the reversed sequence agrees with
    itself shifted by each period is its Z function.
    """
    backwards = token_ids[::-1]
    count = len(backwards)
    agreeing = [0] * count
    left = right = 0
    for period in range(1, count):
        length = min(right - period, agreeing[period - left]) if period < right else 0
        while period + length < count and backwards[length] == backwards[period + length]:
            length += 1
        if period + length > right:
            left, right = period, period + length
        agreeing[period] = length
        if length >= MIN_REPEATED and length >= (MIN_CYCLES - 1) * period:
            return count - length
    return None
