"""A cluster without a program of its own: a job is a process of this machine, which nobody has to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from speculators.runner.executors.remote import RemoteHandle, job_directory

JOB = (
    "import sys; from pathlib import Path; from speculators.runner.executors.remote import run_job\n"
    "run_job(*map(Path, sys.argv[1:]), {}, False)"
)


class BareExecutor:
    """See `executors.Executor`."""

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> RemoteHandle:
        directory = job_directory(request)
        return RemoteHandle(directory, log, lambda: BareJob([directory, request, log], env))


class BareJob:
    """See `remote.ClusterJob`."""

    here = True

    def __init__(self, paths: list[Path], env: dict[str, str]) -> None:
        argv = [sys.executable, "-c", JOB, *map(str, paths)]
        self._process = subprocess.Popen(argv, env={**os.environ, **env}, start_new_session=True)

    def ended(self) -> str | None:
        code = self._process.poll()
        return None if code is None else f"bare: ended with {code}"

    def cancel(self) -> None: ...

    def output(self) -> str:
        return ""
