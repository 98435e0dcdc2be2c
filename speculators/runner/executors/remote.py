"""Runs workers as jobs that another program starts: what the Slurm and Ray executors share.

The runner holds a `RemoteHandle`. The job, wherever the cluster starts it, runs `WorkerJob`: it starts the servers that
the request orders on its own machine, then the worker as a local subprocess, so all of them end with the job. Ports
and API keys are chosen there, and the keys go to the worker through its environment. The job watches the runner's
lease, so it ends when the runner does. They communicate through two files in a directory that both machines can see:

    held     written by the runner: its lease, with heartbeats and requests (see `execution.lease`)
    state    written by the job: that it has begun, then the worker's pid, then its exit code
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from speculators.config.schema import from_builtins
from speculators.job import Request, write_json
from speculators.runner.execution.lease import Lease, LeaseReader, read_note, write_note
from speculators.runner.executors.local import LocalExecutor, LocalHandle
from speculators.runner.hardware import VISIBLE
from speculators.runner.servers import guard, vllm
from speculators.runner.servers.server import find_dead
from speculators.timeouts import (
    CLUSTER_QUERY_SECONDS,
    JOB_POLL_SECONDS,
    JOB_RESULT_SECONDS,
    SERVER_DEATH_SECONDS,
    WORKER_GRACE_SECONDS,
)

STOPPED = 128 + signal.SIGTERM
"""Exit code of a worker that stopped because it was asked to."""


class ClusterJob(Protocol):
    """A job as its cluster reports it."""

    here: bool
    """It runs on this machine."""

    def ended(self) -> str | None:
        """None while it is queued or runs; then how it ended, in the cluster's words."""

    def cancel(self) -> None:
        """Remove it from the queue."""

    def output(self) -> str:
        """What the job itself has printed, such as the reason why it could not start a worker."""


class RemoteHandle:
    """The runner's side of a job; see `executors.Handle`."""

    def __init__(self, directory: Path, log: Path, submit: Callable[[], ClusterJob]) -> None:
        self._directory = directory
        self._log = log
        self._code: int | None = None
        self._stop_requested = False
        self._queried_at = 0.0
        self._ended_since: float | None = None
        write_note(directory / "state", {})
        self._lease = Lease(directory / "held")  # before the job, which may start at once
        try:
            self._job = submit()
        except BaseException:
            self._lease.release()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id on its machine; 0 while it is queued."""
        return int(self._state().get("pid", 0))

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._code is None:
            self._code = self._exit_code()
            if self._code is not None:
                self._lease.release()
            if self._code == 0:
                shutil.rmtree(self._directory, ignore_errors=True)
        return self._code

    def terminate(self) -> None:
        """See `executors.Handle.terminate`."""
        self._request("terminate")

    def kill(self) -> None:
        """See `executors.Handle.kill`; the job does it, up to `JOB_POLL_SECONDS` seconds later."""
        self._request("kill")

    def _request(self, action: str) -> None:
        self._stop_requested = True
        if self._code is None:
            self._lease.request(action)
            if not self._state():
                self._job.cancel()

    def _exit_code(self) -> int | None:
        """The worker's exit code, once both the worker and its job have ended."""
        code: int | None = self._state().get("code")
        if code is not None and not self._job.here:
            return code
        if time.monotonic() - self._queried_at < CLUSTER_QUERY_SECONDS and code is None:
            return None
        self._queried_at = time.monotonic()
        ending = self._job.ended()
        state = self._state()  # read again: the job may have written its last note in between
        if ending is None:
            self._ended_since = None
            return None
        if "code" in state:
            return int(state["code"])
        if self._ended_since is None:
            self._ended_since = time.monotonic()
        if self._job.here and _worker_lives(state):
            return None  # its pipe is closed, so it stops within its own grace period
        if not self._job.here and time.monotonic() - self._ended_since < JOB_RESULT_SECONDS:
            return None
        if self._stop_requested and not state:
            return STOPPED  # before it began
        with self._log.open("a") as log:
            log.write(f"{self._job.output()}\n{ending}\n")
        return -signal.SIGKILL

    def _state(self) -> dict[str, Any]:
        return read_note(self._directory / "state")


class JobServers:
    """The servers that a request orders, started in the worker's job; most requests order none."""

    def __init__(self, request: Path, env: Mapping[str, str]) -> None:
        self._path, self._request = request, Request.read(request)
        orders = {name: from_builtins(vllm.ServerOrder, order) for name, order in self._request.orders.items()}
        self._servers = {name: vllm.make_server(order, {**env, **job_devices(order)}) for name, order in orders.items()}

    def start(self) -> None:
        """Start all servers and return at once."""
        for server in self._servers.values():
            server.start()

    def state(self) -> str:
        """`dead` if one of them is; otherwise `starting` until all are `ready`."""
        server_states = {server.poll() for server in self._servers.values()}
        return next((state for state in ("dead", "starting") if state in server_states), "ready")

    def add_to_request(self) -> dict[str, str]:
        """Write the servers' addresses into the request; return the environment variables with their API keys."""
        self._request.services = {name: server.request_entry() for name, server in self._servers.items()}
        self._request.write(self._path)
        return {name: key for server in self._servers.values() for name, key in server.worker_env().items()}

    def dies_within(self, seconds: float) -> bool:
        """Whether one of them is dead, or dies within `seconds`: its client may notice first."""
        deadline = time.monotonic() + seconds
        while self._servers and self.state() != "dead" and time.monotonic() < deadline:
            time.sleep(JOB_POLL_SECONDS)
        return self.state() == "dead"

    def report_failure(self) -> None:
        """Write the cause of a server's death to `failure.json`, where a worker reports its own failure."""
        dead = find_dead(self._servers.values())
        assert dead is not None
        failure, work = dead.failure(), Path(self._request.work)
        work.mkdir(parents=True, exist_ok=True)
        report = {"message": failure.message, "hint": failure.hint, "kind": type(failure).__name__}
        write_json(work / "failure.json", {**report, "transient": dead.transient})

    def stop(self, *, at_once: bool = False) -> None:
        """Stop all servers at the same time and wait until they are gone; `at_once` kills them without grace."""
        for server in self._servers.values():
            if at_once:
                server.kill()
            server.close()
        for server in self._servers.values():
            server.stop()


