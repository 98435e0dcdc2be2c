"""Device locks between the runs of one store on one machine, so that two runs never use the same GPU at once.

`schedule.ResourcePool` divides devices among the stages of one run; these locks divide them among runs. Without them,
two runs of a sweep could train on one GPU, or one could measure speed while another trains. Each lock is a `flock`,
which the kernel releases when the process that acquired it ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Sequence
from pathlib import Path

MACHINE = "machine"
"""The lock of the whole machine: shared by all runs that use a device, exclusive for one that measures speed."""


class DeviceLocks:
    """The devices that this run has locked. `names` are the devices' names outside of this run, by number."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory = directory
        self._names = names
        self._descriptors: dict[str, int] = {}
        self._exclusive = False

    def acquire(self, devices: Sequence[int], count: int, *, exclusive: bool = False) -> list[int]:
        """Lock the first `count` of these devices that no other run has; return them, or [] if there are too few.

        Devices that this run has locked already count as free. With `exclusive`, no other run may have any device.
        """
        before = set(self._descriptors)
        acquired: list[int] = []
        if self._lock(MACHINE, exclusive):
            for device in devices:
                if len(acquired) < count and self._lock(self._names[device], True):
                    acquired.append(device)
        if len(acquired) < count:
            for name in set(self._descriptors) - before:
                self._unlock(name)
            return []
        return acquired

    def release_except(self, devices: Collection[int]) -> None:
        """Release the locks of all devices but these; without devices, the machine's lock too."""
        kept = {self._names[device] for device in devices} | ({MACHINE} if devices else set())
        for name in set(self._descriptors) - kept:
            self._unlock(name)

    def _lock(self, name: str, exclusive: bool) -> bool:
        if name in self._descriptors and (name != MACHINE or exclusive == self._exclusive):
            return True
        if name not in self._descriptors:
            path = self._directory / f"device-{os.uname().nodename}-{name.replace(os.sep, '_')}.lock"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._descriptors[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:
                return True  # the store is not writable, which claiming an artifact reports with a better message
        try:
            fcntl.flock(self._descriptors[name], (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock(name)
            return False
        except OSError:
            pass  # the file system has no locks, which claiming an artifact reports
        if name == MACHINE:
            self._exclusive = exclusive
        return True

    def _unlock(self, name: str) -> None:
        os.close(self._descriptors.pop(name))
