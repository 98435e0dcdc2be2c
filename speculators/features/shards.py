"""Hidden states on disk: safetensors shards of many rows, an index, and the contract that identifies them.

    shard-00000.safetensors   token_ids int64 [N], `states` [N, L - 1, H], `last` [U, H], and for float8 `scales`
                              bfloat16 [N, L - 1], `last_scales` [U]; the metadata has the contract and the rows
    shard-00001.safetensors   ...
    index.json                the contract, each row's `RowSpan`, the name and the sha256 of every shard

N counts tokens, L the captured layers, H the target's hidden size, U the positions at which the last layer is kept.
`states` and `last` have the contract's `dtype` (`features.contract`: target, tokens, layers, dtype).
`last` is the last layer's output, before the final norm. It only serves to compute the target's distribution over the
next token, so it is kept at the supervised positions alone; the layers that the draft reads are kept at every position.

A full shard is written to a temporary name, fsynced, and renamed. So a file with a shard's name is complete, a killed
writer loses only the rows of the shard that it was filling, and the next writer in the same directory continues after
the last complete one. Every shard can be read without the index, which is derived from the shards at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from speculators.data.packing import RowSlice
from speculators.errors import ContractError
from speculators.features.contract import FORMAT, check_contract
from speculators.features.encoding import FLOAT8, LAST, decode, encode, last_layer_part, layout, split_last_layer
from speculators.features.io import Bytes, FileReader, damaged_file, missing_file
from speculators.job import write_json

INDEX = "index.json"
DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    FLOAT8: "F8_E4M3",
}
"""dtype -> its name in a safetensors header."""
LARGE_TENSORS = {"states", "last"}
"""The tensors that direct I/O may read; the others are a few bytes a token."""


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The location of one row in the shards."""

    shard: int
    """Number of the shard, from 0."""
    start: int
    """Index of the row's first token in the shard."""
    length: int
    """Tokens of the row."""
    last_start: int
    """Index of the row's first entry in the shard's `last`."""
    ranges: list[list[int]]
    """Positions of the row that have an entry in `last`, as [first, end) pairs in ascending order."""

    def last_count(self, tokens: int) -> int:
        """Number of entries in `last` among the row's first `tokens` positions."""
        return sum(min(end, tokens) - min(begin, tokens) for begin, end in self.ranges)

    def slice(self, begin: int, end: int) -> RowSpan:
        """Return the location of the row's positions [begin, end), as a row of its own."""
        assert end <= self.length
        ranges = [[max(first, begin) - begin, min(last, end) - begin] for first, last in self.ranges]
        ranges = [[first, last] for first, last in ranges if first < last]
        return RowSpan(self.shard, self.start + begin, end - begin, self.last_start + self.last_count(begin), ranges)

    def last_mask(self, tokens: int) -> npt.NDArray[np.bool_]:
        """bool [tokens] over the row's first positions: true where the last layer is kept."""
        mask = np.zeros(tokens, np.bool_)
        for begin, end in self.ranges:
            mask[begin:end] = True
        return mask


def mask_to_ranges(mask: torch.Tensor) -> list[list[int]]:
    """The [first, end) ranges in which a bool [T] mask is true, ascending."""
    false = torch.zeros(1, dtype=torch.bool)
    padded = torch.cat([false, mask, false])
    ranges: list[list[int]] = (padded[1:] != padded[:-1]).nonzero().view(-1, 2).tolist()
    return ranges


