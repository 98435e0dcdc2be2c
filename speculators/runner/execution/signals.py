"""Signal handling of a run: the first SIGINT or SIGTERM stops it in order, the second kills it, SIGCHLD wakes it."""

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
    """Handles SIGINT and SIGTERM: the first makes `check` raise, the second calls `kill`, the third exits at once."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._received: int | None = None

    def __enter__(self) -> Signals:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self._child_handler = signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wakeup, writing = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(writing, False)
        self._pipe = (self._wakeup, writing)
        self._previous_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in (*self._handlers.items(), (signal.SIGCHLD, self._child_handler)):
            signal.signal(number, handler)
        for descriptor in self._pipe:
            os.close(descriptor)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until a signal arrives, SIGCHLD included."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 4096)

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived; called between two steps, so that none is cut off halfway."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
            return
        for other in self._handlers:
            signal.signal(other, lambda number, _: os._exit(128 + number))
        self._kill()
        # Everything is killed; unwinding restores the terminal.
        raise Interrupted(number)
