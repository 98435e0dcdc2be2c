"""When a loss that is a number is too high for too long, and when it is not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from speculators.training.watch import WINDOW_STEPS, LossWatch


def stops_at(losses: Sequence[float | None]) -> int | None:
    """The step at which the training stops."""
    watch = LossWatch()
    return next((step for step, loss in enumerate(losses) if watch.has_diverged(loss, 5.0)), None)


LEARNING = [10.0 - 0.05 * step for step in range(160)]


def test_a_loss_that_stays_high_stops_the_training() -> None:
    # The lowest median is that of steps 128 to 159, 2.825; the 17th of 32 steps above 14.125 makes theirs too high.
    assert stops_at(LEARNING + [15.0] * WINDOW_STEPS) == 160 + 16
    assert stops_at(LEARNING + [14.0] * 400) is None


def test_some_steps_however_high_do_not_stop_it() -> None:
    assert stops_at(LEARNING + ([1e6] * 15 + [2.0] * 17) * 20) is None


def test_steps_that_differ_several_fold_do_not_stop_it() -> None:
    draw = random.Random(0)
    assert stops_at([3.0 * draw.lognormvariate(0.0, 0.7) for _ in range(20_000)]) is None


def test_a_loss_that_grows_little_by_little_stops_it_in_the_end() -> None:
    assert stops_at([2.0 * 1.01**step for step in range(400)]) == pytest.approx(178, abs=5)  # 1.01^162 = 5


def test_a_loss_that_explodes_before_anything_is_learnt_stops_it() -> None:
    assert stops_at([10.0, *(100.0 - step for step in range(WINDOW_STEPS))]) == WINDOW_STEPS - 1


def test_what_is_known_by_heart_may_jump() -> None:
    assert stops_at([0.001] * 100 + [4.9] * 100) is None
    assert stops_at([0.001] * 100 + [5.1] * 100) is not None


def test_steps_without_a_prediction_say_nothing() -> None:
    assert stops_at([None] * 100) is None
    assert stops_at([None, *[2.0] * 80, *[None] * 100]) is None


def test_the_step_in_which_it_rose_is_told() -> None:
    watch = LossWatch()
    losses = [2.0] * 70 + [30.0] + [2.0] * 2 + [25.0] * WINDOW_STEPS
    stopped = next(step for step, loss in enumerate(losses) if watch.has_diverged(loss, 5.0))
    assert stopped - watch.steps_since_rise(5.0) == 70
    assert watch.lowest == 2.0
