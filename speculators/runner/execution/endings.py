"""How a process ended, in words, and what somebody needs who wants to know more: its log, and how to try again."""

from __future__ import annotations

import shlex
import signal
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from speculators.errors import RunError

TAIL_LINES = 40
"""How much of the log of a stage that failed is shown."""
ATTEMPT = "--- "
"""What the line begins with that opens an attempt in a log."""
_LIKELY = {
    signal.SIGKILL: "probably out of memory",
    signal.SIGSEGV: "a native library crashed",
    signal.SIGABRT: "a native library gave up",
    signal.SIGBUS: "probably no room in /dev/shm or on the disk",
    signal.SIGILL: "a native library was built for another CPU",
    signal.SIGTERM: "something outside asked it to stop",
    signal.SIGINT: "something outside asked it to stop",
    signal.SIGHUP: "its terminal was closed",
    signal.SIGXCPU: "it used up its share of CPU time",
}
_CHOICES = ("only", "until", "from", "force")
"""Words of the command line that choose stages."""


class PassingError(Exception):
    """A failure that the next attempt may not meet: a death by signal, a lost server, a time limit."""

    def __init__(self, failure: RunError) -> None:
        super().__init__(failure)
        self.failure = failure


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process of this exit code, written -N or 128 + N; None if none did."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number) if number > 0 else None
    except ValueError:
        return None


def in_words(code: int) -> str:
    """`was killed by SIGKILL: probably out of memory`, `ended with exit code 3`."""
    number = signal_of(code)
    if number is None:
        return f"ended with exit code {code}"
    likely = f": {_LIKELY[number]}" if number in _LIKELY else ""
    return f"was killed by {number.name}{likely}"


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with log.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=lines)]
    except OSError:
        return []


def tail_before(log: Path, said: str) -> list[str]:
    """The same up to where the worker itself has written the failure that `said` tells, if anything stands there."""
    lines = tail(log)
    own = f"error: {said}".partition("\n")[0]
    if own in lines:
        del lines[len(lines) - 1 - lines[::-1].index(own) :]
    return lines if any(line and not line.startswith(ATTEMPT) for line in lines) else []


def again(words: Sequence[str], stage: str) -> str:
    """The command that runs only this stage; empty for a sweep, whose words are those of several runs."""
    if any(word.startswith("-") for word in words):
        return ""
    kept = [word for word in words if word.partition("=")[0] not in _CHOICES]
    return shlex.join(["speculators-run", *kept, f"only={stage}"])


def where_to_look(hint: str, log: Path, command: str) -> str:
    """A hint, the log's path, and the command to try again."""
    lines = [f"log:    {log}"] if log.exists() else []
    lines += [f"again:  {command}"] if command else []
    return "\n".join([hint, "", *lines] if lines else [hint])
