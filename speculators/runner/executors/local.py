"""Workers as subprocesses of this machine, each in a session of its own.

The worker holds the other end of a pipe to this process: when this process dies, however it dies, the pipe closes
and the worker ends itself. No parent-death signal is used, because the kernel sends that when the *thread* that
started the worker ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import speculators
from speculators.runner.servers import threads

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Not passed on: a worker that is started here is the only one, and would wait for others."""


class LocalExecutor:
    """See `executors.Executor`."""

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> LocalHandle:
        """Start the worker and return at once."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                # -P: a file named like a module in the user's directory must not be imported in its place.
                [sys.executable, "-P", "-m", "speculators.worker", str(request), "--held"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment(env),
                start_new_session=True,
            )
        return LocalHandle(process)


class LocalHandle:
    """See `executors.Handle`. The worker is a child of this process and leads a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the worker, and of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._process.returncode is None and self._has_ended():
            self.kill()  # until it is waited for below, the dead worker keeps the group's number from being reused
        code = self._process.poll()
        if code is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the worker alone: it knows what its children are for."""
        self._process.terminate()

    def kill(self) -> None:
        """See `executors.Handle.kill`."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        """Whether the worker has exited but has not been waited for. Never on macOS, where its group is left alone."""
        return hasattr(os, "waitid") and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """All variables of a worker: this process's, those that every worker gets, and `env`."""
    ours = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return {**inherited, **threads.env(Path(sys.executable)), **threads.memory(), **ours, **env}


def python_path() -> str:
    """Where the worker finds this very package, whatever directory the run was started in."""
    root = str(Path(speculators.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # Where it is installed it is found anyway, and the other packages there must not come before the standard library.
    installed = Path(root).name in ("site-packages", "dist-packages")
    return os.pathsep.join(filter(None, [*([] if installed else [root]), *inherited]))
