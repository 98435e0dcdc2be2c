"""The Ray executor: workers are tasks of the cluster at `executor.address`, or of a local one for the run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from speculators.config.execution import ExecutorOptions
from speculators.errors import StageError
from speculators.runner.executors.local import worker_environment
from speculators.runner.executors.remote import RemoteHandle, job_directory, run_job
from speculators.runner.hardware import VISIBLE

_CONNECTING = threading.Lock()


class RayExecutor:
    """See `executors.Executor`."""

    def __init__(self, options: ExecutorOptions) -> None:
        self._options = options

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> RemoteHandle:
        """Submit the task and return at once.

        Raises:
            StageError: the cluster does not answer.
        """
        import ray

        options, here = self._options, is_local(self._options)
        _connect(options.address)
        # The whole environment, because a running cluster does not have this run's.
        variables = worker_environment(env)
        if not here or options.gpus:
            variables.pop(VISIBLE, None)
        resources: dict[str, Any] = {"num_cpus": options.cpus, "num_gpus": options.gpus, "max_retries": 0}
        task = ray.remote(run_job).options(name=request.stem, **resources)
        directory = job_directory(request)

        def submitted() -> RayJob:
            return RayJob(task.remote(directory, request, log, variables, here and not options.gpus), here)

        return RemoteHandle(directory, log, submitted)


class RayJob:
    """A Ray task; see `remote.ClusterJob`."""

    def __init__(self, reference: Any, here: bool) -> None:
        self._reference = reference
        self.here = here
        self._ending: str | None = None

    def ended(self) -> str | None:
        import ray

        if self._ending is None and ray.wait([self._reference], timeout=0)[0]:
            try:
                ray.get(self._reference)
                self._ending = "ray: the task ended"
            except ray.exceptions.RayError as error:
                self._ending = f"ray: {error}"
        return self._ending

    def cancel(self) -> None:
        import ray

        ray.cancel(self._reference)

    def output(self) -> str:
        return ""


def is_local(options: ExecutorOptions) -> bool:
    """Whether the cluster is a local one on this machine."""
    return not (options.address or os.environ.get("RAY_ADDRESS"))


def _connect(address: str) -> None:
    """Start or join the cluster once, in a thread that never ends.

    From the main thread, Ray would replace the handler of SIGTERM; and the kernel ends a local cluster together with
    the thread that started it.
    """
    import ray

    with _CONNECTING:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        done, failure = threading.Event(), []

        def stay() -> None:
            try:
                ray.init(
                    address=address or None, include_dashboard=None if address else False, log_to_driver=False,
                    logging_level="error",
                )  # fmt: skip
            except Exception as error:
                failure.append(error)
            done.set()
            threading.Event().wait()

        threading.Thread(target=stay, name="ray", daemon=True).start()
        done.wait()
        if failure:
            hint = "executor.address=HOST:PORT of a running cluster; empty for a local one"
            raise StageError(f"executor.address={address}: cannot connect to Ray: {failure[0]}", hint)
