"""The runner's side of a nursery (`speculators.nursery`): it is started with the first worker, and ends with the run.

A worker that comes from it is a child of this process, because this process is then the subreaper of what is orphaned
below it. Where there is none (not Linux), or it does not answer, workers are started one by one as anywhere else.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Mapping

from speculators.runner.servers import guard

NUMBER_BYTES = 8
ANSWER_SECONDS = 20.0
"""It imports what a worker needs before it answers for the first time."""
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "GLIBC_")
"""Variables that an interpreter, or the system's loader below it, reads once, by the beginning of their names."""


class Nursery:
    """At most one process, started when it is first needed."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._env: Mapping[str, str] = {}
        self._is_no_use = sys.platform != "linux"

    @property
    def pid(self) -> int | None:
        """Its process id while it runs for us."""
        return None if self._process is None else self._process.pid

    def hatch(self, name: str, arguments: list[str], env: Mapping[str, str], lifeline: int, log: int) -> int | None:
        """A new worker's process id; None if it has to be started by itself.

        Args:
            name: what the system calls it.
            arguments: of `speculators.worker`.
            env: all its variables.
            lifeline: descriptor of its standard input.
            log: descriptor of its output.
        """
        if self._is_no_use or not self._suits(env):
            return None
        order = json.dumps({"name": name, "arguments": arguments, "env": dict(env)}).encode()
        try:
            channel = self._channel or self._start(env)
            socket.send_fds(channel, [len(order).to_bytes(NUMBER_BYTES)], [lifeline, log])
            channel.sendall(order)
            pid = int.from_bytes(channel.recv(NUMBER_BYTES, socket.MSG_WAITALL))
        except OSError:
            pid = 0
        if not pid:
            self._is_no_use = True
            self.close()
        return pid or None

    def close(self) -> None:
        """End it. The workers go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _suits(self, env: Mapping[str, str]) -> bool:
        """Whether an interpreter that was started with these variables would be like the one that is there."""
        if self._process is None:
            return True
        differing = dict(env.items() ^ self._env.items())
        return not any(name.startswith(READ_AT_START) for name in differing)

    def _start(self, env: Mapping[str, str]) -> socket.socket:
        guard.become_subreaper()
        ours, its = socket.socketpair()
        with contextlib.closing(its):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "speculators.nursery"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        ours.settimeout(ANSWER_SECONDS)
        self._channel, self._env = ours, env
        return ours
