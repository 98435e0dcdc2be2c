"""Requests to vLLM servers: many in flight, retried where that can help, and one clear error when all are gone.

    async with Client(endpoint, concurrency=32, retries=3, timeout=600.0) as client:
        answer = await client.chat(messages, item="conversation c7", max_tokens=64, temperature=0.0)
        again = await client.complete(answer.prompt_ids, item="conversation c7", max_tokens=64)
        token_ids, states = (await client.hidden_states(token_ids, item="row 12")).take()
        async for result in client.map(work, items): ...

What is retried, with exponential back-off: time-outs, broken connections, 429 and 5xx. What is not: a 4xx, which is
about the item and names it. Where several servers answer the same requests they share them; which one gets what, and
what is done about one that fails, is the affair of `pool`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx

from speculators.engine.mooncake import Store
from speculators.engine.pool import Pool, Server, explain
from speculators.engine.transfer import Promised, promised
from speculators.errors import ServiceError, StageError
from speculators.job import Endpoint

FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LONGEST_PAUSE = 15.0
TOKENS_IN_TIME = 2048
"""Tokens, of prompt and answer together, that a request may ask for within `timeout`; for more it gets more time."""

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer, as the server saw it."""

    prompt_ids: list[int]
    """The prompt after the chat template."""
    token_ids: list[int]
    """The sampled tokens, the end-of-sequence token with them."""
    text: str
    finish_reason: str
    logprobs: list[dict[int, float]]
    """Per sampled token {token id: log-probability} of the likeliest tokens; empty unless asked for."""
    kv_transfer_params: dict[str, Any]
    seconds: float
    """From sending the request to having the answer, without time in the queue or for failed attempts."""
    url: str = ""
    """The server that gave it."""


