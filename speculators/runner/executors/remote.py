"""Workers that another program starts for us: what the executors share that submit jobs to a cluster.

The job is `serve`, the far end. Where it finds itself it starts the servers that the request orders (`beside`), then
the worker (`local`), so all of them end with it; it holds to the runner's lease, so it ends with the runner. Two files
in a directory that both sides see stand for the pipe and the wait of `local`:

    held     written here: the runner's signs of life, and what it wishes (see `execution.lease`)
    state    written there: that it has begun, then the worker's pid, then its exit code
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

from speculators.runner.execution.lease import Holder, Lease, read_note, write_note
from speculators.runner.executors.beside import Beside
from speculators.runner.executors.local import LocalExecutor, LocalHandle
from speculators.runner.servers import guard
from speculators.runner.servers.server import DEATH_SECONDS

POLL = 0.1
"""Seconds between two looks of the far end."""
GRACE = 30.0
"""Seconds that a worker has to write a checkpoint when it is asked to stop."""
ASK = 0.5
"""Seconds between two questions to the cluster, which may cost it something."""
PATIENCE = 60.0
"""Seconds after the end of a job on another machine until its last words must be here, and its worker gone."""
ASKED_TO_STOP = 128 + signal.SIGTERM
DEVICES = "CUDA_VISIBLE_DEVICES"


class Job(Protocol):
    """A job as its cluster sees it."""

    here: bool
    """It runs on this machine."""

    def ended(self) -> str | None:
        """None while it waits or runs; then how it ended, in the cluster's words."""

    def cancel(self) -> None:
        """Take it out of the queue."""

    def output(self) -> str:
        """What the far end itself has printed: why it could not start a worker, for one."""


class RemoteHandle:
    """See `executors.Handle`."""

    def __init__(self, place: Path, log: Path, submit: Callable[[], Job]) -> None:
        self._place = place
        self._log = log
        self._code: int | None = None
        self._wished = False
        self._asked = 0.0
        self._ended_since: float | None = None
        write_note(place / "state", {})
        self._lease = Lease(place / "held")  # before the job, which may run at once
        try:
            self._job = submit()
        except BaseException:
            self._lease.release()
            raise

    @property
    def pid(self) -> int:
        """The worker's process id on its machine; 0 as long as it waits in a queue."""
        return int(self._state().get("pid", 0))

    def poll(self) -> int | None:
        """See `executors.Handle.poll`."""
        if self._code is None:
            self._code = self._look()
            if self._code is not None:
                self._lease.release()
            if self._code == 0:
                shutil.rmtree(self._place, ignore_errors=True)
        return self._code

    def terminate(self) -> None:
        """See `executors.Handle.terminate`."""
        self._wish("terminate")

    def kill(self) -> None:
        """See `executors.Handle.kill`; done by the far end, which has a moment to see it."""
        self._wish("kill")

    def _wish(self, what: str) -> None:
        self._wished = True
        if self._code is None:
            self._lease.wish(what)
            if not self._state():
                self._job.cancel()

    def _look(self) -> int | None:
        """The worker's exit code, once neither it nor its job is left."""
        code: int | None = self._state().get("code")
        if code is not None and not self._job.here:
            return code
        if time.monotonic() - self._asked < ASK and code is None:
            return None
        self._asked = time.monotonic()
        how = self._job.ended()
        state = self._state()  # read again: its last words may have come between the two looks
        if how is None:
            self._ended_since = None
            return None
        if "code" in state:
            return int(state["code"])
        if self._ended_since is None:
            self._ended_since = time.monotonic()
        if self._job.here and _lives(state):
            return None  # its pipe is closed: it stops, within its own grace
        if not self._job.here and time.monotonic() - self._ended_since < PATIENCE:
            return None
        if self._wished and not state:
            return ASKED_TO_STOP  # before it began
        with self._log.open("a") as log:
            log.write(f"{self._job.output()}\n{how}\n")
        return -signal.SIGKILL

    def _state(self) -> dict[str, Any]:
        return read_note(self._place / "state")


class Served:
    """The far end, as long as its worker runs."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._holder = Holder(place / "held")
        self._deadline: float | None = None
        self._servers: Beside | None = None
        self._handle: LocalHandle | None = None

    def run(self, request: Path, log: Path, env: dict[str, str]) -> None:
        """Start the worker if its runner is there to want it; return when nothing of it and its servers is left."""
        while self._holder.lives is None:
            time.sleep(POLL)
        code, wanted = ASKED_TO_STOP, not self._holder.wish
        if wanted:
            write_note(self._place / "state", {"machine": guard.machine()})
            self._servers = servers = Beside(request, env)
            try:
                code = self._work(servers, request, log, env)
            finally:
                servers.stop(at_once=self._holder.wish == "kill")
        write_note(self._place / "state", {**read_note(self._place / "state"), "code": code})

    def stop(self) -> None:
        """The cluster wants the machine back: let the worker write a checkpoint, and say nothing of its end."""
        while self._handle is not None and self._handle.poll() is None:
            self._obey(self._handle, "terminate")
            time.sleep(POLL)
        if self._servers is not None:
            self._servers.stop()

    def _work(self, servers: Beside, request: Path, log: Path, env: dict[str, str]) -> int:
        """From the start of the servers to the end of the worker; its exit code, or 1 where a server was lost."""
        servers.start()
        while servers.state() == "starting" and not self._holder.wish:
            time.sleep(POLL)
        if self._holder.wish:
            return ASKED_TO_STOP
        code = 1
        if servers.state() == "ready":
            code = self._watched(servers, LocalExecutor().submit(request, log, {**env, **servers.introduce()}))
        if code != 0 and not self._holder.wish and servers.lost(DEATH_SECONDS if code == 1 else 0.0):
            servers.say_why()
            return 1
        return code

    def _watched(self, servers: Beside, handle: LocalHandle) -> int:
        """The worker's exit code. It is asked to stop when somebody wishes that, and when a server is lost."""
        self._handle = handle
        state = {"pid": handle.pid, "start": guard.start_time(handle.pid), "machine": guard.machine()}
        write_note(self._place / "state", state)
        while (code := handle.poll()) is None:
            self._obey(handle, self._holder.wish or ("terminate" if servers.state() == "dead" else ""))
            time.sleep(POLL)
        return code

    def _obey(self, handle: LocalHandle, wish: str) -> None:
        if wish == "kill" or (self._deadline is not None and time.monotonic() > self._deadline):
            handle.kill()
        elif wish and self._deadline is None:
            self._deadline = time.monotonic() + GRACE
            handle.terminate()


def serve(place: Path, request: Path, log: Path, env: dict[str, str], devices_are_ours: bool) -> None:
    """One job's whole life at the far end.

    `devices_are_ours`: the cluster has not given GPUs to this job. It then hides them all, and what `env` says of
    them counts instead.
    """
    if devices_are_ours:
        os.environ.pop(DEVICES, None)
    Served(place).run(request, log, env)


def place_beside(request: Path) -> Path:
    """A directory for the two files, new for each attempt at one request."""
    return Path(tempfile.mkdtemp(prefix=f"{request.stem}-", dir=request.parent))


def seen_devices(env: Mapping[str, str]) -> dict[str, str]:
    """The choice of GPUs that a stage of this runner would see."""
    found = {**os.environ, **env}.get(DEVICES)
    return {} if found is None else {DEVICES: found}


def _lives(state: Mapping[str, Any]) -> bool:
    return "pid" in state and guard.start_time(state["pid"]) == state["start"]
