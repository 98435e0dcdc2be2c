"""Leases: how a process on any machine learns that the process it works for has died.

The holder of a lease rewrites one small file every `HEARTBEAT_SECONDS`: who it is, a counter, and what it requests
of the reader (nothing, `terminate` or `kill`). A reader on the same machine checks the holder's pid and start time, so
it learns of the death at once; on another machine the holder counts as dead after `LEASE_SECONDS` without a
change. Clocks of two machines are never compared. The file exists before the job starts and is only written in place:
a network file system may hide a new name for a minute, but shows new content to whoever opens the file.
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
from speculators.timeouts import HEARTBEAT_SECONDS, LEASE_SECONDS

NOTE_BYTES = 512
"""Size of a note, padded with blanks: one write replaces it, and a full disk cannot refuse it."""


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a small JSON object in place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, json.dumps(note).ljust(NOTE_BYTES - 1).encode() + b"\n", 0)
    finally:
        os.close(descriptor)


def read_note(path: Path) -> dict[str, Any]:
    """The JSON object that was written last; {} if there is none, or a write is only half visible."""
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


class Lease:
    """The holder's side of a lease: a thread writes heartbeats from the creation until `release`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()  # a signal may interrupt a heartbeat, and its handler may call `request`
        machine = guard.machine() if guard.HAS_PROC else ""
        self._note = {"machine": machine, "pid": os.getpid(), "start": guard.start_time(os.getpid()), "request": ""}
        self._count = 0
        self._released = threading.Event()
        self._write()
        threading.Thread(target=self._write_heartbeats, name="lease", daemon=True).start()

    def request(self, action: str) -> None:
        """Request `terminate` or `kill` of the reader, at once. A `kill` is never taken back."""
        with self._lock:
            if self._note["request"] != "kill":
                self._note["request"] = action
            self._write()

    def release(self) -> None:
        """Stop the heartbeats: the reader has ended."""
        self._released.set()

    def _write_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next heartbeat replaces one that could not be written
                self._write()

    def _write(self) -> None:
        with self._lock:
            heartbeat = -1
            while heartbeat != self._count:  # write again if a signal handler has written in between
                self._count += 1
                heartbeat = self._count
                write_note(self._path, {**self._note, "heartbeat": heartbeat})


class LeaseReader:
    """The reader's side of a lease: whether the holder lives, and what it requests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._note: dict[str, Any] = {}
        self._changes = 0
        self._changed_at = time.monotonic()

    @property
    def holder_lives(self) -> bool | None:
        """None while only one note has been read: a dead holder may have left it."""
        self._read()
        if self._note and self._note["machine"] == guard.machine():
            return guard.start_time(self._note["pid"]) == self._note["start"]
        if time.monotonic() - self._changed_at > LEASE_SECONDS:
            return False
        return True if self._changes > 1 else None

    @property
    def request(self) -> str:
        """The holder's last request: empty, `terminate` or `kill`; `terminate` if the holder is dead."""
        if self.holder_lives is False and not self._note.get("request"):
            return "terminate"
        return self._note.get("request", "")

    def _read(self) -> None:
        note = read_note(self._path)
        if note and note != self._note:
            self._note, self._changed_at = note, time.monotonic()
            self._changes += 1
