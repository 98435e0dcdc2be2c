"""Prefetch: threads make the next items while earlier ones are used, in buffers that come from a pool.

Items are started in the order in which they are expected, a thread for each, and never more than a fixed number before
they are taken. So the results do not depend on which side is faster, and memory is bounded.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from speculators.features.io import pages

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetcher(Generic[Item, Result]):
    """Calls a function on expected items in threads, before their results are taken.

    The first thread starts when the first item is taken. An error in a thread is raised when its item is taken. `depth`
    is the number of threads, and of items that are started before they are taken.
    """

    def __init__(self, function: Callable[[Item], Result], depth: int = 1) -> None:
        self._function, self._depth = function, depth
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="prefetch")
        self._started: deque[tuple[Item, Future[Result]]] = deque()
        self._expected: deque[Item] = deque()

    def expect(self, items: Sequence[Item]) -> int:
        """Replace the expected items; returns how many of them, from the first, were started before.

        When it returns, no other item is being worked on.
        """
        if [item for item, _ in self._started] != list(items[: len(self._started)]):
            for _, future in self._started:
                future.cancel()
            wait([future for _, future in self._started if not future.cancelled()])
            self._started.clear()
        self._expected = deque(items[len(self._started) :])
        return len(self._started)

    def take(self, item: Item) -> Result:
        """Wait for the result of an item; one that was not expected is started after those that have been."""
        if self._started and self._started[0][0] == item:
            future = self._started.popleft()[1]
        else:
            if self._expected and self._expected[0] == item:
                self._expected.popleft()
            future = self._threads.submit(self._function, item)
        while self._expected and len(self._started) < self._depth:
            following = self._expected.popleft()
            self._started.append((following, self._threads.submit(self._function, following)))
        return future.result()

    def stop(self) -> None:
        """Start no further item."""
        self._expected.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until the threads have ended."""
        self._threads.shutdown()
        self._started.clear()


class BufferPool:
    """Memory for tensors that is reused when neither the tensors nor views of them exist any more.

    New memory costs as much as writing it: the kernel zeroes every page when it is first touched. `pinned` allocates
    page-locked memory, for copies to an accelerator.
    """

    MIN_BYTES = 1 << 20
    """Smaller requests are not served from the pool."""
    ALIGNMENT = 4096
    """Bytes; each tensor starts on a page, which direct I/O can write to."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def empty(self, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Allocate uninitialized CPU tensors, name -> (dtype, shape), in one block of memory."""
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
        total = sum(-(-size // self.ALIGNMENT) * self.ALIGNMENT for size in sizes.values())
        if total < self.MIN_BYTES:
            return {name: torch.empty(*shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        block, begin, tensors = self._block(total), 0, {}
        # A tensor made from an array keeps the array alive, and so do views of the tensor.
        array = block[:total]
        weakref.finalize(array, self._free.append, block).atexit = False
        memory = torch.from_numpy(array)
        for name, (dtype, shape) in layout.items():
            tensors[name] = memory[begin : begin + sizes[name]].view(dtype).view(tuple(shape))
            begin += -(-sizes[name] // self.ALIGNMENT) * self.ALIGNMENT
        return tensors

    def _block(self, size: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._free.sort(key=len)
            for index, block in enumerate(self._free):
                if len(block) >= size:
                    return self._free.pop(index)
            if self._free:
                self._free.pop()  # too small; in time all blocks are as large as the largest batch
        if self._pinned:
            block = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            return block
        return pages(size)
