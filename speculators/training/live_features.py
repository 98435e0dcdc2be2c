"""The feed: hidden states out of a live server, there before training wants them.

A thread of its own asks the server for the rows of the coming batches, in their order, within a bound of memory
(`training.window`); so neither side waits for the other as long as they are about equally fast. Every row is checked
as `extract` checks it and converted to the type in which `extract` would have stored it: training sees the same
bytes either way. With a `HiddenStatesCache`, rows are kept on disk up to its budget and asked for once.

Whatever goes wrong in the thread is raised where training next asks for states.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speculators.config.schema import Extract
from speculators.data.token_table import TokenTable, prediction_mask
from speculators.engine.client import Client
from speculators.engine.transfer import Transfer
from speculators.errors import ContractError, ServiceError
from speculators.features.disk_cache import HiddenStatesCache
from speculators.features.encoding import LAST, bytes_per_token, copy_prefix, encode, layout, split_last_layer
from speculators.features.writer import check_hidden_states
from speculators.job import Endpoint
from speculators.training.window import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the states of one token have to be."""

    layers: int
    hidden_size: int
    compute: torch.dtype
    """What the target computes in, and so what the server sends."""
    stored: str
    """What they are kept in, in memory and on disk."""
    everywhere: bool
    """The last layer's are kept of all tokens, and not only where an answer is predicted."""

    def bytes(self, tokens: int, places: int) -> int:
        """Of a row in memory, with so many places of the last layer."""
        each, last = bytes_per_token(self.layers, self.hidden_size, self.stored)
        return tokens * each + places * last