class WorkerJob:
    """The job's side: runs the servers and the worker of one request."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lease = LeaseReader(directory / "held")
        self._deadline: float | None = None
        self._servers: JobServers | None = None
        self._handle: LocalHandle | None = None

    def run(self, request: Path, log: Path, env: dict[str, str]) -> None:
        """Run the worker if the runner still lives; return when it and its servers have ended."""
        while self._lease.holder_lives is None:
            time.sleep(JOB_POLL_SECONDS)
        code, needed = STOPPED, not self._lease.request
        if needed:
            write_note(self._directory / "state", {"machine": guard.machine()})
            self._servers = servers = JobServers(request, env)
            try:
                code = self._work(servers, request, log, env)
            finally:
                servers.stop(at_once=self._lease.request == "kill")
        write_note(self._directory / "state", {**read_note(self._directory / "state"), "code": code})

    def stop(self) -> None:
        """Stop the worker, which writes a checkpoint, without an exit code: the cluster will queue the job again."""
        while self._handle is not None and self._handle.poll() is None:
            self._pass_on(self._handle, "terminate")
            time.sleep(JOB_POLL_SECONDS)
        if self._servers is not None:
            self._servers.stop()

    def _work(self, servers: JobServers, request: Path, log: Path, env: dict[str, str]) -> int:
        """Start the servers, then run the worker; return its exit code, or 1 if a server died."""
        servers.start()
        while servers.state() == "starting" and not self._lease.request:
            time.sleep(JOB_POLL_SECONDS)
        if self._lease.request:
            return STOPPED
        code = 1
        if servers.state() == "ready":
            code = self._watch(servers, LocalExecutor().submit(request, log, {**env, **servers.add_to_request()}))
        if code != 0 and not self._lease.request and servers.dies_within(SERVER_DEATH_SECONDS if code == 1 else 0.0):
            servers.report_failure()
            return 1
        return code

    def _watch(self, servers: JobServers, handle: LocalHandle) -> int:
        """Wait for the worker's exit code; ask it to stop on the runner's request and when a server dies."""
        self._handle = handle
        state = {"pid": handle.pid, "start": guard.start_time(handle.pid), "machine": guard.machine()}
        write_note(self._directory / "state", state)
        while (code := handle.poll()) is None:
            self._pass_on(handle, self._lease.request or ("terminate" if servers.state() == "dead" else ""))
            time.sleep(JOB_POLL_SECONDS)
        return code

    def _pass_on(self, handle: LocalHandle, request: str) -> None:
        """Terminate or kill the worker as requested; kill it when its grace period is over."""
        if request == "kill" or (self._deadline is not None and time.monotonic() > self._deadline):
            handle.kill()
        elif request and self._deadline is None:
            self._deadline = time.monotonic() + WORKER_GRACE_SECONDS
            handle.terminate()


def run_job(directory: Path, request: Path, log: Path, env: dict[str, str], use_env_devices: bool) -> None:
    """Run one worker in a job.

    `use_env_devices`: the cluster assigned no GPUs to the job, and therefore hides all of them; the choice in `env`
    counts instead.
    """
    if use_env_devices:
        os.environ.pop(VISIBLE, None)
    WorkerJob(directory).run(request, log, env)


def job_directory(request: Path) -> Path:
    """Make a directory for the files `held` and `state`, a new one for each attempt at a request."""
    return Path(tempfile.mkdtemp(prefix=f"{request.stem}-", dir=request.parent))


def job_devices(order: vllm.ServerOrder) -> dict[str, str]:
    """The CUDA_VISIBLE_DEVICES of a server in a job: its numbers among the GPUs that the cluster gave the job."""
    visible = os.environ.get(VISIBLE, "").split(",")
    names = [visible[n] if n < len(visible) and visible[n] else str(n) for n in order.devices]
    return {VISIBLE: ",".join(names)} if names else {}


def seen_devices(env: Mapping[str, str]) -> dict[str, str]:
    """The CUDA_VISIBLE_DEVICES that a stage of this runner would see, as {name: value}; {} if it is not set."""
    devices = {**os.environ, **env}.get(VISIBLE)
    return {} if devices is None else {VISIBLE: devices}


def _worker_lives(state: Mapping[str, Any]) -> bool:
    return "pid" in state and guard.start_time(state["pid"]) == state["start"]
