"""The submitit executors: workers are submitit jobs on this machine, or jobs of a Slurm cluster.

Defaults of submitit that this module works around: it hides every GPU from a job on this machine; its time limit is a
few minutes unless one is set; its state of a Slurm job is up to ten minutes old, so the job's own note decides; its
local jobs receive the terminal's Ctrl-C and would die before their worker writes a checkpoint; and it pickles a job
into a file, so secrets go through the environment only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speculators.config.execution import ExecutorOptions
from speculators.errors import StageError
from speculators.runner.executors.local import python_path
from speculators.runner.executors.remote import RemoteHandle, WorkerJob, job_directory, seen_devices
from speculators.runner.hardware import VISIBLE

_SUBMITTING = threading.Lock()
"""Held while this process has the environment of a job."""


class SubmititExecutor:
    """See `executors.Executor`. `here`: jobs are processes of this machine; otherwise jobs of a Slurm cluster."""

    def __init__(self, options: ExecutorOptions, here: bool) -> None:
        self._options, self._here = options, here

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> RemoteHandle:
        """Submit a job and return at once.

        Raises:
            StageError: the cluster refused it.
        """
        import submitit

        options, here = self._options, self._here
        directory = job_directory(request)
        task = Task(directory, request, log, seen_devices(env) if here else {}, here)

        def submitted() -> SubmititJob:
            executor = submitit.AutoExecutor(folder=directory, cluster="local" if here else "slurm")
            executor.update_parameters(
                name=request.stem, timeout_min=options.time_limit, **({} if here else _slurm_parameters(options))
            )
            with _environment({**env, "PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}), _sigint_blocked():
                return SubmititJob(executor.submit(task), here)

        try:
            return RemoteHandle(directory, log, submitted)
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            hint = "executor=local needs no submitit" if here else "executor=submitit needs no cluster"
            raise StageError(f"submitit refused `{request.stem}`: {error}", hint) from None


class Task:
    """The callable of a job. submitit pickles it, and calls `checkpoint` at the time limit or on preemption."""

    def __init__(self, directory: Path, request: Path, log: Path, env: dict[str, str], here: bool) -> None:
        self._arguments = (directory, request, log, env, here)
        self._worker_job: WorkerJob | None = None

    def __call__(self) -> None:
        """Run the worker; called in the job."""
        directory, request, log, env, here = self._arguments
        if here:
            with contextlib.suppress(PermissionError):
                os.setsid()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            os.environ.pop(VISIBLE, None)
        self._worker_job = WorkerJob(directory)
        self._worker_job.run(request, log, env)

    def checkpoint(self) -> Any:
        """Stop the worker, which writes a checkpoint, and queue the job again."""
        import submitit

        if self._worker_job is not None:
            self._worker_job.stop()
        return submitit.helpers.DelayedSubmission(Task(*self._arguments))


class SubmititJob:
    """A job of submitit; see `remote.ClusterJob`."""

    def __init__(self, job: Any, here: bool) -> None:
        self._job = job
        self.here = here

    def ended(self) -> str | None:
        return f"submitit: job {self._job.job_id} ended: {self._job.state}" if self._job.done() else None

    def cancel(self) -> None:
        if not self.here:  # a local job starts at once and reads the request itself
            self._job.cancel(check=False)

    def output(self) -> str:
        return self._job.stderr() or ""


def _slurm_parameters(options: ExecutorOptions) -> dict[str, Any]:
    """Resources that a job requests of Slurm; None: not requested."""
    partition, gpus = options.partition or None, options.gpus or None
    return {"slurm_partition": partition, "gpus_per_node": gpus, "cpus_per_task": options.cpus}


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that a job inherits, locally and through sbatch; no file contains them."""
    with _SUBMITTING:
        before = {name: os.environ.get(name) for name in env}
        os.environ.update(env)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in the processes started here: the terminal sends Ctrl-C to them too, but the runner handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