class Feed:
    """A `dataloader.HiddenStatesSource`. The thread starts with the first `expect` and ends with `close`.

    Args:
        endpoint: the server, in mode `extract`.
        tokens: the token table.
        shape: of the states.
        options: `concurrency`, `retries` and `timeout` of the requests.
        memory: bytes for states that are there or on their way. A batch that is larger gets in by itself.
        ahead: batches whose rows are asked for before they are wanted.
        cache: where rows are kept on disk, if they are.
    """

    concurrent_fills = 1
    """In their order: the window knows which is wanted next."""

    def __init__(
        self, endpoint: Endpoint, tokens: Path, shape: Shape, options: Extract, *, memory: int, ahead: int,
        cache: HiddenStatesCache | None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.prefilled_tokens = 0
        self.prefilled_rows = 0
        self.retried = 0
        """Requests."""
        self.layout = layout(shape.layers, shape.hidden_size, shape.stored)
        self._table = TokenTable(tokens)
        lengths = self.lengths(self._table.lengths)
        sizes = {row: shape.bytes(n, int(self.last_layer_mask(row, n).sum())) for row, n in lengths.items()}
        self._window = Window(sizes, memory, ahead)
        self._endpoint, self._options, self._cache = endpoint, options, cache
        self._changed = threading.Condition()
        """Guards everything that both threads touch."""
        self._adding = threading.Lock()
        """One row at a time goes into the cache."""
        self._failure: BaseException | None = None
        """What everybody who wants states gets instead."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._closed = False
        self._busy, self._busy_since, self._in_flight = 0.0, 0.0, 0

    @property
    def peak_bytes(self) -> int:
        """The most that was in memory or on its way there at one time."""
        return self._window.peak

    def lengths(self, whole: Sequence[int]) -> dict[int, int]:
        """Every row is prefilled whole."""
        return dict(enumerate(whole))

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """See `dataloader.HiddenStatesSource`."""
        if self.shape.everywhere:
            return np.ones(tokens, np.bool_)
        return prediction_mask(self._table.loss_mask(row))[:tokens]

    def expect(self, batches: Sequence[Sequence[int]]) -> None:
        """See `dataloader.HiddenStatesSource`."""
        with self._changed:
            self._window.expect(batches)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
            self._thread.start()
        self._tell()

    def fill(
        self, parts: Sequence[tuple[int, int]], token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]
    ) -> None:
        """See `dataloader.HiddenStatesSource`; that a row's states are of its tokens was checked when they came.

        Raises:
            RunError: whatever went wrong with any row since.
        """
        assert self._thread is not None, "nothing was expected"
        wanted = tuple(dict.fromkeys(row for row, _ in parts))
        with self._changed:
            self._window.waited_for = wanted
            self._tell()
            self._changed.wait_for(lambda: self._failure is not None or all(self._is_here(row) for row in wanted))
            if self._failure is not None:
                raise self._failure
            found = {row: self._window.held.get(row) for row in wanted}
            self._window.used()
        self._tell()
        begin = first = 0
        for row, tokens in parts:
            end, behind = begin + tokens, first + int(self.last_layer_mask(row, tokens).sum())
            place = {n: t[first:behind] if n in LAST.values() else t[begin:end] for n, t in into.items()}
            held = found[row]
            if held is not None:
                copy_prefix(held, place)
            else:
                assert self._cache is not None
                self._cache.fill(row, place)
            begin, first = end, behind

    def close(self) -> None:
        """Ask for nothing more, and seal what the cache has not sealed."""
        self._closed = True
        if self._thread is not None:
            self._tell()
            self._thread.join()
        with self._changed:
            self._failure = self._failure or ServiceError("the hidden states' feed was closed", "run the command again")
            self._changed.notify_all()
        if self._cache is not None:
            self._cache.seal()

    def record(self) -> dict[str, Any]:
        """What this attempt did, for the stage's record."""
        facts: dict[str, Any] = {
            "prefilled_rows": self.prefilled_rows,
            "prefilled_tokens": self.prefilled_tokens,
            "prefill_tokens_per_second": round(self.prefilled_tokens / self._busy, 1) if self._busy else 0.0,
            "retried_requests": self.retried,
            "peak_states_bytes": self.peak_bytes,
        }
        if self._cache is not None:
            facts |= {
                "kept_rows": len(self._cache),
                "kept_bytes": self._cache.bytes,
                "reused_rows": self._cache.rows_reused,
            }
        return facts

    def _is_here(self, row: int) -> bool:
        return self._window.held.get(row) is not None or (self._cache is not None and row in self._cache)

    def _tell(self) -> None:
        """Let the feed's thread look again at what there is to do."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._hear)

    # In the feed's thread.

    def _hear(self) -> None:
        self._news.set()
        if self._closed and self._work is not None:
            self._work.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._failure = error
        with self._changed:
            self._changed.notify_all()

    async def _serve(self) -> None:
        options = self._options
        self._work, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._closed:
            return
        client = Client(
            self._endpoint, concurrency=options.concurrency, retries=options.retries, timeout=options.timeout
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                # Twice as many as may be in flight: the server has work while answers are read, checked and stored.
                for _ in range(2 * options.concurrency):
                    group.create_task(self._ask_and_take(client))
        finally:
            self.retried = client.retried

    async def _ask_and_take(self, client: Client) -> None:
        while True:
            self._news.clear()
            with self._changed:
                row = self._window.ask(self._cache if self._cache is not None else ())
            if row is None:
                await self._news.wait()
                continue
            sent = self._table.token_ids(row).tolist()
            self._count(1)
            try:
                file = await client.hidden_states(sent, item=f"row {row}")
            finally:
                self._count(-1)
            await asyncio.to_thread(self._take, row, sent, file)
            self._news.set()

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self._busy += now - self._busy_since if self._in_flight else 0.0
        self._busy_since = now
        self._in_flight += change

    def _take(self, row: int, sent: list[int], file: Transfer) -> None:
        """In a thread: reading, checking and storing a row must not keep other requests from being sent."""
        token_ids, states = file.load()
        check_hidden_states(f"row {row}", sent, token_ids, states, self.shape.compute)
        wanted = [len(sent), self.shape.layers, self.shape.hidden_size]
        if list(states.shape) != wanted:
            raise ContractError(
                f"the states of row {row} are {list(states.shape)}, {wanted} was expected",
                "the server does not capture the layers of this recipe; is `serve.url` a server of another run?",
            )
        last = torch.from_numpy(self.last_layer_mask(row, len(sent)))
        sifted = split_last_layer(encode(f"row {row}", states, self.shape.stored), last)
        kept = False
        if self._cache is not None:
            with self._adding:
                kept = self._cache.add(row, token_ids, sifted, last)
        with self._changed:
            self._window.arrived(row, None if kept else sifted)
            self.prefilled_rows += 1
            self.prefilled_tokens += len(sent)
            self._changed.notify_all()
