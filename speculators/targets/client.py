"""Requests to a vLLM server: many in flight, retried where that can help, and one clear error when the server is gone.

    async with Client(endpoint, concurrency=32, retries=3, timeout=600.0) as client:
        answer = await client.chat(messages, item="conversation c7", max_tokens=64, temperature=0.0)
        again = await client.complete(answer.prompt_ids, item="conversation c7", max_tokens=64)
        token_ids, states = (await client.hidden_states(token_ids, item="row 12")).take()
        async for result in client.map(work, items): ...

What is retried, with exponential back-off: time-outs, broken connections, 429 and 5xx. What is not: a 4xx, which is
about the item and names it, and a server that refuses connections, which is gone; its log says why.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
import torch
from safetensors.torch import load_file

from speculators.data.encoding import dequantise
from speculators.errors import ServiceError, StageError
from speculators.job import Endpoint

FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LONGEST_PAUSE = 15.0
REFUSED = 4
"""Refused connections in a row after which a server counts as gone; a refusal is never a slow network."""
LOG_LINES = 20

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


@dataclass(frozen=True, slots=True)
class StatesFile:
    """Hidden states that the server has written. Whoever has waited for many of them takes one at a time."""

    path: Path

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids that the states belong to, int64 [T], and the states [T, L, H] in the dtype the target computes in.

        The file is gone afterwards.
        """
        try:
            tensors = load_file(self.path)
        finally:
            self.path.unlink(missing_ok=True)
        states = tensors["hidden_states"]
        if "scales" in tensors:  # the server sends float8
            states = dequantise(states, tensors["scales"])
        return tensors["token_ids"], states


