"""Load balancing over servers that answer the same requests, with a circuit breaker for each.

A breaker opens after several failed requests in a row, of whichever caller, or after one refused connection. Nothing is
sent to that server then; its /health is polled with growing delays. Once it is healthy, requests go to it again, and
the first failure opens the breaker at once. A server that does not recover in time is marked unavailable; when all are,
every caller that waits for one gets the same ServiceError.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx

from speculators.errors import ServiceError
from speculators.job import Endpoint
from speculators.timeouts import FIRST_PROBE_SECONDS, HEALTH_CHECK_SECONDS, MAX_PROBE_SECONDS

MAX_FAILURES = 8
"""Failed requests in a row, over all that are in flight, that open the breaker."""
MAX_REFUSALS = 4
"""Refused connections in a row that make a server unavailable at once; a slow network never refuses."""
MAX_AFFINITIES = 10_000
"""Affinity keys whose server is remembered."""
LOG_LINES = 20
"""Last lines of a server's log that an error quotes."""


class EngineServer:
    """One server of the pool: its HTTP connections, its load and the state of its breaker.

    `connections` bounds the open connections; `timeout` is the default time limit of a request, in seconds.
    """

    def __init__(self, endpoint: Endpoint, connections: int, timeout: float) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        """Requests sent to it and not answered yet."""
        self.open = False
        """State of the breaker: true while nothing is sent."""
        self.unavailable = ""
        """Why the server is no longer waited for; empty while it is available or may recover."""
        self.failures = 0
        """Failed requests in a row."""
        self.last_failure = ""
        """What was wrong with the last of them."""
        self.probing: asyncio.Task[None] | None = None
        self.http = httpx.AsyncClient(
            base_url=endpoint.url,
            # A server that the runner did not start may need no key, and httpx refuses a header with an empty one.
            headers={"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections + 1),
            trust_env=False,
        )

    async def health(self) -> str:
        """Check /health once: `healthy`, `unhealthy`, `timeout`, or `refused` where nothing listens."""
        try:
            response = await self.http.get("/health", timeout=HEALTH_CHECK_SECONDS)
        except httpx.TimeoutException:
            return "timeout"
        except httpx.TransportError:
            return "refused"
        return "healthy" if response.is_success else "unhealthy"


class EnginePool:
    """The servers of one client.

    `connections` bounds the open connections of each server, `timeout` is the default time limit of a request, and
    `recovery_timeout` how long an unhealthy server may take to recover; both in seconds.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], *, connections: int, timeout: float, recovery_timeout: float
    ) -> None:
        self.servers = [EngineServer(endpoint, connections, timeout) for endpoint in endpoints]
        self._recovery_timeout = recovery_timeout
        self._max_imbalance = max(1, connections // len(self.servers))
        self._affinities: dict[str, EngineServer] = {}
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Stop the health checks and close all connections."""
        for server in self.servers:
            if server.probing is not None:
                server.probing.cancel()
                await asyncio.gather(server.probing, return_exceptions=True)
            await server.http.aclose()

    @contextlib.asynccontextmanager
    async def server(self, affinity_key: str = "", avoid: EngineServer | None = None) -> AsyncIterator[EngineServer]:
        """Reserve a server for one request: the least loaded one, or the one that served `affinity_key` before.

        Requests that begin with the same tokens should have the same key: their server has the beginning in its prefix
        cache. They move to another server when theirs has much more in flight than the least loaded one. `avoid` is
        chosen only if no other is ready.

        Raises:
            ServiceError: all servers are unavailable.
        """
        while not (ready := [server for server in self.servers if not server.open]):
            if all(server.unavailable for server in self.servers):
                raise self.unavailable_error()
            await self._changed.wait()
        server = self._choose([server for server in ready if server is not avoid] or ready, affinity_key)
        server.in_flight += 1
        try:
            yield server
        finally:
            server.in_flight -= 1

    def _choose(self, ready: Sequence[EngineServer], affinity_key: str) -> EngineServer:
        least_loaded = min(ready, key=lambda server: server.in_flight)
        if not affinity_key or len(self.servers) == 1:
            return least_loaded
        previous = self._affinities.get(affinity_key)
        allowed = least_loaded.in_flight + self._max_imbalance
        if previous is not None and previous in ready and previous.in_flight <= allowed:
            return previous
        if len(self._affinities) >= MAX_AFFINITIES:
            del self._affinities[next(iter(self._affinities))]
        self._affinities[affinity_key] = least_loaded
        return least_loaded

    def record_success(self, server: EngineServer) -> None:
        """Record that the server answered a request, also if the answer refuses it."""
        server.failures = 0

    def record_failure(self, server: EngineServer, problem: str, *, refused: bool = False) -> None:
        """Record a request without an answer, or with a 429 or 5xx; opens the breaker if there are too many."""
        server.failures += 1
        server.last_failure = problem
        if (refused or server.failures >= MAX_FAILURES) and not server.open:
            server.open = True
            server.probing = asyncio.ensure_future(self._probe(server))

    async def _probe(self, server: EngineServer) -> None:
        """Poll /health until the server is healthy, then close its breaker."""
        start, refusals, delay = time.monotonic(), 0, FIRST_PROBE_SECONDS
        while True:
            await asyncio.sleep(delay)
            health = await server.health()
            if health == "healthy":
                server.open, server.unavailable = False, ""
                server.failures = MAX_FAILURES - 1
                break
            refusals = refusals + 1 if health == "refused" else 0
            # The refused request that opened the breaker counts as the first refusal.
            if refusals >= MAX_REFUSALS - 1:
                self._mark_unavailable(server, f"the server at {server.endpoint.url} refuses connections")
            elif time.monotonic() - start > self._recovery_timeout:
                symptom = "has been unhealthy" if health == "unhealthy" else "has not answered"
                self._mark_unavailable(
                    server,
                    f"the server at {server.endpoint.url} {symptom} for {self._recovery_timeout:g} s "
                    f"({server.last_failure})",
                )
            if refusals == 0 or server.unavailable:
                delay = min(2 * delay, MAX_PROBE_SECONDS)
        self._notify()

    def _mark_unavailable(self, server: EngineServer, reason: str) -> None:
        if not server.unavailable:
            server.unavailable = reason
            self._notify()

    def _notify(self) -> None:
        """Wake all callers that wait for a server."""
        self._changed.set()
        self._changed.clear()

    def unavailable_error(self) -> ServiceError:
        """The error for callers when all servers are unavailable: the reason for each, with the end of its log."""
        reasons = [f"{s.unavailable}; {summarize_log(s.endpoint.log)}" for s in self.servers if s.unavailable]
        return ServiceError("; ".join(reasons), RESTART_HINT)


RESTART_HINT = "fix the error in the server's log, then run the same command again: finished rows are kept"


def summarize_log(log: Path) -> str:
    """Summarize the end of a server's log: the first error after the last fatal error, and the last lines."""
    if not log.is_file():
        return f"there is no log at {log}"
    lines = log.read_text(errors="replace").splitlines()
    # When an engine dies, one traceback follows for every request in flight: the cause comes before them.
    fatal = [i for i, line in enumerate(lines) if "fatal error" in line]
    after = lines[fatal[-1] :] if fatal else []
    errors = [line for line in after if re.search(r"\b\w+(Error|Exception|Interrupt)\b: ", line)]
    cause = f"first error: {errors[0].strip()}\n" if errors else ""
    tail = "\n".join(lines[-LOG_LINES:])
    return f"{cause}last lines of {log}:\n{tail}"
