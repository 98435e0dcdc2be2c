"""The events of a run, in order: appended to `events.jsonl`, one JSON object a line, and passed to listeners.

run.started {recipe, run, words, process}      stage.decided {node, state, reason, key}
run.estimated {seconds}                        expected seconds of each stage that runs, by node; null: unknown
service.starting|ready|stopped {service, mode, log}
stage.started {node, log, phase, phases, attempt}
stage.progress {node, done, total, unit, note}
stage.retried {node, attempt, message, seconds}          that attempt failed; the next one starts after `seconds`
stage.finished {node, seconds, record, key}    stage.failed {node, message}
run.stopping {seconds}                         a signal arrived; stages have `seconds` to stop
run.finished {status, seconds}
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


class Events:
    """Writes each event to the file, line-buffered, before it calls the listeners.

    Raises:
        OSError: the disk is full; later events go to the listeners only.
    """

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._file = path.open("a", buffering=1)
        self._listeners = tuple(listeners)
        self._disk_full = False

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event. `stage.progress` goes to the listeners only: it is of no use after the run."""
        entry = {"event": event, "time": now(), **fields}
        if event != "stage.progress" and not self._disk_full:
            self._write(json.dumps(entry, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(entry)

    def _write(self, line: str) -> None:
        """Write a line. Only the first failure is raised: stopping the servers of the run emits more events."""
        try:
            self._file.write(line)
        except OSError as error:
            self._disk_full = True
            with contextlib.suppress(OSError):  # writes the rest of the buffer again
                self._file.close()
            error.filename = self._file.name
            raise

    def close(self) -> None:
        """Close the file; a later `emit` is an error."""
        self._file.close()


def now() -> str:
    """The current time in UTC, to the millisecond, in the format of every record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
