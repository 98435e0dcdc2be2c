"""Describes how a process ended, and adds to a failure the end of its log and the command that tries again."""

from __future__ import annotations

import shlex
import signal
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from speculators.errors import RunError

TAIL_LINES = 40
"""Lines of a failed stage's log that an error message shows."""
ATTEMPT = "--- "
"""Prefix of the log line that opens an attempt."""
_LIKELY = {
    signal.SIGKILL: "probably out of memory",
    signal.SIGSEGV: "a native library crashed",
    signal.SIGABRT: "a native library gave up",
    signal.SIGBUS: "probably no space in /dev/shm or on the disk",
    signal.SIGILL: "a native library was built for another CPU",
    signal.SIGTERM: "something outside asked it to stop",
    signal.SIGINT: "something outside asked it to stop",
    signal.SIGHUP: "its terminal was closed",
    signal.SIGXCPU: "it used up its share of CPU time",
}
_CHOICES = ("only", "until", "from", "force")
"""Options of the command line that select stages."""


class TransientError(Exception):
    """A failure that another attempt may not repeat: death by a signal, a lost server, a time limit."""

    def __init__(self, failure: RunError) -> None:
        super().__init__(failure)
        self.failure = failure


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process, from its exit code (-N or 128 + N); None if it ended by itself."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number) if number > 0 else None
    except ValueError:
        return None


def describe_exit(code: int) -> str:
    """An exit code as text: `was killed by SIGKILL: probably out of memory`, `ended with exit code 3`."""
    number = signal_of(code)
    if number is None:
        return f"ended with exit code {code}"
    likely = f": {_LIKELY[number]}" if number in _LIKELY else ""
    return f"was killed by {number.name}{likely}"


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; [] if the log does not exist."""
    try:
        with log.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=lines)]
    except OSError:
        return []


def tail_before(log: Path, message: str) -> list[str]:
    """The last lines of a log up to the worker's own `error: MESSAGE`, which need not be printed twice; [] if empty."""
    lines = tail(log)
    error_line = f"error: {message}".partition("\n")[0]
    if error_line in lines:
        del lines[len(lines) - 1 - lines[::-1].index(error_line) :]
    return lines if any(line and not line.startswith(ATTEMPT) for line in lines) else []


def retry_command(argv: Sequence[str], stage: str) -> str:
    """The command that runs only this stage again; empty for a sweep, whose overrides describe several runs."""
    if any(argument.startswith("-") for argument in argv):
        return ""
    overrides = [argument for argument in argv if argument.partition("=")[0] not in _CHOICES]
    return shlex.join(["speculators-run", *overrides, f"only={stage}"])


def hint_with_log(hint: str, log: Path, command: str) -> str:
    """A hint followed by the log's path, if it exists, and the command that tries again, if there is one."""
    lines = [f"log:    {log}"] if log.exists() else []
    lines += [f"again:  {command}"] if command else []
    return "\n".join([hint, "", *lines] if lines else [hint])
