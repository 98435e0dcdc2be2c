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
from typing import BinaryIO

import speculators
from speculators.runner.executors.nursery import Nursery
from speculators.runner.servers import threads

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Not passed on: a worker that is started here is the only one, and would wait for others."""


class LocalExecutor:
    """See `executors.Executor`. With a nursery, whose end is its owner's to see to, workers are forked from it."""

    def __init__(self, nursery: Nursery | None = None) -> None:
        self._nursery = nursery

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> LocalHandle:
        """Start the worker and return at once."""
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments, whole = [str(request), "--held"], environment(env)
        its, lifeline = os.pipe()
        with log.open("ab") as output:
            try:
                pid = None
                if self._nursery is not None:
                    pid = self._nursery.hatch(request.stem, arguments, whole, its, output.fileno())
                if pid is None:
                    pid = _started(arguments, whole, its, output)
            except BaseException:
                os.close(lifeline)
                raise
            finally:
                os.close(its)
        return LocalHandle(pid, lifeline)


def _started(arguments: list[str], env: dict[str, str], standard_input: int, output: BinaryIO) -> int:
    process = subprocess.Popen(
        # -P: a file named like a module in the user's directory must not be imported in its place.
        [sys.executable, "-P", "-m", "speculators.worker", *arguments],
        stdin=standard_input,
        stdout=output,
        stderr=output,
        env=env,
        start_new_session=True,
    )
    process.returncode = 0  # `LocalHandle.poll` collects it; Popen must not try, nor warn
    return process.pid


class LocalHandle:
    """See `executors.Handle`. The worker is a child of this process."""

    def __init__(self, pid: int, lifeline: int) -> None:
        self.pid = pid
        """The worker's process id, which is its process group's too."""
        self._lifeline = lifeline
        """The descriptor whose end tells the worker that we are gone."""
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._code is None and (status := self._collected()) is not None:
            self._code = os.waitstatus_to_exitcode(status)
            os.close(self._lifeline)
        return self._code

    def terminate(self) -> None:
        """Only the worker itself is asked: it knows what its children are for."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """See `executors.Handle.kill`."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _collected(self) -> int | None:
        """What waitpid says once the worker has ended, after the rest of its group has been killed."""
        if not hasattr(os, "waitid"):  # macOS: whatever it has left behind goes on
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return status if pid else None
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.kill()  # its corpse keeps the group's number ours until it is collected
        status = os.waitpid(self.pid, 0)[1]
        with contextlib.suppress(ChildProcessError):  # its orphans may be our children
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        return status


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
