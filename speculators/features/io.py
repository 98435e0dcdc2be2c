"""Ranges of files into memory that is the caller's, through the kernel's page cache or past it."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from speculators.errors import ContractError

Bytes = npt.NDArray[np.uint8]


class OpenFile:
    """A descriptor for reading, closed when nobody has it any more."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Reading:
    """Reads files, several blocks at a time: one after the other they leave the disk idle in between, or a core.

    What does not fit into memory is read from the disk in every epoch. Through the page cache that takes half a second
    of a core for a gigabyte; past it, a tenth (docs/log.md). A disk wants whole sectors at such addresses then: what
    lies so is read straight into its place, all else through memory of our own.

    Args:
        most: files that stay open, those that were asked for last.
        past: the cache.
    """

    READS = 6
    BLOCK = 1 << 20
    """Bytes, at most."""
    SMALL = 1 << 16
    """Bytes that are not worth a thread."""
    SECTOR = 512
    PAGE = 4096
    """What a sector is at most."""

    def __init__(self, most: int = 64, *, past: bool = False) -> None:
        self._files = functools.lru_cache(most)(functools.partial(OpenFile, flags=os.O_DIRECT if past else 0))
        self._past = self._straight = past
        self._readers = ThreadPoolExecutor(self.READS, "states")
        self._own = threading.local()

    def can(self, path: Path) -> bool:
        """Whether the file is there, on a file system that has such reads."""
        with contextlib.suppress(OSError):
            self._files(path)
            return True
        return False

    def will_need(self, path: Path, offset: int, size: int) -> None:
        """Let the kernel begin to read that part of a file, where it is not in memory."""
        os.posix_fadvise(self._file(path).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, wanted: Iterable[tuple[Path, int, Bytes]]) -> None:
        """Fill each array from a file, beginning at an offset.

        Raises:
            ContractError: a file is missing, or ends before.
        """
        large = []
        for path, offset, room in wanted:
            if len(room) < self.SMALL:
                self._block(path, offset, room)
                continue
            # In parts of one size: a small rest would cost as much as a block.
            size = -(-len(room) // -(-len(room) // self.BLOCK) // self.PAGE) * self.PAGE
            large += [(path, offset + begin, room[begin : begin + size]) for begin in range(0, len(room), size)]
        waiting = iter(large)
        for _ in self._readers.map(self._blocks, [waiting] * min(self.READS, len(large))):
            pass

    def _blocks(self, waiting: Iterator[tuple[Path, int, Bytes]]) -> None:
        """One reader: takes the next block from all that wait, which others take from too."""
        for block in waiting:
            self._block(*block)

    def _block(self, path: Path, offset: int, room: Bytes) -> None:
        file = self._file(path)
        if not self._past:
            self._into(path, file, offset, room)
            return
        if self._straight and not (offset | room.ctypes.data | len(room)) % self.SECTOR:
            try:
                self._into(path, file, offset, room)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._straight = False  # the sectors of this disk are larger
            else:
                return
        before = offset % self.PAGE
        memory = self._memory()[: -(-(before + len(room)) // self.PAGE) * self.PAGE]
        self._into(path, file, offset - before, memory, before + len(room))
        np.copyto(room, memory[before : before + len(room)])

    def _into(self, path: Path, file: OpenFile, offset: int, room: Bytes, least: int | None = None) -> None:
        """Fill an array, or at `least` so much of it where the file may end before."""
        read, least = 0, len(room) if least is None else least
        while read < least:
            # What came short of a whole sector, at the end of a file, is read again with it.
            at = read // self.PAGE * self.PAGE if self._past else read
            got = os.preadv(file.descriptor, [room[at:].data], offset + at)
            if at + got <= read:
                raise damaged(path, "it was cut off")
            read = at + got

    def _memory(self) -> Bytes:
        """This thread's own: it begins with a page, and is large enough to be one large page."""
        if not hasattr(self._own, "memory"):
            self._own.memory = pages(max(4 << 20, self.BLOCK + 2 * self.PAGE))
        memory: Bytes = self._own.memory
        return memory

    def _file(self, path: Path) -> OpenFile:
        try:
            return self._files(path)
        except FileNotFoundError:
            raise missing(path) from None


def pages(size: int) -> Bytes:
    """Fresh memory that begins with a page, of large ones where the kernel has them: they cost less to touch."""
    memory: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def larger_than_memory(directory: Path) -> bool:
    """Whether the shards of a set are more than the page cache is likely to hold: half of this machine's memory."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return sum(path.stat().st_size for path in directory.glob("shard-*")) > pages * page // 2


def missing(path: Path) -> ContractError:
    """There is no such file."""
    return ContractError(f"{path} is missing", "extract the hidden states again")


def damaged(path: Path, why: str) -> ContractError:
    """A file is not what was written."""
    return ContractError(f"{path} is damaged: {why}", "delete it and run the same command again")
