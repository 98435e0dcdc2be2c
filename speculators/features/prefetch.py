"""Prefetcher: what is wanted next is made while what came before it is used, in memory that is used again.

They are begun in the order in which they are expected, a thread for each, and no more of them than are asked for ahead:
so what is made does not depend on which side is faster, and memory is bounded by what is in flight.
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
Made = TypeVar("Made")


class Prefetcher(Generic[Item, Made]):
    """Calls `make` on items before they are taken; the first thread starts with the first one that is.

    What goes wrong in a thread is raised when the item is taken that it went wrong with.

    Args:
        make: called in a thread.
        most: items that are made before anybody has taken them, and at the same time.
    """

    def __init__(self, make: Callable[[Item], Made], most: int = 1) -> None:
        self._make, self._most = make, most
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="ahead")
        self._begun: deque[tuple[Item, Future[Made]]] = deque()
        self._coming: deque[Item] = deque()

    def expect(self, items: Sequence[Item]) -> int:
        """What will be taken from now on; returns how many of them, at the beginning, are made already or being made.

        When it returns, nothing else is being made.
        """
        if [item for item, _ in self._begun] != list(items[: len(self._begun)]):
            for _, made in self._begun:
                made.cancel()
            wait([made for _, made in self._begun if not made.cancelled()])
            self._begun.clear()
        self._coming = deque(items[len(self._begun) :])
        return len(self._begun)

    def take(self, item: Item) -> Made:
        """What was made of the item; one that was not expected comes after what has been begun."""
        if self._begun and self._begun[0][0] == item:
            made = self._begun.popleft()[1]
        else:
            if self._coming and self._coming[0] == item:
                self._coming.popleft()
            made = self._threads.submit(self._make, item)
        while self._coming and len(self._begun) < self._most:
            following = self._coming.popleft()
            self._begun.append((following, self._threads.submit(self._make, following)))
        return made.result()

    def stop(self) -> None:
        """Begin nothing more."""
        self._coming.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until the threads have ended."""
        self._threads.shutdown()
        self._begun.clear()


class BufferPool:
    """Memory for tensors that goes on to the next one when nobody has the tensor or a part of it any more.

    Fresh memory costs as much as what is written to it: the kernel zeroes every page when it is touched first.

    Args:
        pinned: for copies to an accelerator.
    """

    SMALL = 1 << 20
    """Bytes; less than that is not kept."""
    APART = 4096
    """Bytes; each tensor begins with a page, which a disk can write to."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[npt.NDArray[np.uint8]] = []
        self._choosing = threading.Lock()

    def empty(self, wanted: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Tensors on the CPU that hold anything, by name; together they take one piece of memory."""
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in wanted.items()}
        room = sum(-(-size // self.APART) * self.APART for size in sizes.values())
        if room < self.SMALL:
            return {name: torch.empty(*shape, dtype=dtype) for name, (dtype, shape) in wanted.items()}
        block, begin, made = self._block(room), 0, {}
        # A tensor made of an array keeps the array, and what is made of the tensor does too.
        lent = block[:room]
        weakref.finalize(lent, self._free.append, block).atexit = False
        whole = torch.from_numpy(lent)
        for name, (dtype, shape) in wanted.items():
            made[name] = whole[begin : begin + sizes[name]].view(dtype).view(tuple(shape))
            begin += -(-sizes[name] // self.APART) * self.APART
        return made

    def _block(self, size: int) -> npt.NDArray[np.uint8]:
        with self._choosing:
            self._free.sort(key=len)
            for index, block in enumerate(self._free):
                if len(block) >= size:
                    return self._free.pop(index)
            if self._free:
                self._free.pop()  # too small now, and in time all are as large as the largest batch
        if self._pinned:
            pinned: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
        return pages(size)
