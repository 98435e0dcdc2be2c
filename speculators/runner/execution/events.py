"""The events of a run, in order: appended to `events.jsonl`, one JSON object a line, and passed to listeners.

run.started {recipe, run, words, process}      stage.decided {node, state, reason, key}
service.starting|ready|stopped {service, mode, log}
stage.started {node, log, phase, phases, attempt}
stage.progress {node, done, total, unit, note}
stage.retried {node, attempt, message, seconds}          that attempt failed; the next one starts after `seconds`
stage.finished {node, seconds, record, key}    stage.failed {node, message}
run.stopping {seconds}                         a signal arrived; stages have `seconds` to stop
run.finished {status, seconds}
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


class Events:
    """Writes each event to the file, line-buffered, before it calls the listeners."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._file = path.open("a", buffering=1)
        self._listeners = tuple(listeners)

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event. `stage.progress` goes to the listeners only: it is of no use after the run."""
        entry = {"event": event, "time": now(), **fields}
        if event != "stage.progress":
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(entry)

    def close(self) -> None:
        """Close the file; a later `emit` is an error."""
        self._file.close()


def now() -> str:
    """The current time in UTC, to the millisecond, in the format of every record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