class ShardWriter:
    """Appends rows to shards of at least `shard_tokens` tokens (the last has fewer), after those in the directory.

    Rows in `done` are to be skipped. If every process that writes to the directory adds the rows in the same order, the
    shards hold the same bytes however often one was killed.
    """

    def __init__(self, directory: Path, contract: Mapping[str, Any], shard_tokens: int) -> None:
        self.directory = directory
        self.contract = dict(contract)
        self.shard_tokens = shard_tokens
        self.done: set[int] = set()
        """Rows in complete shards."""
        directory.mkdir(parents=True, exist_ok=True)
        self._digests: list[str] = []
        self._spans: dict[int, RowSpan] = {}
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._pending_tokens, self._pending_last = 0, 0
        for leftover in directory.glob(".shard-*"):
            leftover.unlink()
        while (path := directory / shard_name(len(self._digests))).exists():
            self._adopt(path)

    def add(
        self, row: int, token_ids: torch.Tensor, hidden_states: torch.Tensor, last: torch.Tensor | None = None
    ) -> None:
        """Append one row, converted to the contract's dtype.

        Args:
            row: its number.
            token_ids: int64 [T].
            hidden_states: [T, L, H].
            last: bool [T], true where the last layer is kept; None keeps it everywhere.

        Raises:
            ContractError: the number of layers or the hidden size is not the contract's.
            StageError: a value is not finite, or too large for the stored dtype.
            ValueError: the row was added before.
        """
        if row in self._spans:
            raise ValueError(f"row {row} was added before")
        expected = (len(token_ids), len(self.contract["layer_ids"]), self.contract["hidden_size"])
        if tuple(hidden_states.shape) != expected:
            raise ContractError(
                f"the hidden states of row {row} have shape {list(hidden_states.shape)}, expected {list(expected)}",
                "the server does not capture the layers of this recipe; is `serve.url` a server of another run?",
            )
        last_mask = torch.ones(len(token_ids), dtype=torch.bool) if last is None else last
        encoded = encode(f"row {row}", hidden_states, self.contract["dtype"])
        self.add_encoded(row, token_ids, split_last_layer(encoded, last_mask), last_mask)

    def add_encoded(
        self, row: int, token_ids: torch.Tensor, encoded: Mapping[str, torch.Tensor], last: torch.Tensor
    ) -> None:
        """Append one row that is encoded already: the tensors that `split_last_layer` returns."""
        ranges = mask_to_ranges(last)
        self._spans[row] = RowSpan(len(self._digests), self._pending_tokens, len(token_ids), self._pending_last, ranges)
        self._pending.append((row, {"token_ids": token_ids.to(torch.int64), **encoded}))
        self._pending_tokens += len(token_ids)
        self._pending_last += len(encoded["last"])
        if self._pending_tokens >= self.shard_tokens:
            self._seal()

    def close(self) -> None:
        """Write the last shard and the index."""
        if self._pending:
            self._seal()
        shards = [{"file": name, "sha256": digest} for name, digest in self.digests.items()]
        write_index(self.directory, self.contract, shards, self._spans)

    @property
    def digests(self) -> dict[str, str]:
        """File name -> sha256 of every complete shard."""
        return {shard_name(shard): digest for shard, digest in enumerate(self._digests)}

    def _seal(self) -> None:
        shard = len(self._digests)
        rows = [[row, *_fields(self._spans[row])] for row, _ in self._pending]
        metadata = json.dumps({"contract": self.contract, "rows": rows}, sort_keys=True)
        tensors = {name: [row[name] for _, row in self._pending] for name in shard_layout(self.contract)}
        path = self.directory / shard_name(shard)
        temporary = self.directory / f".{path.name}"
        digest = write_safetensors(temporary, tensors, {"contract": metadata})
        os.replace(temporary, path)
        sync_directory(self.directory)
        self._digests.append(digest)
        self.done.update(row for row, _ in self._pending)
        self._pending.clear()
        self._pending_tokens, self._pending_last = 0, 0

    def _adopt(self, path: Path) -> None:
        """Count a shard of an earlier attempt as written."""
        contract, rows, _ = _open(path)
        check_contract(contract, self.contract)
        shard = len(self._digests)
        self._spans.update({row: RowSpan(shard, *fields) for row, *fields in rows})
        self.done.update(row for row, *_ in rows)
        with path.open("rb") as file:
            self._digests.append(hashlib.file_digest(file, "sha256").hexdigest())