class Client:
    """An asynchronous client of one server. `concurrency` bounds the requests in flight, whoever sends them."""

    def __init__(self, endpoint: Endpoint, *, concurrency: int, retries: int, timeout: float) -> None:
        self.endpoint = endpoint
        self.concurrency = concurrency
        self.retried = 0
        self._retries = retries
        self._timeout = timeout
        self._slots = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(
            base_url=endpoint.url,
            headers={"Authorization": f"Bearer {endpoint.api_key}"},
            timeout=timeout,
            limits=httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1),
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def chat(self, messages: Sequence[dict[str, Any]], *, item: str, **fields: Any) -> Completion:
        """Answer a conversation. `fields` are the request's own (`max_tokens`, `temperature`, `logprobs`, `seed`...).

        `item` is what an error calls this request. `logprobs=N` asks for the N likeliest tokens a position.
        """
        if "logprobs" in fields:
            fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
        body, seconds = await self._post("/v1/chat/completions", {"messages": list(messages), **fields}, item)
        choice = body["choices"][0]
        positions = (choice.get("logprobs") or {}).get("content") or []
        return _completion(
            body,
            choice,
            text=choice["message"].get("content") or "",
            prompt_ids=body.get("prompt_token_ids"),
            logprobs=[{_token_id(t["token"]): t["logprob"] for t in p["top_logprobs"]} for p in positions],
            seconds=seconds,
        )

    async def complete(self, prompt_ids: Sequence[int], *, item: str, **fields: Any) -> Completion:
        """Continue token ids as they are, without a template; otherwise as `chat`."""
        body, seconds = await self._post("/v1/completions", {"prompt": list(prompt_ids), **fields}, item)
        choice = body["choices"][0]
        positions = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return _completion(
            body,
            choice,
            text=choice["text"],
            prompt_ids=choice.get("prompt_token_ids"),
            logprobs=[{_token_id(token): value for token, value in (p or {}).items()} for p in positions],
            seconds=seconds,
        )

    async def tokenize(self, messages: Sequence[dict[str, Any]], *, item: str) -> list[int]:
        """The token ids that `chat` would send these messages as, with the opening of the answer."""
        body, _ = await self._post("/tokenize", {"messages": list(messages), "add_generation_prompt": True}, item)
        return list(body["tokens"])

    async def hidden_states(self, token_ids: Sequence[int], *, item: str) -> StatesFile:
        """Run the target over `token_ids` on a server in mode `extract`; returns when the file is there."""
        answer = await self.complete(
            token_ids,
            item=item,
            max_tokens=1,
            temperature=0.0,
            kv_transfer_params={"hidden_states": True},
            # What another request left in the prefix cache was computed in other pieces, and differs in the last bits.
            cache_salt=uuid.uuid4().hex,
        )
        return await self.states_of(answer, item=item)

    async def states_of(self, answer: Completion, *, item: str) -> StatesFile:
        """The states of an answer whose request asked for them; returns when the file is there."""
        name = answer.kv_transfer_params.get("hidden_states_file")
        if name is None:
            raise ServiceError(
                f"the server answered {item} without hidden states",
                f"it has to be served in mode `extract` with our connector, its mode is `{self.endpoint.mode}`",
            )
        path = self.endpoint.directory / name
        await self._appears(path, item)
        return StatesFile(path)

    async def map(self, work: Callable[[A], Awaitable[B]], items: Iterable[A]) -> AsyncIterator[B]:
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

    async def map_in_order(self, work: Callable[[A], Awaitable[B]], items: Iterable[A]) -> AsyncIterator[B]:
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

    async def _post(self, path: str, fields: dict[str, Any], item: str) -> tuple[dict[str, Any], float]:
        payload = {
            "model": self.endpoint.model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **fields,
        }
        failures = refused = 0
        while True:
            try:
                async with self._slots:
                    start = time.perf_counter()
                    response = await self._http.post(path, json=payload)
                    seconds = time.perf_counter() - start
                if response.is_success:
                    return response.json(), seconds
                problem = self._judge(response, item)
                refused = 0
            except httpx.ConnectError:
                refused += 1
                if refused >= REFUSED:
                    raise self._gone() from None
                await asyncio.sleep(FIRST_PAUSE / 2)
                continue
            except httpx.TimeoutException:
                problem = f"no answer within {self._timeout:g} s"
            except httpx.TransportError as error:
                problem = f"the connection broke ({type(error).__name__})"
            if failures >= self._retries:
                raise ServiceError(
                    f"{item}: {problem}, {failures + 1} times in a row; {explain(self.endpoint.log)}",
                    "run the same command again: what is finished is kept",
                )
            await asyncio.sleep(min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE))
            failures += 1
            self.retried += 1

    def _judge(self, response: httpx.Response, item: str) -> str:
        """What is wrong, if another attempt may help; raises where it cannot."""
        said = _said(response)
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answered {response.status_code} ({said})"
        if response.status_code in (401, 403, 404):
            raise ServiceError(
                f"the server at {self.endpoint.url} answered {response.status_code}: {said}",
                f"it has to serve the model `{self.endpoint.model}` and take this run's key",
            )
        raise StageError(f"the server refuses {item}: {said}", "leave this item out, or mend it where it comes from")

    async def _appears(self, path: Path, item: str) -> None:
        """Wait until the connector has put `path` there, whole, by a rename."""
        failed, pause = Path(f"{path}.error"), 0.001
        deadline = time.monotonic() + self._timeout
        next_check = time.monotonic() + 2.0
        while not path.exists():
            if failed.exists():
                message = failed.read_text()
                failed.unlink()
                raise StageError(f"the server could not write the hidden states of {item}: {message}", "see its log")
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"the hidden states of {item} were promised as {path} and are not there after {self._timeout:g} s",
                    "is the server's directory visible from here? Server and stage have to share it",
                )
            if time.monotonic() > next_check:
                await self._check_alive()
                next_check = time.monotonic() + 2.0
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)

    async def _check_alive(self) -> None:
        try:
            healthy = (await self._http.get("/health")).is_success
        except httpx.TimeoutException:
            return
        except httpx.TransportError:
            healthy = False
        if not healthy:
            raise self._gone()

    def _gone(self) -> ServiceError:
        return ServiceError(
            f"the server at {self.endpoint.url} is gone; {explain(self.endpoint.log)}",
            "mend what its log names, then run the same command again: what is finished is kept",
        )


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


def _completion(
    body: dict[str, Any],
    choice: dict[str, Any],
    *,
    text: str,
    prompt_ids: list[int] | None,
    logprobs: list[dict[int, float]],
    seconds: float,
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
