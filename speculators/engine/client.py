"""An asynchronous client of vLLM servers: bounded concurrency, retries, and one clear error when all servers are gone.

    async with Client(endpoint, concurrency=32, retries=3, timeout=600.0) as client:
        answer = await client.chat(messages, item="conversation c7", max_tokens=64, temperature=0.0)
        again = await client.complete(answer.prompt_ids, item="conversation c7", max_tokens=64)
        token_ids, hidden_states = (await client.hidden_states(token_ids, item="row 12")).load()
        async for result in client.map(work, items): ...

Time-outs, broken connections, 429 and 5xx are retried with exponential back-off. Other 4xx are not: they are about the
request, and the error names its item. Several servers that answer the same requests share them (see `pool`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx

from speculators import timeouts
from speculators.engine.mooncake import MooncakeStore
from speculators.engine.pool import RESTART_HINT, EnginePool, EngineServer, summarize_log
from speculators.engine.transfer import Transfer, announced_transfer
from speculators.errors import RunError, ServiceError, StageError
from speculators.job import Endpoint

TOKENS_PER_TIMEOUT = 2048
"""Tokens, prompt and answer together, of a request that gets `timeout`; a larger one gets proportionally more time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class RefusedError(StageError):
    """The server refuses a request for what it contains; the same request would be refused again."""

    def __init__(self, item: str, reason: str) -> None:
        super().__init__(f"the server refuses {item}: {reason}", "fix or remove this item in its data set")
        self.item, self.reason = item, reason

    def __reduce__(self) -> tuple[type[RunError], tuple[str, str]]:
        return type(self), (self.item, self.reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """An answer of the server, with the token ids that it read and sampled."""

    prompt_ids: list[int]
    """Token ids of the prompt, after the chat template."""
    token_ids: list[int]
    """The sampled token ids, the end-of-sequence token included."""
    text: str
    """The answer as text, without special tokens."""
    finish_reason: str
    """`stop` at an end-of-sequence token, `length` at max_tokens."""
    logprobs: list[dict[int, float]]
    """Per sampled token {token id: log-probability} of the most probable tokens; empty unless requested."""
    kv_transfer_params: dict[str, Any]
    """What the server's KV connector announces (see `transfer`); empty without one."""
    seconds: float
    """Time from sending the request to receiving the answer, without the client's queue and failed attempts."""
    url: str = ""
    """The server that answered."""
    reasoning: str = ""
    """What a reasoning parser took out of the text; empty without one."""
    tool_calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What a tool parser took out of the text, in OpenAI's form; empty without one."""


class Client:
    """An asynchronous client of one server, or of several that serve the same model.

    Args:
        endpoint: the server, and the URLs of further ones.
        concurrency: the largest number of requests in flight, over all callers.
        retries: further attempts of a request that fails.
        timeout: seconds that a request of up to `TOKENS_PER_TIMEOUT` tokens may take, and that an unhealthy server may
            take to recover.
    """

    def __init__(self, endpoint: Endpoint, *, concurrency: int, retries: int, timeout: float) -> None:
        self.endpoint = endpoint
        self.concurrency = concurrency
        self.retried = 0
        """Attempts that were repeated so far."""
        self._retries = retries
        self._timeout = timeout
        self._slots = asyncio.Semaphore(concurrency)
        servers = [endpoint, *(dataclasses.replace(endpoint, url=url, also=[]) for url in endpoint.also)]
        self._store = MooncakeStore(endpoint.mooncake) if endpoint.mooncake else None
        self._pool = EnginePool(servers, connections=concurrency, timeout=timeout, recovery_timeout=timeout)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.close()
        if self._store is not None:
            self._store.close()

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, item: str, affinity_key: str = "", **fields: Any
    ) -> Completion:
        """Generate the answer to a conversation.

        Args:
            messages: the conversation, as {role, content} objects.
            item: the name of the request in errors.
            affinity_key: requests with the same key begin with the same tokens; they go to one server.
            fields: fields of the request (`max_tokens`, `temperature`, `seed`, ...); `logprobs=N` asks for the N most
                probable tokens per position.

        Raises:
            RefusedError: the server refuses this request.
            ServiceError: no server answers it, or the server does not return token ids.
        """
        if "logprobs" in fields:
            fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
        body, origin = await self._post(
            "/v1/chat/completions", {"messages": list(messages), **fields}, item, affinity_key
        )
        choice = body["choices"][0]
        message, entries = choice["message"], (choice.get("logprobs") or {}).get("content") or []
        answer = _completion(
            body,
            choice,
            text=message.get("content") or "",
            reasoning=message.get("reasoning") or message.get("reasoning_content") or "",
            tool_calls=message.get("tool_calls") or [],
            prompt_ids=body.get("prompt_token_ids"),
            logprobs=[{_token_id(t["token"]): t["logprob"] for t in entry["top_logprobs"]} for entry in entries],
            **origin,
        )
        return answer if fields.get("kv_transfer_params") else await self._delete_unrequested(answer, item)

    async def complete(
        self, prompt_ids: Sequence[int], *, item: str, affinity_key: str = "", **fields: Any
    ) -> Completion:
        """Continue `prompt_ids` without a chat template; arguments and errors as in `chat`."""
        body, origin = await self._post("/v1/completions", {"prompt": list(prompt_ids), **fields}, item, affinity_key)
        choice = body["choices"][0]
        entries = (choice.get("logprobs") or {}).get("top_logprobs") or []
        answer = _completion(
            body,
            choice,
            text=choice["text"],
            prompt_ids=choice.get("prompt_token_ids"),
            logprobs=[{_token_id(token): value for token, value in (entry or {}).items()} for entry in entries],
            **origin,
        )
        return answer if fields.get("kv_transfer_params") else await self._delete_unrequested(answer, item)

    async def tokenize(
        self, messages: Sequence[Mapping[str, Any]], *, item: str, affinity_key: str = "", **fields: Any
    ) -> list[int]:
        """The prompt token ids of `messages` in `chat`: the chat template with the generation prompt.

        `fields` are those of the request that the chat template gets: `tools`, `chat_template_kwargs`.
        """
        payload = {"messages": list(messages), "add_generation_prompt": True, **fields}
        body, _ = await self._post("/tokenize", payload, item, affinity_key)
        return list(body["tokens"])

    async def hidden_states(self, token_ids: Sequence[int], *, item: str, affinity_key: str = "") -> Transfer:
        """Run the target over `token_ids` on a server in mode `extract`; returns when its hidden states are written."""
        return await self.requested_states(
            await self.prefill(token_ids, item=item, affinity_key=affinity_key), item=item
        )

    async def prefill(
        self, token_ids: Sequence[int], *, item: str, affinity_key: str = "", **fields: Any
    ) -> Completion:
        """Run the target over `token_ids` and have their hidden states written; the answer is the next greedy token."""
        return await self.complete(
            token_ids,
            item=item,
            affinity_key=affinity_key,
            max_tokens=1,
            temperature=0.0,
            kv_transfer_params={"hidden_states": True},
            # Bypass the prefix cache: its entries were computed in other chunks, and differ in the last bits.
            cache_salt=uuid.uuid4().hex,
            **fields,
        )

    async def requested_states(self, answer: Completion, *, item: str) -> Transfer:
        """The hidden states of an answer whose request asked for them; returns when they are written.

        Raises:
            StageError: the server could not write them.
            ServiceError: the answer announces none, they cannot be accessed, or they do not appear in time.
        """
        transfer = self._announced(answer, item)
        if transfer is None:
            raise ServiceError(
                f"the server answered {item} without hidden states",
                f"serve it in mode `extract` (its mode is `{self.endpoint.mode}`), with a KV connector that exports "
                f"hidden states; for a Mooncake store set extract.connector=mooncake",
            )
        if (error := transfer.access_error(answer.url)) is not None:
            raise error
        server = next(server for server in self._pool.servers if server.endpoint.url == answer.url)
        time_limit = self._time_limit(len(answer.prompt_ids) + len(answer.token_ids))
        await self._wait_until_complete(transfer, server, time_limit)
        return transfer

    async def _delete_unrequested(self, answer: Completion, item: str) -> Completion:
        """Delete hidden states that were not requested: some connectors write those of every request."""
        transfer = self._announced(answer, item)
        if transfer is not None and transfer.access_error(answer.url) is None:
            with contextlib.suppress(StageError):  # the server could not write them: nothing to delete
                await asyncio.to_thread((await self.requested_states(answer, item=item)).delete)
        return answer

    def _announced(self, answer: Completion, item: str) -> Transfer | None:
        return announced_transfer(answer.kv_transfer_params, self.endpoint.directory, self._store, item)

    async def map(
        self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]
    ) -> AsyncGenerator[Result, None]:
        """Run `work` on every item, at most `concurrency` at a time; yields results as they finish.

        `items` is consumed as results are, so memory stays bounded. The first error cancels the rest.
        """
        remaining = iter(items)
        running: set[asyncio.Future[Result]] = set()
        done: set[asyncio.Future[Result]] = set()
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

    async def map_in_order(
        self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]
    ) -> AsyncGenerator[Result, None]:
        """As `map`, but results come in the order of the items.

        Up to twice `concurrency` items are started ahead, so that one slow item does not leave the server idle.
        """
        started: deque[asyncio.Future[Result]] = deque()
        try:
            for item in items:
                started.append(asyncio.ensure_future(work(item)))
                if len(started) >= 2 * self.concurrency:
                    yield await started.popleft()
            while started:
                yield await started.popleft()
        finally:
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)

    async def _post(
        self, path: str, fields: dict[str, Any], item: str, affinity_key: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a request, with retries. Returns the answer's body, and its `seconds` and `url` for `Completion`."""
        payload = {
            "model": self.endpoint.model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **fields,
        }
        time_limit = self._time_limit(len(fields.get("prompt", ())) + fields.get("max_tokens", 0))
        failures, failed_server = 0, None
        while True:
            async with self._slots, self._pool.server(affinity_key, avoid=failed_server) as server:
                start = time.perf_counter()
                try:
                    response = await server.http.post(path, json=payload, timeout=time_limit)
                    if response.is_success:
                        self._pool.record_success(server)
                        return response.json(), {"seconds": time.perf_counter() - start, "url": server.endpoint.url}
                    problem = self._retryable_problem(response, item, server)
                except httpx.ConnectError:
                    self._pool.record_failure(server, "connection refused", refused=True)
                    continue
                except httpx.TimeoutException:
                    problem = f"no answer within {time_limit:g} s"
                except httpx.TransportError as error:
                    problem = f"the connection broke ({type(error).__name__})"
                self._pool.record_failure(server, problem)
                failed_server = server
            if failures >= self._retries:
                raise ServiceError(
                    f"{item}: {problem}, {failures + 1} times in a row; {summarize_log(server.endpoint.log)}",
                    "run the same command again: finished rows are kept",
                )
            await asyncio.sleep(min(timeouts.FIRST_BACKOFF_SECONDS * 2**failures, timeouts.MAX_BACKOFF_SECONDS))
            failures += 1
            self.retried += 1

    def _time_limit(self, tokens: int) -> float:
        """Seconds that a request of `tokens` tokens may take, prompt and answer together."""
        return self._timeout * max(1.0, tokens / TOKENS_PER_TIMEOUT)

    def _retryable_problem(self, response: httpx.Response, item: str, server: EngineServer) -> str:
        """Describe an error answer that a retry may avoid.

        Raises:
            RefusedError: the server refuses this request.
            ServiceError: the server refuses every request: a wrong key or model.
        """
        message = _error_message(response)
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answered {response.status_code} ({message})"
        self._pool.record_success(server)
        if response.status_code in (401, 403, 404):
            raise ServiceError(
                f"the server at {server.endpoint.url} answered {response.status_code}: {message}",
                f"the server must serve the model `{self.endpoint.model}` and accept this run's API key",
            )
        raise RefusedError(item, message)

    async def _wait_until_complete(self, transfer: Transfer, server: EngineServer, time_limit: float) -> None:
        """Poll a transfer until it is complete, and the server's health meanwhile; `time_limit` in seconds."""
        delay = timeouts.MIN_TRANSFER_POLL_SECONDS
        next_check = time.monotonic() + timeouts.TRANSFER_HEALTH_SECONDS
        try:
            async with asyncio.timeout(time_limit):
                while not await transfer.complete():
                    if time.monotonic() > next_check:
                        if await server.health() in ("refused", "unhealthy"):
                            raise ServiceError(
                                f"the server at {server.endpoint.url} stopped while it wrote hidden states; "
                                f"{summarize_log(server.endpoint.log)}",
                                RESTART_HINT,
                            )
                        next_check = time.monotonic() + timeouts.TRANSFER_HEALTH_SECONDS
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, timeouts.MAX_TRANSFER_POLL_SECONDS)
        except TimeoutError:
            raise transfer.timeout_error(time_limit) from None


def _completion(
    body: dict[str, Any],
    choice: dict[str, Any],
    *,
    text: str,
    prompt_ids: list[int] | None,
    logprobs: list[dict[int, float]],
    seconds: float,
    url: str,
    reasoning: str = "",
    tool_calls: Sequence[dict[str, Any]] = (),
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
        reasoning=reasoning,
        tool_calls=list(tool_calls),
    )


def _token_id(name: str) -> int:
    """Parse `token_id:42`, which the server writes in place of a token's text (return_tokens_as_token_ids)."""
    return int(name.removeprefix("token_id:"))


def _error_message(response: httpx.Response) -> str:
    """The message of an error answer: of OpenAI's format, else the first 200 characters."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:200].strip() or "no message"