class Client:
    """An asynchronous client of one server, or of several that serve the same.

    `concurrency` bounds the requests in flight, whoever sends them. `timeout`, in seconds, is what a request of up to
    `TOKENS_IN_TIME` tokens may take, and how long a server that is not healthy is waited for.
    """

    def __init__(self, endpoint: Endpoint, *, concurrency: int, retries: int, timeout: float) -> None:
        self.endpoint = endpoint
        self.concurrency = concurrency
        self.retried = 0
        self._retries = retries
        self._timeout = timeout
        self._slots = asyncio.Semaphore(concurrency)
        servers = [endpoint, *(dataclasses.replace(endpoint, url=url, also=[]) for url in endpoint.also)]
        self._store = Store(endpoint.mooncake) if endpoint.mooncake else None
        self._pool = Pool(servers, connections=concurrency, timeout=timeout, patience=timeout)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.close()
        if self._store is not None:
            self._store.close()

    async def chat(self, messages: Sequence[dict[str, Any]], *, item: str, near: str = "", **fields: Any) -> Completion:
        """Answer a conversation. `fields` are the request's own (`max_tokens`, `temperature`, `logprobs`, `seed`...).

        `item` is what an error calls this request. Requests with the same `near` begin alike, and go to one server.
        `logprobs=N` asks for the N likeliest tokens a position.
        """
        if "logprobs" in fields:
            fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
        body, said = await self._post("/v1/chat/completions", {"messages": list(messages), **fields}, item, near)
        choice = body["choices"][0]
        positions = (choice.get("logprobs") or {}).get("content") or []
        answer = _completion(
            body,
            choice,
            text=choice["message"].get("content") or "",
            prompt_ids=body.get("prompt_token_ids"),
            logprobs=[{_token_id(t["token"]): t["logprob"] for t in p["top_logprobs"]} for p in positions],
            **said,
        )
        return answer if fields.get("kv_transfer_params") else await self._without_states(answer, item)

    async def complete(self, prompt_ids: Sequence[int], *, item: str, near: str = "", **fields: Any) -> Completion:
        """Continue token ids as they are, without a template; otherwise as `chat`."""
        body, said = await self._post("/v1/completions", {"prompt": list(prompt_ids), **fields}, item, near)
        choice = body["choices"][0]
        positions = (choice.get("logprobs") or {}).get("top_logprobs") or []
        answer = _completion(
            body,
            choice,
            text=choice["text"],
            prompt_ids=choice.get("prompt_token_ids"),
            logprobs=[{_token_id(token): value for token, value in (p or {}).items()} for p in positions],
            **said,
        )
        return answer if fields.get("kv_transfer_params") else await self._without_states(answer, item)

    async def tokenize(self, messages: Sequence[dict[str, Any]], *, item: str, near: str = "") -> list[int]:
        """The token ids that `chat` would send these messages as, with the opening of the answer."""
        body, _ = await self._post("/tokenize", {"messages": list(messages), "add_generation_prompt": True}, item, near)
        return list(body["tokens"])

    async def hidden_states(self, token_ids: Sequence[int], *, item: str, near: str = "") -> Promised:
        """Run the target over `token_ids` on a server in mode `extract`; returns when its states are there."""
        answer = await self.complete(
            token_ids,
            item=item,
            near=near,
            max_tokens=1,
            temperature=0.0,
            kv_transfer_params={"hidden_states": True},
            # What another request left in the prefix cache was computed in other pieces, and differs in the last bits.
            cache_salt=uuid.uuid4().hex,
        )
        return await self.states_of(answer, item=item)

    async def states_of(self, answer: Completion, *, item: str) -> Promised:
        """The states of an answer whose request asked for them; returns when they are there."""
        states = self._promised(answer, item)
        if states is None:
            raise ServiceError(
                f"the server answered {item} without hidden states",
                f"it has to be served in mode `extract`, with a connector that keeps them (in a Mooncake store only "
                f"with extract.connector=mooncake); its mode is `{self.endpoint.mode}`",
            )
        if (problem := states.unseen(answer.url)) is not None:
            raise problem
        server = next(server for server in self._pool.servers if server.endpoint.url == answer.url)
        await self._appear(states, server, self._limit(len(answer.prompt_ids) + len(answer.token_ids)))
        return states

    async def _without_states(self, answer: Completion, item: str) -> Completion:
        """Remove the states of a request that did not ask for them: some connectors write those of every request."""
        states = self._promised(answer, item)
        if states is not None and states.unseen(answer.url) is None:
            with contextlib.suppress(StageError):  # where they could not be written nothing is left
                await asyncio.to_thread((await self.states_of(answer, item=item)).drop)
        return answer

    def _promised(self, answer: Completion, item: str) -> Promised | None:
        return promised(answer.kv_transfer_params, self.endpoint.directory, self._store, item)

    async def map(self, work: Callable[[A], Awaitable[B]], items: Iterable[A]) -> AsyncGenerator[B, None]:
        """`work` on every item, `concurrency` of them at a time; yields results as they finish.

        `items` is drawn from as results are taken, so memory stays bounded. The first error stops the rest.
        """
        remaining = iter(items)
        running: set[asyncio.Future[B]] = set()
        done: set[asyncio.Future[B]] = set()
        try:
            while True:
                for item in remaining:
                    running.add(asyncio.ensure_future(work(item)))
                    if len(running) >= self.concurrency:
                        break
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *done, return_exceptions=True)

    async def map_in_order(self, work: Callable[[A], Awaitable[B]], items: Iterable[A]) -> AsyncGenerator[B, None]:
        """As `map`, but results come in the order of the items.

        So that a slow one does not leave the server idle, twice `concurrency` of them are begun or wait for their turn.
        """
        begun: deque[asyncio.Future[B]] = deque()
        try:
            for item in items:
                begun.append(asyncio.ensure_future(work(item)))
                if len(begun) >= 2 * self.concurrency:
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    async def _post(
        self, path: str, fields: dict[str, Any], item: str, near: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The body of an answer; and which server gave it, after how many seconds."""
        payload = {
            "model": self.endpoint.model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **fields,
        }
        limit = self._limit(len(fields.get("prompt", ())) + fields.get("max_tokens", 0))
        failures, failed = 0, None
        while True:
            async with self._slots, self._pool.server(near, avoid=failed) as server:
                start = time.perf_counter()
                try:
                    response = await server.http.post(path, json=payload, timeout=limit)
                    if response.is_success:
                        self._pool.worked(server)
                        return response.json(), {"seconds": time.perf_counter() - start, "url": server.endpoint.url}
                    problem = self._judge(response, item, server)
                except httpx.ConnectError:
                    self._pool.failed(server, "it refuses connections", refused=True)
                    continue
                except httpx.TimeoutException:
                    problem = f"no answer within {limit:g} s"
                except httpx.TransportError as error:
                    problem = f"the connection broke ({type(error).__name__})"
                self._pool.failed(server, problem)
                failed = server
            if failures >= self._retries:
                raise ServiceError(
                    f"{item}: {problem}, {failures + 1} times in a row; {explain(server.endpoint.log)}",
                    "run the same command again: what is finished is kept",
                )
            await asyncio.sleep(min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE))
            failures += 1
            self.retried += 1

    def _limit(self, tokens: int) -> float:
        """Seconds that a request may take which asks for so many tokens, those of its prompt included."""
        return self._timeout * max(1.0, tokens / TOKENS_IN_TIME)

    def _judge(self, response: httpx.Response, item: str, server: Server) -> str:
        """What is wrong, if another attempt may help; raises where it cannot."""
        said = _said(response)
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answered {response.status_code} ({said})"
        self._pool.worked(server)
        if response.status_code in (401, 403, 404):
            raise ServiceError(
                f"the server at {server.endpoint.url} answered {response.status_code}: {said}",
                f"it has to serve the model `{self.endpoint.model}` and take this run's key",
            )
        raise StageError(f"the server refuses {item}: {said}", "leave this item out, or mend it where it comes from")

    async def _appear(self, states: Promised, server: Server, limit: float) -> None:
        """Wait until the connector has written them."""
        pause = 0.001
        next_check = time.monotonic() + 2.0
        try:
            async with asyncio.timeout(limit):
                while not await states.there():
                    if time.monotonic() > next_check:
                        if await server.health() in ("refused", "ill"):
                            raise ServiceError(
                                f"the server at {server.endpoint.url} is gone; {explain(server.endpoint.log)}",
                                "mend what its log names, then run the same command again: what is finished is kept",
                            )
                        next_check = time.monotonic() + 2.0
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.05)
        except TimeoutError:
            raise states.late(limit) from None


def _completion(
    body: dict[str, Any],
    choice: dict[str, Any],
    *,
    text: str,
    prompt_ids: list[int] | None,
    logprobs: list[dict[int, float]],
    seconds: float,
    url: str,
) -> Completion:
    if prompt_ids is None or choice.get("token_ids") is None:
        raise ServiceError("the server does not return token ids", "serve the target with vLLM >= 0.11")
    return Completion(
        prompt_ids=prompt_ids,
        token_ids=choice["token_ids"],
        text=text,
        finish_reason=choice["finish_reason"],
        logprobs=logprobs,
        kv_transfer_params=body.get("kv_transfer_params") or {},
        seconds=seconds,
        url=url,
    )


def _token_id(name: str) -> int:
    """`token_id:42`, which the server writes in place of a token's text."""
    return int(name.removeprefix("token_id:"))


def _said(response: httpx.Response) -> str:
    """The message in an error body, whatever its form."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:200].strip() or "no message"
