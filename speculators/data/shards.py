"""Hidden states on disk: safetensors shards of many rows, an index, and the contract that says what they are.

    shard-00000.safetensors   token_ids int64 [N], states [N, L, H] and for float8 scales bfloat16 [N, L];
                              the metadata holds the contract and the rows
    shard-00001.safetensors   ...
    index.json                the contract, each row's (shard, start, length), the sha256 of every shard

A shard is written when it is full: beside its place, fsynced, then renamed. So whatever bears a shard's name is whole,
a killed writer loses only the rows of the shard it was filling, and a new writer in the same directory goes on after
the last sealed one. Every shard can be read without the index, which is made from them at the end.

The contract: `format`, `target` and `tokens` (digests), `dtype` (stored, see `data.encoding`), `compute_dtype`,
`layer_ids`, `convention`, `hidden_size`, `normed`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from speculators.data.encoding import FLOAT8, decode, encode, layout
from speculators.errors import ContractError
from speculators.job import write_json

FORMAT = 1
"""Raised when a reader of an older release could not read the shards."""
FORMAT_SCALED = 2
"""Of states with scales. Older releases read the others still."""
CONVENTION = (
    "layer id i is the residual stream entering layer i; the number of layers is the last one's output, not normed"
)
INDEX = "index.json"
DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    FLOAT8: "F8_E4M3",
}
"""The names that safetensors gives to what a shard may hold."""
PAST = {"states"}
"""What may be read past the page cache; all else is a few bytes a token."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where one row lies."""

    shard: int
    start: int
    length: int


def feature_contract(
    *, target: str, tokens: str, dtype: str, compute_dtype: str, layer_ids: list[int], hidden_size: int
) -> dict[str, Any]:
    """What a set of hidden states is; `target` and `tokens` are digests, `layer_ids` everything captured, in order."""
    return {
        "format": FORMAT_SCALED if getattr(torch, dtype) is FLOAT8 else FORMAT,
        "target": target,
        "tokens": tokens,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "layer_ids": list(layer_ids),
        "convention": CONVENTION,
        "hidden_size": hidden_size,
        "normed": False,
    }