class ShardReader:
    """Reads rows by number from a directory of shards into tensors of the caller.

    `files` is a file reader whose open files are shared; `direct_io` reads the hidden states without the page cache,
    where the file system supports that.

    Raises:
        ContractError: there is no index, or it is damaged or of another format.
    """

    def __init__(self, directory: Path, files: FileReader | None = None, direct_io: bool = False) -> None:
        self.directory = directory
        path = directory / INDEX
        try:
            index = json.loads(path.read_text())
            self.contract: dict[str, Any] = index["contract"]
            if self.contract.get("format") != FORMAT:
                raise ContractError(
                    f"{path} has format {self.contract.get('format')}, this release reads {FORMAT}",
                    "extract the hidden states again",
                )
            self._spans = {int(row): RowSpan(*span) for row, span in index["rows"].items()}
            self._shards: list[dict[str, str]] = index["shards"]
            self._paths = [directory / shard["file"] for shard in self._shards]
        except FileNotFoundError:
            raise ContractError(f"{directory} has no {INDEX}: it holds no hidden states", "extract them") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ContractError(f"{path} is damaged: {error!r}", "extract the hidden states again") from None
        self.rows: list[int] = sorted(self._spans)
        self._columns: dict[int, dict[str, Column]] = {}
        self._files = files or FileReader()
        direct = FileReader(direct_io=True) if direct_io and self._paths else None
        self._direct_files = direct if direct is not None and direct.supports(self._paths[0]) else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape) of one token, or of one kept position for the last layer's tensors."""
        return shard_layout(self.contract)

    def length(self, row: int) -> int:
        """Tokens of a row; does not open its shard."""
        return self._span(row).length

    def token_ids(self, row: int) -> torch.Tensor:
        """Token ids of a row, int64 [T]."""
        return self._read_row(row, ("token_ids",))["token_ids"]

    def last_layer_mask(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """bool [tokens] over a row's first positions: true where the last layer is kept."""
        return self._span(row).last_mask(tokens)

    def hidden_states(self, row: int) -> torch.Tensor:
        """Hidden states of a row, [T, L, H], in the stored dtype (bfloat16 if that is float8).

        The last layer is NaN at the positions where it was not kept.
        """
        _, encoded, mask = self.encoded_row(row)
        hidden_states = decode(encoded)
        last = hidden_states.new_full((len(hidden_states), hidden_states.shape[-1]), math.nan)
        last[mask] = decode(last_layer_part(encoded))
        return torch.cat([hidden_states, last[:, None]], 1)

    def encoded_row(self, row: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """A row as it is stored: token ids [T], tensors of `split_last_layer`, and the mask [T] of its last layer."""
        encoded = self._read_row(row, tuple(self.layout))
        mask = torch.from_numpy(self.last_layer_mask(row, self.length(row)))
        return encoded.pop("token_ids"), encoded, mask

    def fill(self, parts: Sequence[tuple[int, int]], into: Mapping[str, torch.Tensor]) -> None:
        """Read the first tokens of several rows into tensors, row after row.

        Args:
            parts: (row, number of tokens) of each.
            into: contiguous tensors by name, of the dtypes of `layout`: [sum of the token counts, *shape], and for the
                last layer's tensors [positions among them where it is kept, *shape].
        """
        buffered: list[tuple[Path, int, Bytes]] = []
        direct: list[tuple[Path, int, Bytes]] = []
        for name, tensor in into.items():
            buffer, begin = tensor.view(torch.uint8).flatten().numpy(), 0
            reads = direct if name in LARGE_TENSORS and self._direct_files is not None else buffered
            for row, tokens in parts:
                path, offset, size = self._locate(row, tokens, name)
                reads.append((path, offset, buffer[begin : begin + size]))
                begin += size
        self._files.read(buffered)
        if self._direct_files is not None:
            self._direct_files.read(direct)

    def will_need(self, parts: Sequence[tuple[int, int]]) -> None:
        """Have the kernel read what a later `fill` of the same rows will need."""
        for name in self.layout:
            if self._direct_files is not None and name in LARGE_TENSORS:
                continue
            for row, tokens in parts:
                self._files.will_need(*self._locate(row, tokens, name))

    def link_rows(self, slices: Mapping[int, RowSlice], contract: Mapping[str, Any], directory: Path) -> dict[str, str]:
        """Make a second directory of hidden states from slices of these rows, over the same shards (`link`).

        `slices` maps each row number there to its slice of a row here. `contract`, the new directory's, may differ in
        `tokens` alone. Returns file name -> sha256 of every shard.
        """
        check_contract(self.contract, {**contract, "tokens": self.contract["tokens"]})
        spans = {number: self._span(part.row).slice(part.begin, part.end) for number, part in slices.items()}
        for path in self._paths:
            link(path, directory / path.name)
        shards = [{**shard, "tokens": self.contract["tokens"]} for shard in self._shards]
        write_index(directory, contract, shards, spans)
        return {shard["file"]: shard["sha256"] for shard in shards}

    def check(self) -> None:
        """Check that every shard exists, is complete, and has this contract.

        Raises:
            ContractError: one of them does not.
        """
        for shard in range(len(self._paths)):
            self._columns_of(shard)

    def _span(self, row: int) -> RowSpan:
        try:
            return self._spans[row]
        except KeyError:
            raise ContractError(
                f"{self.directory} has no hidden states of row {row}", "extract the hidden states again"
            ) from None

    def _read_row(self, row: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        span, tensors = self._span(row), {}
        for name in names:
            dtype, shape = self.layout[name]
            count = span.last_count(span.length) if name in LAST.values() else span.length
            tensors[name] = torch.empty(count, *shape, dtype=dtype)
        self.fill([(row, span.length)], tensors)
        return tensors

    def _locate(self, row: int, tokens: int, name: str) -> tuple[Path, int, int]:
        """File, offset and size in bytes of a tensor's entries for a row's first `tokens` positions."""
        span = self._span(row)
        assert tokens <= span.length
        column = self._columns_of(span.shard)[name]
        start, count = (span.last_start, span.last_count(tokens)) if name in LAST.values() else (span.start, tokens)
        return self._paths[span.shard], column.offset + start * column.bytes, count * column.bytes

    def _columns_of(self, shard: int) -> dict[str, Column]:
        if shard not in self._columns:
            contract, _, columns = _open(self._paths[shard])
            tokens = self._shards[shard].get("tokens", self.contract["tokens"])
            check_contract(contract, {**self.contract, "tokens": tokens})
            self._columns[shard] = columns
        return self._columns[shard]


def _fields(span: RowSpan) -> list[Any]:
    return [span.start, span.length, span.last_start, span.ranges]


def shard_layout(contract: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape of one token or entry), in the order of the file."""
    encoded = layout(len(contract["layer_ids"]), contract["hidden_size"], contract["dtype"])
    return {"token_ids": (torch.int64, ()), **encoded}


def shard_name(shard: int) -> str:
    """The file name of a shard."""
    return f"shard-{shard:05d}.safetensors"


def write_safetensors(path: Path, tensors: Mapping[str, list[torch.Tensor]], metadata: Mapping[str, str]) -> str:
    """Write tensors, each given as chunks along its first axis, and return the sha256 of the file.

    Chunks are written one by one, so a shard is never in memory twice, and in the order given, so the same rows give
    the same bytes. Wider dtypes have to come first, since a tensor starts where the previous one ends. The large
    tensors start at a disk sector, if the size of a token allows, so that direct I/O needs no copy.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end, small_end = 0, 0
    for name, chunks in tensors.items():
        start, end = end, end + sum(chunk.nbytes for chunk in chunks)
        shape = [sum(len(chunk) for chunk in chunks), *chunks[0].shape[1:]]
        header[name] = {"dtype": DTYPES[chunks[0].dtype], "shape": shape, "data_offsets": [start, end]}
        small_end = small_end if name in LARGE_TENSORS else end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text) + small_end) % FileReader.SECTOR)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in itertools.chain([len(text).to_bytes(8, "little"), text], *map(_bytes, tensors.values())):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(chunks: list[torch.Tensor]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_index(
    directory: Path, contract: Mapping[str, Any], shards: Sequence[Mapping[str, str]], spans: Mapping[int, RowSpan]
) -> None:
    """Write the index of a directory of shards.

    Each of `shards` has `file`, `sha256`, and `tokens` where the shard's own contract names another digest.
    """
    rows = {str(row): [span.shard, *_fields(span)] for row, span in sorted(spans.items())}
    write_json(directory / INDEX, {"contract": dict(contract), "shards": list(shards), "rows": rows})


def link(shard: Path, destination: Path) -> None:
    """Hard-link a shard to a second path, or copy it where the file system cannot. Complete shards do not change."""
    try:
        os.link(shard, destination)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(shard, destination)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Column:
    """The location of a tensor in a shard's file."""

    offset: int
    """Of its first byte."""
    bytes: int
    """Size of one token or entry."""


def _open(path: Path) -> tuple[dict[str, Any], list[list[Any]], dict[str, Column]]:
    """Read a shard's contract, rows ([row, *fields of a span]) and tensors from its header; check the file's size."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        metadata = json.loads(header.pop("__metadata__")["contract"])
        contract, rows = metadata["contract"], metadata["rows"]
        spans, columns, begin = [RowSpan(0, *fields) for _, *fields in rows], {}, 0
        tokens, entries = sum(span.length for span in spans), sum(span.last_count(span.length) for span in spans)
        for name, (dtype, shape) in shard_layout(contract).items():
            size_each, count = dtype.itemsize * math.prod(shape), entries if name in LAST.values() else tokens
            end = begin + count * size_each
            if header[name] != {"dtype": DTYPES[dtype], "shape": [count, *shape], "data_offsets": [begin, end]}:
                raise ValueError(f"{name} is {header[name]}, of {count} tokens")
            columns[name], begin = Column(8 + length + begin, size_each), end
        if 8 + length + begin != size:
            raise ValueError(f"it has {size} bytes, {8 + length + begin} were expected")
    except FileNotFoundError:
        raise missing_file(path) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise damaged_file(path, str(error) if type(error) is ValueError else repr(error)) from None
    return contract, rows, columns
