"""Hidden states from a live server, prefetched while training runs (pipelines `online` and `hybrid`).

A thread requests the rows of the coming batches in their order, within a memory limit (`training.window`), so that
neither server nor training waits as long as they are about equally fast. Every row is checked as `extract` checks it,
and converted to the format in which `extract` would store it: training gets the same bytes either way. With a
`HiddenStatesCache`, rows are kept on disk up to its limit and are requested once.

An error in the thread is raised at training's next request for hidden states.
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
from speculators.training.window import RowWindow


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """Shape and formats of the hidden states of a row."""

    layers: int
    hidden_size: int
    compute: torch.dtype
    """Format that the target computes in and the server sends."""
    stored: str
    """Format in memory and on disk, as in `extract.dtype`."""
    everywhere: bool
    """Whether the last layer's are kept for all tokens, not only at supervised predictions."""

    def bytes(self, tokens: int, last_layer_tokens: int) -> int:
        """Bytes of a row, whose last layer is kept for `last_layer_tokens` of its tokens."""
        each, last = bytes_per_token(self.layers, self.hidden_size, self.stored)
        return tokens * each + last_layer_tokens * last


class LiveFeatures:
    """A `dataloader.HiddenStatesSource`. The thread starts with the first `expect` and ends with `close`.

    Args:
        endpoint: the server, in mode `extract`.
        tokens: the token table.
        shape: of the rows.
        options: `concurrency`, `retries` and `timeout` of the requests.
        memory: bytes for rows in memory or requested; a larger batch is loaded by itself.
        prefetch_batches: batches whose rows are requested before they are used.
        cache: keeps rows on disk, if not None.
    """

    concurrent_fills = 1
    """One at a time, in order: the window knows which batch is used next."""

    def __init__(
        self, endpoint: Endpoint, tokens: Path, shape: RowShape, options: Extract, *,
        memory: int, prefetch_batches: int, cache: HiddenStatesCache | None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.prefilled_tokens = 0
        self.prefilled_rows = 0
        self.retried = 0
        """Requests that were sent again."""
        self.layout = layout(shape.layers, shape.hidden_size, shape.stored)
        self._table = TokenTable(tokens)
        lengths = self.lengths(self._table.lengths)
        sizes = {row: shape.bytes(n, int(self.last_layer_mask(row, n).sum())) for row, n in lengths.items()}
        self._window = RowWindow(sizes, memory, prefetch_batches)
        self._endpoint, self._options, self._cache = endpoint, options, cache
        self._changed = threading.Condition()
        """Guards what both threads access."""
        self._adding = threading.Lock()
        """Lets one row at a time into the cache."""
        self._failure: BaseException | None = None
        """Raised by every later `fill`."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closed = False
        self._busy, self._busy_since, self._in_flight = 0.0, 0.0, 0

    @property
    def peak_bytes(self) -> int:
        """Maximum of bytes in memory or requested."""
        return self._window.peak

    def lengths(self, row_lengths: Sequence[int]) -> dict[int, int]:
        """See `dataloader.HiddenStatesSource`; every row is available in its whole length."""
        return dict(enumerate(row_lengths))

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
            self._thread = threading.Thread(target=self._run, name="live features", daemon=True)
            self._thread.start()
        self._notify()

    def fill(
        self, parts: Sequence[tuple[int, int]], token_ids: npt.NDArray[np.int64], into: Mapping[str, Tensor]
    ) -> None:
        """See `dataloader.HiddenStatesSource`. A row's hidden states were checked against its tokens on arrival.

        Raises:
            RunError: any row that was requested so far has failed.
        """
        assert self._thread is not None, "nothing was expected"
        rows = tuple(dict.fromkeys(row for row, _ in parts))
        with self._changed:
            self._window.awaited = rows
            self._notify()
            self._changed.wait_for(lambda: self._failure is not None or all(self._is_here(row) for row in rows))
            if self._failure is not None:
                raise self._failure
            in_memory = {row: self._window.rows.get(row) for row in rows}
            self._window.used()
        self._notify()
        begin = first = 0
        for row, tokens in parts:
            end, last = begin + tokens, first + int(self.last_layer_mask(row, tokens).sum())
            output = {n: t[first:last] if n in LAST.values() else t[begin:end] for n, t in into.items()}
            encoded = in_memory[row]
            if encoded is not None:
                copy_prefix(encoded, output)
            else:
                assert self._cache is not None
                self._cache.fill(row, output)
            begin, first = end, last

    def close(self) -> None:
        """End the thread, and seal the cache."""
        self._closed = True
        if self._thread is not None:
            self._notify()
            self._thread.join()
        with self._changed:
            self._failure = self._failure or ServiceError(
                "the source of hidden states was closed", "run the command again"
            )
            self._changed.notify_all()
        if self._cache is not None:
            self._cache.seal()

    def record(self) -> dict[str, Any]:
        """Counts of this attempt, for the stage's record."""
        counts: dict[str, Any] = {
            "prefilled_rows": self.prefilled_rows,
            "prefilled_tokens": self.prefilled_tokens,
            "prefill_tokens_per_second": round(self.prefilled_tokens / self._busy, 1) if self._busy else 0.0,
            "retried_requests": self.retried,
            "peak_states_bytes": self.peak_bytes,
        }
        if self._cache is not None:
            counts |= {
                "kept_rows": len(self._cache),
                "kept_bytes": self._cache.bytes,
                "reused_rows": self._cache.rows_reused,
            }
        return counts

    def _is_here(self, row: int) -> bool:
        return self._window.rows.get(row) is not None or (self._cache is not None and row in self._cache)

    def _notify(self) -> None:
        """Wake the thread, to look for rows to request."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._on_notify)

    # The methods below run in the thread.

    def _on_notify(self) -> None:
        self._wake.set()
        if self._closed and self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._request_rows())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._failure = error
        with self._changed:
            self._changed.notify_all()

    async def _request_rows(self) -> None:
        options = self._options
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._closed:
            return
        client = Client(
            self._endpoint, concurrency=options.concurrency, retries=options.retries, timeout=options.timeout
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                # Twice as many as may be in flight, so that the server has work while responses are read and stored.
                for _ in range(2 * options.concurrency):
                    group.create_task(self._request_and_store(client))
        finally:
            self.retried = client.retried

    async def _request_and_store(self, client: Client) -> None:
        while True:
            self._wake.clear()
            with self._changed:
                row = self._window.next_request(self._cache if self._cache is not None else ())
            if row is None:
                await self._wake.wait()
                continue
            token_ids = self._table.token_ids(row).tolist()
            self._count_in_flight(1)
            try:
                file = await client.hidden_states(token_ids, item=f"row {row}")
            finally:
                self._count_in_flight(-1)
            await asyncio.to_thread(self._store, row, token_ids, file)
            self._wake.set()

    def _count_in_flight(self, change: int) -> None:
        now = time.monotonic()
        self._busy += now - self._busy_since if self._in_flight else 0.0
        self._busy_since = now
        self._in_flight += change

    def _store(self, row: int, sent: list[int], file: Transfer) -> None:
        """Read, check and store a row; in a thread of its own, so that requests are sent meanwhile."""
        token_ids, hidden_states = file.load()
        check_hidden_states(f"row {row}", sent, token_ids, hidden_states, self.shape.compute)
        expected_shape = [len(sent), self.shape.layers, self.shape.hidden_size]
        if list(hidden_states.shape) != expected_shape:
            raise ContractError(
                f"the hidden states of row {row} have shape {list(hidden_states.shape)}, not {expected_shape}",
                "the server does not capture the layers of this recipe; is `serve.url` a server of another run?",
            )
        mask = torch.from_numpy(self.last_layer_mask(row, len(sent)))
        encoded = split_last_layer(encode(f"row {row}", hidden_states, self.shape.stored), mask)
        is_cached = False
        if self._cache is not None:
            with self._adding:
                is_cached = self._cache.add(row, token_ids, encoded, mask)
        with self._changed:
            self._window.arrived(row, None if is_cached else encoded)
            self.prefilled_rows += 1
            self.prefilled_tokens += len(sent)
            self._changed.notify_all()
