"""Whether a training has lost what it had learnt: its loss is a number, but far above what it was, and stays there.

Single steps do not tell. Where a step trains on a few dozen tokens, one has several times the loss of the next. So what
is compared is the median of the last steps with the lowest that it has been, the first step's own loss included. Losses
are those of one prediction: they depend neither on how many a step has, nor on how many steps are unrolled. In 18
trainings, the mean of ten steps never was above 2.2 times its lowest median.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

LAST = 32
"""Steps that the median is taken of; half of them have to be too high."""
NOISE = 1.0
"""Nothing below counts as low, in nats a prediction: what is known by heart may jump by any factor."""


@dataclass(slots=True)
class Watch:
    """What the next verdict depends on; a part of the state that a killed run goes on from."""

    last: list[float] = field(default_factory=list)
    """Losses of the last steps."""
    lowest: float | None = None
    """What their median was at its lowest; None before there was one."""

    def exploded(self, loss: float | None, times: float) -> bool:
        """Count a step; whether the loss is now more than `times` what it was.

        Args:
            loss: of a prediction, in nats; None of a step that made none, which then counts as the one before it.
            times: above 1.
        """
        if loss is None and not self.last:
            return False
        self.last = [*self.last[1 - LAST :], self.last[-1] if loss is None else loss]
        self.lowest = self.now if self.lowest is None else min(self.lowest, self.now)
        return len(self.last) == LAST and self.now > self.limit(times)

    @property
    def now(self) -> float:
        """The median of the last steps."""
        return statistics.median(self.last)

    def limit(self, times: float) -> float:
        """The loss from which on it is too high."""
        return times * max(self.lowest or 0.0, NOISE)

    def ago(self, times: float) -> int:
        """How many steps before the last one the loss first was too high."""
        return len(self.last) - 1 - next(i for i, loss in enumerate(self.last) if loss > self.limit(times))
