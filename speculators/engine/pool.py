"""Servers that answer the same requests: which of them gets the next one, and which is left alone for the time being.

Every server has a circuit breaker. It opens when requests fail one after the other, whosesoever they are, or when a
connection is refused: nothing is sent to that server then, and its /health is asked with growing pauses. Once it is
healthy requests go to it again, and the first failure opens the breaker at once. A server that stays away counts as
gone; when all are, whoever waits for one gets the one error that says so.
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

FAILURES = 8
"""Failed requests in a row, over all that are in flight, after which nothing more is sent."""
REFUSED = 4
"""Refused connections in a row after which a server counts as gone; a refusal is never a slow network."""
FIRST_PROBE = 0.25
"""Seconds before /health is asked; twice as many before each further time that it is slow, or says no."""
LONGEST_PROBE = 15.0
PROBE_TIMEOUT = 5.0
HOMES = 10_000
"""Beginnings whose server is remembered."""
LOG_LINES = 20


class Server:
    """One server, as its requests see it."""

    def __init__(self, endpoint: Endpoint, connections: int, timeout: float) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.open = False
        """Its breaker: true while nothing is sent."""
        self.gone = ""
        """Why nobody waits for it any more; empty while somebody does."""
        self.failures = 0
        """In a row."""
        self.problem = ""
        """The last of them."""
        self.probing: asyncio.Task[None] | None = None
        self.http = httpx.AsyncClient(
            base_url=endpoint.url,
            # A server that is not ours may want no key, and an empty one makes no header.
            headers={"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections + 1),
            trust_env=False,
        )

    async def health(self) -> str:
        """`healthy`, `ill`, `slow`, or `refused` where nobody listens."""
        try:
            response = await self.http.get("/health", timeout=PROBE_TIMEOUT)
        except httpx.TimeoutException:
            return "slow"
        except httpx.TransportError:
            return "refused"
        return "healthy" if response.is_success else "ill"


class Pool:
    """The servers of one client. `patience` is how long, in seconds, one that is not healthy is waited for."""

    def __init__(self, endpoints: Sequence[Endpoint], *, connections: int, timeout: float, patience: float) -> None:
        self.servers = [Server(endpoint, connections, timeout) for endpoint in endpoints]
        self._patience = patience
        self._slack = max(1, connections // len(self.servers))
        self._homes: dict[str, Server] = {}
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Ask nothing more."""
        for server in self.servers:
            if server.probing is not None:
                server.probing.cancel()
                await asyncio.gather(server.probing, return_exceptions=True)
            await server.http.aclose()

    @contextlib.asynccontextmanager
    async def server(self, near: str = "", avoid: Server | None = None) -> AsyncIterator[Server]:
        """A server for one request: the one with the fewest in flight, or the one where `near` was before.

        What begins alike is `near`: a server that has seen the beginning does not compute it again. It goes elsewhere
        when its server has too much to do, or is to be avoided if there is another.

        Raises:
            ServiceError: all are gone.
        """
        while not (ready := [server for server in self.servers if not server.open]):
            if all(server.gone for server in self.servers):
                raise self.all_gone()
            await self._changed.wait()
        server = self._nearest([server for server in ready if server is not avoid] or ready, near)
        server.in_flight += 1
        try:
            yield server
        finally:
            server.in_flight -= 1

    def _nearest(self, ready: Sequence[Server], near: str) -> Server:
        least = min(ready, key=lambda server: server.in_flight)
        if not near or len(self.servers) == 1:
            return least
        home = self._homes.get(near)
        if home in ready and home is not None and home.in_flight <= least.in_flight + self._slack:
            return home
        if len(self._homes) >= HOMES:
            del self._homes[next(iter(self._homes))]
        self._homes[near] = least
        return least

    def worked(self, server: Server) -> None:
        """A request was answered, be it that it is wrong."""
        server.failures = 0

    def failed(self, server: Server, problem: str, *, refused: bool = False) -> None:
        """A request was not answered, or by a failure of the server."""
        server.failures += 1
        server.problem = problem
        if (refused or server.failures >= FAILURES) and not server.open:
            server.open = True
            server.probing = asyncio.ensure_future(self._probe(server))

    async def _probe(self, server: Server) -> None:
        """Ask until the server is healthy; others may be busy meanwhile."""
        began, refused, pause = time.monotonic(), 0, FIRST_PROBE
        while True:
            await asyncio.sleep(pause)
            health = await server.health()
            if health == "healthy":
                server.open, server.gone = False, ""
                server.failures = FAILURES - 1
                break
            refused = refused + 1 if health == "refused" else 0
            if refused >= REFUSED - 1:
                self._give_up(server, f"the server at {server.endpoint.url} is gone")
            elif time.monotonic() - began > self._patience:
                how = "says that it is not healthy" if health == "ill" else "does not answer"
                self._give_up(
                    server, f"the server at {server.endpoint.url} {how} for {self._patience:g} s ({server.problem})"
                )
            if refused == 0 or server.gone:
                pause = min(2 * pause, LONGEST_PROBE)
        self._wake()

    def _give_up(self, server: Server, why: str) -> None:
        if not server.gone:
            server.gone = why
            self._wake()

    def _wake(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()
        self._changed.clear()

    def all_gone(self) -> ServiceError:
        """The error of a pool without servers."""
        why = "; ".join(f"{server.gone}; {explain(server.endpoint.log)}" for server in self.servers if server.gone)
        return ServiceError(why, "mend what its log names, then run the same command again: what is finished is kept")


def explain(log: Path) -> str:
    """What a server's log says about its end: the first error of the last failure, and the last lines."""
    if not log.is_file():
        return f"there is no log at {log}"
    lines = log.read_text(errors="replace").splitlines()
    # An engine's death is followed by one traceback for every request that was in flight: the cause comes before them.
    fatal = [i for i, line in enumerate(lines) if "fatal error" in line]
    after = lines[fatal[-1] :] if fatal else []
    errors = [line for line in after if re.search(r"\b\w+(Error|Exception|Interrupt)\b: ", line)]
    cause = f"it broke at: {errors[0].strip()}\n" if errors else ""
    tail = "\n".join(lines[-LOG_LINES:])
    return f"{cause}last lines of {log}:\n{tail}"
