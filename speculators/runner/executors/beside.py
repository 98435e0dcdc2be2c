"""The servers of a worker on another machine: in the worker's own job, on loopback there, for nobody else.

The runner knows what they are but not where. It orders them in the request; here they are started, with ports and keys
of this machine's making, and made known to the worker in the same request. The keys go through its environment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from speculators.config.schema import from_builtins
from speculators.job import Request, write_json
from speculators.runner.servers import server as service
from speculators.runner.servers import vllm

POLL = 0.1
"""Seconds between two looks at a server that may be dead."""


class Beside:
    """The servers that a request orders; most order none."""

    def __init__(self, request: Path, env: Mapping[str, str]) -> None:
        self._path, self._request = request, Request.read(request)
        orders = {name: from_builtins(vllm.Order, plain) for name, plain in self._request.orders.items()}
        self._servers = {name: vllm.server(order, env) for name, order in orders.items()}

    def start(self) -> None:
        """Start them, and return at once."""
        for server in self._servers.values():
            server.start()

    def state(self) -> str:
        """`dead` as soon as one of them is; `starting`, until all are `ready`."""
        states = {server.poll() for server in self._servers.values()}
        return next((state for state in ("dead", "starting") if state in states), "ready")

    def introduce(self) -> dict[str, str]:
        """Tell the worker of them. Returns the variables with their keys, which no file holds."""
        self._request.services = {name: server.plain() for name, server in self._servers.items()}
        self._request.write(self._path)
        return {name: key for server in self._servers.values() for name, key in server.worker_env().items()}

    def lost(self, seconds: float) -> bool:
        """Whether one of them is dead, or turns out to be in this time: its client may be the first to notice."""
        deadline = time.monotonic() + seconds
        while self._servers and self.state() != "dead" and time.monotonic() < deadline:
            time.sleep(POLL)
        return self.state() == "dead"

    def say_why(self) -> None:
        """What was wrong with the one that is dead, where the worker would say what was wrong with itself."""
        dead = service.lost(self._servers.values())
        assert dead is not None
        failure, work = dead.failure(), Path(self._request.work)
        work.mkdir(parents=True, exist_ok=True)
        said = {"message": failure.message, "hint": failure.hint, "kind": type(failure).__name__}
        write_json(work / "failure.json", {**said, "passing": dead.passing})

    def stop(self, *, at_once: bool = False) -> None:
        """End them all at the same time, and return when nothing is left of them; `at_once`: without grace."""
        for server in self._servers.values():
            if at_once:
                server.kill()
            server.close()
        for server in self._servers.values():
            server.stop()
