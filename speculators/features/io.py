"""Parallel reads of byte ranges of files into arrays of the caller, through the page cache or by direct I/O."""

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
    """A file descriptor for reading that is closed with the last reference to it."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class FileReader:
    """Reads byte ranges of files by several threads, so that neither the disk nor a core waits for the other.

    Hidden states that do not fit into memory are read from the disk in every epoch. Through the page cache that costs
    half a second of a core for a gigabyte, by direct I/O a tenth (docs/log.md). Direct I/O needs offsets, addresses and
    sizes in whole sectors: ranges that have them are read in place, the others through a buffer.

    Args:
        max_open: files that stay open, the most recently used ones.
        direct_io: read without the page cache (`O_DIRECT`).
    """

    READS = 6
    """Threads."""
    BLOCK = 1 << 20
    """Largest read, in bytes."""
    SMALL = 1 << 16
    """Bytes below which a read is not handed to a thread."""
    SECTOR = 512
    """Bytes; the alignment that direct I/O is tried with first."""
    PAGE = 4096
    """Bytes; the largest sector there is."""

    def __init__(self, max_open: int = 64, *, direct_io: bool = False) -> None:
        flags = os.O_DIRECT if direct_io else 0
        self._files = functools.lru_cache(max_open)(functools.partial(OpenFile, flags=flags))
        self._direct_io = self._aligned_io = direct_io
        self._readers = ThreadPoolExecutor(self.READS, "states")
        self._buffers = threading.local()

    def supports(self, path: Path) -> bool:
        """Whether the file exists and its file system supports this kind of read."""
        with contextlib.suppress(OSError):
            self._files(path)
            return True
        return False

    def will_need(self, path: Path, offset: int, size: int) -> None:
        """Have the kernel read a range of a file ahead into the page cache."""
        os.posix_fadvise(self._file(path).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, ranges: Iterable[tuple[Path, int, Bytes]]) -> None:
        """Fill each array with the bytes of a file from an offset on.

        Raises:
            ContractError: a file is missing, or ends too early.
        """
        large = []
        for path, offset, target in ranges:
            if len(target) < self.SMALL:
                self._read_block(path, offset, target)
                continue
            # Blocks of equal size: a small remainder would cost as much as a block.
            size = -(-len(target) // -(-len(target) // self.BLOCK) // self.PAGE) * self.PAGE
            large += [(path, offset + begin, target[begin : begin + size]) for begin in range(0, len(target), size)]
        queue = iter(large)
        for _ in self._readers.map(self._read_blocks, [queue] * min(self.READS, len(large))):
            pass

    def _read_blocks(self, queue: Iterator[tuple[Path, int, Bytes]]) -> None:
        """Read blocks from a queue that all threads share until it is empty."""
        for block in queue:
            self._read_block(*block)

    def _read_block(self, path: Path, offset: int, target: Bytes) -> None:
        file = self._file(path)
        if not self._direct_io:
            self._read_into(path, file, offset, target)
            return
        if self._aligned_io and not (offset | target.ctypes.data | len(target)) % self.SECTOR:
            try:
                self._read_into(path, file, offset, target)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._aligned_io = False  # the sectors of this disk are larger
            else:
                return
        margin = offset % self.PAGE
        buffer = self._buffer()[: -(-(margin + len(target)) // self.PAGE) * self.PAGE]
        self._read_into(path, file, offset - margin, buffer, margin + len(target))
        np.copyto(target, buffer[margin : margin + len(target)])

    def _read_into(self, path: Path, file: OpenFile, offset: int, target: Bytes, needed: int | None = None) -> None:
        """Fill an array, or its first `needed` bytes where the file may end before the array does."""
        count, needed = 0, len(target) if needed is None else needed
        while count < needed:
            # Direct I/O has to go on at a whole page, so a partial one at the end is read again.
            begin = count // self.PAGE * self.PAGE if self._direct_io else count
            received = os.preadv(file.descriptor, [target[begin:].data], offset + begin)
            if begin + received <= count:
                raise damaged_file(path, "it was cut off")
            count = begin + received

    def _buffer(self) -> Bytes:
        """This thread's buffer: page-aligned, and large enough for one huge page."""
        if not hasattr(self._buffers, "memory"):
            self._buffers.memory = pages(max(4 << 20, self.BLOCK + 2 * self.PAGE))
        memory: Bytes = self._buffers.memory
        return memory

    def _file(self, path: Path) -> OpenFile:
        try:
            return self._files(path)
        except FileNotFoundError:
            raise missing_file(path) from None


def pages(size: int) -> Bytes:
    """New page-aligned memory of `size` bytes, in huge pages where the kernel has them: they cost fewer page faults."""
    memory: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def exceeds_page_cache(directory: Path) -> bool:
    """Whether a directory's shards are larger than half of this machine's memory, which the page cache may hold."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return sum(path.stat().st_size for path in directory.glob("shard-*")) > pages * page // 2


def missing_file(path: Path) -> ContractError:
    """The error of a file that does not exist."""
    return ContractError(f"{path} is missing", "extract the hidden states again")


def damaged_file(path: Path, why: str) -> ContractError:
    """The error of a file whose content is not what was written."""
    return ContractError(f"{path} is damaged: {why}", "delete it and run the same command again")
