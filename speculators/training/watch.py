"""Detect a training that has diverged: its loss is finite, but stays far above what it was.

Single losses vary too much to tell: where a step trains on a few dozen tokens, one can have several times the loss of
the next. So the median of the last steps is compared with its lowest value so far, the first step's loss included.
Losses are per prediction, so that they depend neither on the number of predictions nor on the number of unrolled steps.
In 18 trainings, the mean of ten steps was never above 2.2 times the lowest median before it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

WINDOW_STEPS = 32
"""Steps that the median is taken over; half of them have to be too high."""
MIN_LOSS = 1.0
"""Smallest loss that a rise is measured from, in nats per prediction: a memorized loss may rise by any factor."""


@dataclass(slots=True)
class LossWatch:
    """The losses that the next verdict depends on; part of the training checkpoint."""

    losses: list[float] = field(default_factory=list)
    """Losses of the last steps, in nats per prediction."""
    lowest: float | None = None
    """Lowest median so far; None before the first step."""

    def has_diverged(self, loss: float | None, factor: float) -> bool:
        """Add a step's loss, and return whether the median is now more than `factor` times its lowest value.

        Args:
            loss: in nats per prediction; None for a step without predictions, which counts as the one before it.
            factor: above 1.
        """
        if loss is None and not self.losses:
            return False
        self.losses = [*self.losses[1 - WINDOW_STEPS :], self.losses[-1] if loss is None else loss]
        self.lowest = self.median if self.lowest is None else min(self.lowest, self.median)
        return len(self.losses) == WINDOW_STEPS and self.median > self.limit(factor)

    @property
    def median(self) -> float:
        """Median of the last steps' losses."""
        return statistics.median(self.losses)

    def limit(self, factor: float) -> float:
        """The loss above which a step is too high."""
        return factor * max(self.lowest or 0.0, MIN_LOSS)

    def steps_since_rise(self, factor: float) -> int:
        """How many steps before the last one the loss first was too high."""
        rise = next(i for i, loss in enumerate(self.losses) if loss > self.limit(factor))
        return len(self.losses) - 1 - rise
