"""Ranges of files into memory that is the caller's, through the kernel's page cache or past it."""

from __future__ import annotations

import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from speculators.errors import ContractError


class OpenFile:
    """A descriptor for reading, closed when nobody has it any more."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def open_files(most: int = 64) -> Callable[[Path], OpenFile]:
    """Opens a file; those that were asked for last stay open, as many as `most`."""
    return functools.lru_cache(most)(OpenFile)


class PastTheCache:
    """Reads files past the kernel's page cache, several blocks at a time.

    What does not fit into memory is read from the disk in every epoch. Through the page cache that takes half a second
    of a core for a gigabyte and, one read after the other, leaves the disk idle in between; past it, a tenth
    (docs/log.md). The disk wants whole sectors at page boundaries, so each block goes through memory of our own.

    Raises:
        OSError: the file system has no such reads, or `path`, one of the files to come, is not there.
    """

    READS = 4
    BLOCK = 1 << 20
    SECTOR = 4096

    def __init__(self, path: Path) -> None:
        self._files = functools.lru_cache(64)(functools.partial(OpenFile, flags=os.O_DIRECT))
        self._files(path)
        self._readers = ThreadPoolExecutor(self.READS, "states")
        self._own = threading.local()

    def read(self, wanted: Iterable[tuple[Path, int, npt.NDArray[np.uint8]]]) -> None:
        """Fill each array from a file, beginning at an offset.

        Raises:
            ContractError: a file ends before.
        """
        blocks = [
            (path, offset + begin, room[begin : begin + self.BLOCK])
            for path, offset, room in wanted
            for begin in range(0, len(room), self.BLOCK)
        ]
        for _ in self._readers.map(self._block, blocks):
            pass

    def _block(self, wanted: tuple[Path, int, npt.NDArray[np.uint8]]) -> None:
        path, offset, room = wanted
        try:
            file = self._files(path)
        except FileNotFoundError:
            raise missing(path) from None
        if not hasattr(self._own, "memory"):  # a mapping begins with a page
            self._own.memory = np.frombuffer(mmap.mmap(-1, self.BLOCK + 2 * self.SECTOR), np.uint8)
        memory: npt.NDArray[np.uint8] = self._own.memory
        before = offset % self.SECTOR
        wanted_bytes, read = before + len(room), 0
        while read < wanted_bytes:
            at = read // self.SECTOR * self.SECTOR
            sectors = memory[at : -(-wanted_bytes // self.SECTOR) * self.SECTOR]
            got = os.preadv(file.descriptor, [sectors.data], offset - before + at)
            if at + got <= read:
                raise damaged(path, "it was cut off")
            read = at + got
        np.copyto(room, memory[before:wanted_bytes])


def larger_than_memory(directory: Path) -> bool:
    """Whether the shards of a set are more than the page cache is likely to hold: half of this machine's memory."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return sum(path.stat().st_size for path in directory.glob("shard-*")) > pages * page // 2


def missing(path: Path) -> ContractError:
    return ContractError(f"{path} is missing", "extract the hidden states again")


def damaged(path: Path, why: str) -> ContractError:
    return ContractError(f"{path} is damaged: {why}", "delete it and run the same command again")
