"""Workers as tasks of a Ray cluster: the one at `executor.address`, or a local one that ends with the run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from speculators.config.schema import ExecutorOptions
from speculators.errors import StageError
from speculators.runner.executors.local import environment
from speculators.runner.executors.remote import DEVICES, RemoteHandle, place_beside, serve

_CONNECTING = threading.Lock()


class RayExecutor:
    """See `executors.Executor`."""

    def __init__(self, options: ExecutorOptions) -> None:
        self._options = options

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> RemoteHandle:
        """Hand the task to the cluster and return at once.

        Raises:
            StageError: there is no such cluster.
        """
        import ray

        options, here = self._options, is_here(self._options)
        _connect(options.address)
        # The whole environment: a cluster that runs already knows nothing of this run's.
        whole = environment(env)
        if not here or options.gpus:
            whole.pop(DEVICES, None)
        asked: dict[str, Any] = {"num_cpus": options.cpus, "num_gpus": options.gpus, "max_retries": 0}
        task = ray.remote(serve).options(name=request.stem, **asked)
        place = place_beside(request)

        def submitted() -> _Job:
            return _Job(task.remote(place, request, log, whole, here and not options.gpus), here)

        return RemoteHandle(place, log, submitted)


class _Job:
    """See `remote.Job`."""

    def __init__(self, reference: Any, here: bool) -> None:
        self._reference = reference
        self.here = here
        self._how: str | None = None

    def ended(self) -> str | None:
        import ray

        if self._how is None and ray.wait([self._reference], timeout=0)[0]:
            try:
                ray.get(self._reference)
                self._how = "ray: the task ended"
            except ray.exceptions.RayError as error:
                self._how = f"ray: {error}"
        return self._how

    def cancel(self) -> None:
        import ray

        ray.cancel(self._reference)

    def output(self) -> str:
        return ""


def is_here(options: ExecutorOptions) -> bool:
    """Whether the cluster is this machine."""
    return not (options.address or os.environ.get("RAY_ADDRESS"))


def _connect(address: str) -> None:
    """Start or join the cluster once, in a thread that stays.

    Not in this one: Ray takes SIGTERM for itself where it is started from the main thread, and the kernel ends a
    local cluster together with the thread that has started it.
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
            hint = "executor.address=HOST:PORT of a cluster that runs; empty for a local one"
            raise StageError(f"executor.address: no Ray cluster: {failure[0]}", hint)
