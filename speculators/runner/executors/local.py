"""The local executor: workers are subprocesses of this machine, each in its own session.

The worker's standard input is a pipe from this process: when this process dies, however it dies, the pipe closes and
the worker stops. A parent-death signal would not do, because the kernel sends it when the *thread* that started the
worker ends.
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
"""Variables that a worker does not inherit: it is the only rank and would wait for others."""


class LocalExecutor:
    """See `executors.Executor`."""

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> LocalHandle:
        """Start the worker and return at once."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                # -P: a file of the working directory must not shadow a module.
                [sys.executable, "-P", "-m", "speculators.worker", str(request), "--held"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=worker_environment(env),
                start_new_session=True,
            )
        return LocalHandle(process)


class LocalHandle:
    """See `executors.Handle`. The worker is a child of this process and the leader of a process group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the worker, and of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._process.returncode is None and self._has_ended():
            self.kill()  # before it is waited for below: until then the group's id cannot be reused
        code = self._process.poll()
        if code is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the worker alone, which stops its children itself."""
        self._process.terminate()

    def kill(self) -> None:
        """See `executors.Handle.kill`."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        """Whether the worker has exited and was not waited for; false on macOS, where its group is not killed."""
        return hasattr(os, "waitid") and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def worker_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a worker: this process's, the variables of every worker, and `env`."""
    common = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    libraries = {**threads.openmp_environment(Path(sys.executable)), **threads.allocator_environment()}
    return {**inherited, **libraries, **common, **env}


def python_path() -> str:
    """PYTHONPATH with which a worker imports this package, in any working directory."""
    root = str(Path(speculators.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # An installed package needs no entry, and site-packages must not come before the standard library.
    installed = Path(root).name in ("site-packages", "dist-packages")
    return os.pathsep.join(filter(None, [*([] if installed else [root]), *inherited]))