def check_contract(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ContractError, naming every field, where `found` is not what `wanted` asks; other fields are ignored."""
    wrong = [
        f"{name} is {json.dumps(found.get(name))}, wanted {json.dumps(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if wrong:
        raise ContractError(
            f"these hidden states are not what is asked for: {'; '.join(wrong)}",
            "extract them again from this target, these tokens and these layers, with `run extract`",
        )


class ShardWriter:
    """Appends rows, seals a shard whenever `shard_tokens` is reached, goes on where an earlier writer stopped.

    Rows have to come in the same order in every attempt; then shards hold the same bytes however often it was killed.
    """

    def __init__(self, directory: Path, contract: Mapping[str, Any], shard_tokens: int) -> None:
        self.directory = directory
        self.contract = dict(contract)
        self.shard_tokens = shard_tokens
        self.done: set[int] = set()
        """Rows in sealed shards."""
        directory.mkdir(parents=True, exist_ok=True)
        self._digests: list[str] = []
        self._spans: dict[int, Span] = {}
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._pending_tokens = 0
        for leftover in directory.glob(".shard-*"):
            leftover.unlink()
        while (path := directory / shard_name(len(self._digests))).exists():
            self._adopt(path)

    def add(self, row: int, token_ids: torch.Tensor, states: torch.Tensor) -> None:
        """Append one row: `token_ids` int64 [T], `states` [T, L, H]; they are converted to the stored dtype.

        Raises:
            ContractError: the states are those of other layers or of another target.
            StageError: a value is not finite, or too large for the stored dtype.
        """
        if row in self._spans:
            raise ValueError(f"row {row} was added before")
        wanted = (len(token_ids), len(self.contract["layer_ids"]), self.contract["hidden_size"])
        if tuple(states.shape) != wanted:
            raise ContractError(
                f"the states of row {row} are {list(states.shape)}, {list(wanted)} was expected",
                "the server does not capture the layers of this recipe; is `serve.url` a server of another run?",
            )
        self.add_encoded(row, token_ids, encode(f"row {row}", states, self.contract["dtype"]))

    def add_encoded(self, row: int, token_ids: torch.Tensor, encoded: Mapping[str, torch.Tensor]) -> None:
        """As `add`, but states that `encode` has been over, for this contract."""
        self._spans[row] = Span(len(self._digests), self._pending_tokens, len(token_ids))
        self._pending.append((row, {"token_ids": token_ids.to(torch.int64), **encoded}))
        self._pending_tokens += len(token_ids)
        if self._pending_tokens >= self.shard_tokens:
            self._seal()

    def close(self) -> None:
        """Seal what is left and write the index."""
        if self._pending:
            self._seal()
        shards = [{"file": name, "sha256": digest} for name, digest in self.digests.items()]
        rows = {str(row): [span.shard, span.start, span.length] for row, span in sorted(self._spans.items())}
        write_json(self.directory / INDEX, {"contract": self.contract, "shards": shards, "rows": rows})

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of every sealed shard, by its file's name."""
        return {shard_name(shard): digest for shard, digest in enumerate(self._digests)}

    def _seal(self) -> None:
        shard = len(self._digests)
        rows = [[row, self._spans[row].start, self._spans[row].length] for row, _ in self._pending]
        head = json.dumps({"contract": self.contract, "rows": rows}, sort_keys=True)
        tensors = {name: [its[name] for _, its in self._pending] for name in shard_layout(self.contract)}
        path = self.directory / shard_name(shard)
        beside = self.directory / f".{path.name}"
        digest = write_safetensors(beside, tensors, {"contract": head})
        os.replace(beside, path)
        sync_directory(self.directory)
        self._digests.append(digest)
        self.done.update(row for row, _ in self._pending)
        self._pending.clear()
        self._pending_tokens = 0

    def _adopt(self, path: Path) -> None:
        """Take over a shard that an earlier attempt sealed."""
        contract, rows, _ = _open(path)
        check_contract(contract, self.contract)
        shard = len(self._digests)
        self._spans.update({row: Span(shard, start, length) for row, start, length in rows})
        self.done.update(row for row, _, _ in rows)
        with path.open("rb") as file:
            self._digests.append(hashlib.file_digest(file, "sha256").hexdigest())


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
            raise _missing(path) from None
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
                raise _damaged(path, "it was cut off")
            read = at + got
        np.copyto(room, memory[before:wanted_bytes])


def larger_than_memory(directory: Path) -> bool:
    """Whether the shards of a set are more than the page cache is likely to hold: half of this machine's memory."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return sum(path.stat().st_size for path in directory.glob("shard-*")) > pages * page // 2


class ShardReader:
    """Rows by number, read into memory that is the caller's: what is read is all that takes any.

    Args:
        directory: of the set.
        files: where several readers share what stays open.
        past_the_cache: read states so, where the file system can.
    """

    def __init__(
        self, directory: Path, files: Callable[[Path], OpenFile] | None = None, past_the_cache: bool = False
    ) -> None:
        self.directory = directory
        path = directory / INDEX
        try:
            index = json.loads(path.read_text())
            self.contract: dict[str, Any] = index["contract"]
            self._spans = {int(row): Span(*span) for row, span in index["rows"].items()}
            self._paths = [directory / shard["file"] for shard in index["shards"]]
        except FileNotFoundError:
            raise ContractError(f"{directory} has no {INDEX}: it is no set of hidden states", "extract them") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ContractError(f"{path} is damaged: {error!r}", "extract the hidden states again") from None
        if self.contract.get("format") not in (FORMAT, FORMAT_SCALED):
            raise ContractError(
                f"{path} has format {self.contract.get('format')}, this release reads {FORMAT} and {FORMAT_SCALED}",
                "extract the hidden states again",
            )
        self.rows: list[int] = sorted(self._spans)
        self._files = files or open_files()
        self._columns: dict[int, dict[str, Column]] = {}
        self._past: PastTheCache | None = None
        if past_the_cache and self._paths:
            with contextlib.suppress(OSError):
                self._past = PastTheCache(self._paths[0])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What there is of one token, by name: its type, and its shape."""
        return shard_layout(self.contract)

    def length(self, row: int) -> int:
        """Tokens of a row, without touching its shard."""
        return self._span(row).length

    def token_ids(self, row: int) -> torch.Tensor:
        """The ids that the states of a row belong to, int64 [T]."""
        return self._whole(row, ("token_ids",))["token_ids"]

    def states(self, row: int) -> torch.Tensor:
        """The states of a row, [T, L, H], in the stored dtype, but in bfloat16 if that is float8."""
        return decode(self.encoded(row))

    def encoded(self, row: int) -> dict[str, torch.Tensor]:
        """The states of a row as they are stored; `decode` makes states of it, also of several rows joined."""
        return self._whole(row, tuple(name for name in self.layout if name != "token_ids"))

    def fill(self, parts: Sequence[tuple[int, int]], into: Mapping[str, torch.Tensor]) -> None:
        """Read the beginnings of rows, one after the other.

        Args:
            parts: row and number of tokens of each.
            into: contiguous tensors by name, as `layout` has them, of all these tokens.
        """
        past: list[tuple[Path, int, npt.NDArray[np.uint8]]] = []
        for name, tensor in into.items():
            room, begin = tensor.view(torch.uint8).flatten().numpy(), 0
            for row, tokens in parts:
                shard, offset, size = self._place(row, tokens, name)
                if self._past is not None and name in PAST:
                    past.append((self._paths[shard], offset, room[begin : begin + size]))
                else:
                    self._read(shard, offset, room.data[begin : begin + size])
                begin += size
        if self._past is not None:
            self._past.read(past)

    def will_need(self, parts: Sequence[tuple[int, int]]) -> None:
        """Let the kernel begin to read what `fill` will be asked for, where it is not in memory."""
        for name in self.layout:
            if self._past is not None and name in PAST:
                continue
            for row, tokens in parts:
                shard, offset, size = self._place(row, tokens, name)
                os.posix_fadvise(self._file(shard).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def check(self) -> None:
        """Look whether every shard is there, whole, and of this contract.

        Raises:
            ContractError: one is not.
        """
        for shard in range(len(self._paths)):
            self._opened(shard)

    def _span(self, row: int) -> Span:
        try:
            return self._spans[row]
        except KeyError:
            raise ContractError(
                f"{self.directory} has no hidden states of row {row}", "extract the hidden states again"
            ) from None

    def _whole(self, row: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tokens = self.length(row)
        shapes = {name: self.layout[name] for name in names}
        found = {name: torch.empty(tokens, *shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
        self.fill([(row, tokens)], found)
        return found

    def _place(self, row: int, tokens: int, name: str) -> tuple[int, int, int]:
        """Where a row's first tokens lie: shard, first byte, bytes."""
        span = self._span(row)
        assert tokens <= span.length
        column = self._opened(span.shard)[name]
        return span.shard, column.offset + span.start * column.bytes, tokens * column.bytes

    def _opened(self, shard: int) -> dict[str, Column]:
        if shard not in self._columns:
            contract, _, columns = _open(self._paths[shard])
            check_contract(contract, self.contract)
            self._columns[shard] = columns
        return self._columns[shard]

    def _file(self, shard: int) -> OpenFile:
        try:
            return self._files(self._paths[shard])
        except FileNotFoundError:
            raise _missing(self._paths[shard]) from None

    def _read(self, shard: int, offset: int, room: memoryview) -> None:
        file = self._file(shard)
        while room:
            read = os.preadv(file.descriptor, [room], offset)
            if not read:
                raise _damaged(self._paths[shard], "it was cut off")
            room, offset = room[read:], offset + read


def shard_layout(contract: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a shard holds of one token, in the order in which it lies there: name, type and shape."""
    states = layout(len(contract["layer_ids"]), contract["hidden_size"], contract["dtype"])
    return {"token_ids": (torch.int64, ()), **states}


def shard_name(shard: int) -> str:
    """The file name of a shard."""
    return f"shard-{shard:05d}.safetensors"


def write_safetensors(path: Path, tensors: Mapping[str, list[torch.Tensor]], metadata: Mapping[str, str]) -> str:
    """Write tensors, each given as pieces along its first axis, and return the sha256 of the file.

    Piece by piece, so that a shard is never in memory twice, and in the order given, so that the same rows are the same
    bytes. Wider types have to come first: a tensor starts where the one before it ends.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, pieces in tensors.items():
        start, end = end, end + sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        header[name] = {"dtype": DTYPES[pieces[0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in itertools.chain([len(text).to_bytes(8, "little"), text], *map(_bytes, tensors.values())):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(pieces: list[torch.Tensor]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Column:
    """A tensor of a shard."""

    offset: int
    """Of its first byte in the file."""
    bytes: int
    """Of one token."""


def _open(path: Path) -> tuple[dict[str, Any], list[list[int]], dict[str, Column]]:
    """A shard's contract, its rows as [row, start, length], and its tensors; the file is as long as they say."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        head = json.loads(header.pop("__metadata__")["contract"])
        contract, rows = head["contract"], head["rows"]
        tokens, end, columns = sum(row[2] for row in rows), 8 + length, {}
        for name, (dtype, shape) in shard_layout(contract).items():
            each = dtype.itemsize * math.prod(shape)
            columns[name] = Column(8 + length + header[name]["data_offsets"][0], each)
            if header[name]["dtype"] != DTYPES[dtype] or header[name]["shape"] != [tokens, *shape]:
                raise ValueError(f"{name} is {header[name]}, of {tokens} tokens")
            end = max(end, columns[name].offset + tokens * each)
        if end != size:
            raise ValueError(f"it has {size} bytes, {end} were expected")
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, str(error) if type(error) is ValueError else repr(error)) from None
    return contract, rows, columns


def _missing(path: Path) -> ContractError:
    return ContractError(f"{path} is missing", "extract the hidden states again")


def _damaged(path: Path, why: str) -> ContractError:
    return ContractError(f"{path} is damaged: {why}", "delete it and run the same command again")
