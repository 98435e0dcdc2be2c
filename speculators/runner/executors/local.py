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
from speculators.runner import threads


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
    """See `executors.Handle`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The worker's process id, which is its process group's too."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._process.returncode is None and self._has_ended():
            self.kill()  # its corpse keeps the group's number ours until it is collected below
        code = self._process.poll()
        if code is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Only the worker itself is asked: it knows what its children are for."""
        self._process.terminate()

    def kill(self) -> None:
        """See `executors.Handle.kill`."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        if sys.platform == "darwin":
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """All variables of a worker: this process's, those that every worker gets, and `env`."""
    ours = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **threads.env(Path(sys.executable)), **ours, **env}


def python_path() -> str:
    """Where the worker finds this very package, whatever directory the run was started in."""
    root = str(Path(speculators.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # Where it is installed it is found anyway, and the other packages there must not come before the standard library.
    installed = Path(root).name in ("site-packages", "dist-packages")
    return os.pathsep.join(filter(None, [*([] if installed else [root]), *inherited]))
