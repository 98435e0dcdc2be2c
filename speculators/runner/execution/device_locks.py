"""Devices among the runs of one store on one machine: a kernel lock for each, which ends with whoever holds it.

The stages of one run divide devices by `schedule.Room`. Between runs, those of a sweep for one, nobody divides: without
these locks two of them would train on the same GPU, and one would measure speed beside the other's training.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Sequence
from pathlib import Path

MACHINE = "machine"
"""Held by everybody who has a device, together; by who measures, alone."""


class Tokens:
    """What one run has locked. `names` are the devices', as they are called outside of this run."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory = directory
        self._names = names
        self._held: dict[str, int] = {}
        self._alone = False

    def take(self, devices: Sequence[int], count: int, *, alone: bool = False) -> list[int]:
        """Lock `count` of these devices, the first that no other run has; none if there are not so many.

        What this run has already is taken again. `alone`: no other run may have any.
        """
        before = set(self._held)
        taken: list[int] = []
        if self._lock(MACHINE, alone):
            for device in devices:
                if len(taken) < count and self._lock(self._names[device], True):
                    taken.append(device)
        if len(taken) < count:
            for name in set(self._held) - before:
                self._unlock(name)
            return []
        return taken

    def keep(self, devices: Collection[int]) -> None:
        """Give back all but these; all of it if there are none."""
        kept = {self._names[device] for device in devices} | ({MACHINE} if devices else set())
        for name in set(self._held) - kept:
            self._unlock(name)

    def _lock(self, name: str, alone: bool) -> bool:
        if name in self._held and (name != MACHINE or alone == self._alone):
            return True
        if name not in self._held:
            path = self._directory / f"device-{os.uname().nodename}-{name.replace(os.sep, '_')}.lock"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._held[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:
                return True  # the store cannot be written: its claim says that in better words
        try:
            fcntl.flock(self._held[name], (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock(name)
            return False
        except OSError:
            pass  # nothing can be locked here: the claim says that too
        if name == MACHINE:
            self._alone = alone
        return True

    def _unlock(self, name: str) -> None:
        os.close(self._held.pop(name))
