"""Workers as jobs of submitit: on this machine, or of a Slurm cluster.

What submitit does by itself and what is done about it here: it hides every GPU from a job on this machine; its time
limits are minutes unless one is given; it asks Slurm for a job's state up to ten minutes late, so the job's own note
is what counts; its local jobs hear the terminal's Ctrl-C and would die before their worker has a checkpoint; and it
pickles a job into a file, so what may be secret goes through the environment only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speculators.config.schema import ExecutorOptions
from speculators.errors import StageError
from speculators.runner.executors.local import python_path
from speculators.runner.executors.remote import DEVICES, RemoteHandle, Served, place_beside, seen_devices

_SUBMITTING = threading.Lock()
"""Held while the environment of this process is that of a job."""


class SubmititExecutor:
    """See `executors.Executor`. `here`: jobs are processes of this machine; otherwise jobs of a Slurm cluster."""

    def __init__(self, options: ExecutorOptions, here: bool) -> None:
        self._options, self._here = options, here

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> RemoteHandle:
        """Submit a job and return at once.

        Raises:
            StageError: the cluster did not take it.
        """
        import submitit

        options, here = self._options, self._here
        place = place_beside(request)
        task = Task(place, request, log, seen_devices(env) if here else {}, here)

        def submitted() -> _Job:
            executor = submitit.AutoExecutor(folder=place, cluster="local" if here else "slurm")
            executor.update_parameters(
                name=request.stem, timeout_min=options.time_limit, **({} if here else _asked(options))
            )
            with _environment({**env, "PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}), _deaf_to_the_terminal():
                return _Job(executor.submit(task), here)

        try:
            return RemoteHandle(place, log, submitted)
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            hint = "executor=local needs no submitit" if here else "executor=submitit needs no cluster"
            raise StageError(f"submitit did not take `{request.stem}`: {error}", hint) from None


class Task:
    """What a job does. submitit pickles it, and calls `checkpoint` when the job's time is up or others go first."""

    def __init__(self, place: Path, request: Path, log: Path, env: dict[str, str], here: bool) -> None:
        self._arguments = (place, request, log, env, here)
        self._served: Served | None = None

    def __call__(self) -> None:
        """Be the far end of one worker."""
        place, request, log, env, here = self._arguments
        if here:
            with contextlib.suppress(PermissionError):
                os.setsid()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            os.environ.pop(DEVICES, None)
        self._served = Served(place)
        self._served.run(request, log, env)

    def checkpoint(self) -> Any:
        """Stop the worker, which keeps its work, and be queued again."""
        import submitit

        if self._served is not None:
            self._served.stop()
        return submitit.helpers.DelayedSubmission(Task(*self._arguments))


class _Job:
    """See `remote.Job`."""

    def __init__(self, job: Any, here: bool) -> None:
        self._job = job
        self.here = here

    def ended(self) -> str | None:
        return f"submitit: job {self._job.job_id} ended: {self._job.state}" if self._job.done() else None

    def cancel(self) -> None:
        if not self.here:  # here nothing waits: the far end starts at once, and sees what is wished
            self._job.cancel(check=False)

    def output(self) -> str:
        return self._job.stderr() or ""


def _asked(options: ExecutorOptions) -> dict[str, Any]:
    """What a job asks its cluster for."""
    # What is None is not asked for.
    partition, gpus = options.partition or None, options.gpus or None
    return {"slurm_partition": partition, "gpus_per_node": gpus, "cpus_per_task": options.cpus}


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """A job inherits the environment of this process, here and through sbatch; no file holds it."""
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
def _deaf_to_the_terminal() -> Iterator[None]:
    """What is started here never hears Ctrl-C, which the terminal sends to the whole group; the runner passes it on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
