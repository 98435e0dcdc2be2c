"""Who holds a job: how a process on any machine learns that the one it works for is no more.

The holder rewrites one small file every `BEAT` seconds, with who it is, a count that moves while it lives, and what
it wishes. The far end reads it. Where both are on one machine, the holder's pid and start time decide, at once;
elsewhere it is taken for dead after `LEASE` seconds without news. No two clocks are compared. The file is made
before the job is and then only written in place: a network file system may hide a new name for a minute, but shows
new content to whoever opens the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from speculators.runner.servers import guard

BEAT = 2.0
"""Seconds between two signs of life."""
LEASE = 60.0
"""Seconds without news after which a holder on another machine is taken for dead."""
SIZE = 512
"""Bytes of a note, padded with blanks, so that it is written at once and needs no new room on a full disk."""


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a small JSON object in place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, json.dumps(note).ljust(SIZE - 1).encode() + b"\n", 0)
    finally:
        os.close(descriptor)


def read_note(path: Path) -> dict[str, Any]:
    """What was written last; nothing if there is nothing, or only half of it is seen."""
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


class Lease:
    """The holder's side: signs of life from its creation until `release`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()  # a signal may come in the middle of a beat, and its handler may wish to kill
        machine = guard.machine() if guard.HAS_PROC else ""
        self._note = {"machine": machine, "pid": os.getpid(), "start": guard.start_time(os.getpid()), "wish": ""}
        self._count = 0
        self._over = threading.Event()
        self._write()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def wish(self, what: str) -> None:
        """Tell the far end at once: `terminate` or `kill`."""
        with self._lock:
            if self._note["wish"] != "kill":
                self._note["wish"] = what
            self._write()

    def release(self) -> None:
        """No more signs of life: there is nobody left to read them."""
        self._over.set()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):  # what passes is made good by the next one
                self._write()

    def _write(self) -> None:
        with self._lock:
            beat = -1
            while beat != self._count:  # once more, if a signal's handler has written in the middle of this
                self._count += 1
                beat = self._count
                write_note(self._path, {**self._note, "beat": beat})


class Holder:
    """The far end's side: whether the holder lives, and what it wishes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._note: dict[str, Any] = {}
        self._news = 0
        self._since = time.monotonic()

    @property
    def lives(self) -> bool | None:
        """None while that cannot be told yet: a file alone may be what a dead holder left."""
        self._look()
        if self._note and self._note["machine"] == guard.machine():
            return guard.start_time(self._note["pid"]) == self._note["start"]
        if time.monotonic() - self._since > LEASE:
            return False
        return True if self._news > 1 else None

    @property
    def wish(self) -> str:
        """What the holder said last; `terminate` if it is no more."""
        return "terminate" if self.lives is False and not self._note.get("wish") else self._note.get("wish", "")

    def _look(self) -> None:
        note = read_note(self._path)
        if note and note != self._note:
            self._note, self._since = note, time.monotonic()
            self._news += 1
