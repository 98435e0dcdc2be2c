"""What happened in a run, in order: one JSON object a line in `events.jsonl`, and the same to whoever listens.

run.started {recipe, run, words, process}      stage.decided {node, state, reason, key}
service.starting|ready|stopped {service, mode, log}
stage.started {node, log, phase, phases, attempt}
stage.progress {node, done, total, unit, note}
stage.retried {node, attempt, message, seconds}          that attempt failed, the next starts after so many seconds
stage.finished {node, seconds, record, key}    stage.failed {node, message}
run.stopping {seconds}                         a signal came, and stages have so long to end
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
    """Writes each event through to the file before the listeners hear of it."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._file = path.open("a", buffering=1)
        self._listeners = tuple(listeners)

    def emit(self, event: str, **fields: Any) -> None:
        """Progress is for who looks now; everything else is kept."""
        entry = {"event": event, "time": now(), **fields}
        if event != "stage.progress":
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(entry)

    def close(self) -> None:
        """Close the file; events after this are an error."""
        self._file.close()


def now() -> str:
    """UTC, to the millisecond, as it stands in every record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
