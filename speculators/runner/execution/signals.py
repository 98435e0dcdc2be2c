"""Signals of a run: the first asks it to stop in order, the second ends it, and a child that has ended wakes it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


class Signals:
    """The first SIGINT or SIGTERM is noted, for `check` to raise; a second one kills what runs, a third one us."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._asked: int | None = None

    def __enter__(self) -> Signals:
        self._stops = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        self._child = signal.signal(signal.SIGCHLD, lambda *_: None)
        self._news, writing = os.pipe()
        os.set_blocking(self._news, False)
        os.set_blocking(writing, False)
        self._ends = (self._news, writing)
        self._wakes = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakes)
        for number, handler in (*self._stops.items(), (signal.SIGCHLD, self._child)):
            signal.signal(number, handler)
        for end in self._ends:
            os.close(end)

    def wait(self, seconds: float) -> None:
        """So long, or until a signal comes: that of a child's end too."""
        if select.select([self._news], [], [], seconds)[0]:
            os.read(self._news, 4096)

    def check(self) -> None:
        """Raises Interrupted after the first signal, between two steps and not in the middle of one."""
        if self._asked is not None:
            raise Interrupted(self._asked)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = number
            return
        for other in self._stops:
            signal.signal(other, lambda number, _: os._exit(128 + number))
        self._kill()
        # Nothing is left to wait for; unwinding leaves the terminal as it was.
        raise Interrupted(number)
