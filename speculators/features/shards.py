"""Hidden states on disk: safetensors shards of many rows, an index, and the contract that says what they are.

    shard-00000.safetensors   token_ids int64 [N], states [N, L - 1, H], last [U, H], and for float8 scales
                              bfloat16 [N, L - 1], last_scales [U]; the metadata holds the contract and the rows
    shard-00001.safetensors   ...
    index.json                the contract, each row's `Span`, the name and the sha256 of every shard

`last` is what leaves the last layer. It is only there to say what the target says next, so it is kept at those places
of a row where that is asked for, the draft's own layers everywhere.

A shard is written when it is full: beside its place, fsynced, then renamed. So whatever bears a shard's name is whole,
a killed writer loses only the rows of the shard it was filling, and a new writer in the same directory goes on after
the last sealed one. Every shard can be read without the index, which is made from them at the end.
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

from speculators.errors import ContractError
from speculators.features.contract import FORMAT, check_contract
from speculators.features.encoding import FLOAT8, LAST, decode, encode, last_of, layout, sift
from speculators.features.io import Bytes, Reading, damaged, missing
from speculators.job import write_json

INDEX = "index.json"
DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    FLOAT8: "F8_E4M3",
}
"""The names that safetensors gives to what a shard may hold."""
PAST = {"states", "last"}
"""What may be read past the page cache; all else is a few bytes a token."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where one row lies."""

    shard: int
    start: int
    length: int
    last: int
    """Where its part of `last` begins."""
    ranges: list[list[int]]
    """Where the last layer is kept: from the first of two places to before the second."""

    def before(self, tokens: int) -> int:
        """How many of these places are among the row's first tokens."""
        return sum(min(end, tokens) - min(begin, tokens) for begin, end in self.ranges)

    def part(self, begin: int, tokens: int) -> Span:
        """So many of its tokens, from one on, as a row."""
        assert begin + tokens <= self.length
        end = begin + tokens
        ranges = [[max(first, begin) - begin, min(past, end) - begin] for first, past in self.ranges]
        kept = [[first, past] for first, past in ranges if first < past]
        return Span(self.shard, self.start + begin, tokens, self.last + self.before(begin), kept)

    def places(self, tokens: int) -> npt.NDArray[np.bool_]:
        """The first tokens, true where the last layer is kept."""
        found = np.zeros(tokens, np.bool_)
        for begin, end in self.ranges:
            found[begin:end] = True
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of a row."""

    row: int
    begin: int
    tokens: int


def ranges_of(wanted: torch.Tensor) -> list[list[int]]:
    """`Span.ranges` of bool [T]."""
    outside = torch.zeros(1, dtype=torch.bool)
    framed = torch.cat([outside, wanted, outside])
    ranges: list[list[int]] = (framed[1:] != framed[:-1]).nonzero().view(-1, 2).tolist()
    return ranges


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
        self._pending_tokens, self._pending_last = 0, 0
        for leftover in directory.glob(".shard-*"):
            leftover.unlink()
        while (path := directory / shard_name(len(self._digests))).exists():
            self._adopt(path)

    def add(self, row: int, token_ids: torch.Tensor, states: torch.Tensor, last: torch.Tensor | None = None) -> None:
        """Append one row: `token_ids` int64 [T], `states` [T, L, H]; they are converted to the stored dtype.

        The last layer is kept where `last`, bool [T], says so; everywhere if it is None.

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
        wanted_last = torch.ones(len(token_ids), dtype=torch.bool) if last is None else last
        encoded = encode(f"row {row}", states, self.contract["dtype"])
        self.add_sifted(row, token_ids, sift(encoded, wanted_last), wanted_last)

    def add_sifted(
        self, row: int, token_ids: torch.Tensor, sifted: Mapping[str, torch.Tensor], last: torch.Tensor
    ) -> None:
        """As `add`, but what `sift` has left of the states for this contract."""
        ranges = ranges_of(last)
        self._spans[row] = Span(len(self._digests), self._pending_tokens, len(token_ids), self._pending_last, ranges)
        self._pending.append((row, {"token_ids": token_ids.to(torch.int64), **sifted}))
        self._pending_tokens += len(token_ids)
        self._pending_last += len(sifted["last"])
        if self._pending_tokens >= self.shard_tokens:
            self._seal()

    def close(self) -> None:
        """Seal what is left and write the index."""
        if self._pending:
            self._seal()
        shards = [{"file": name, "sha256": digest} for name, digest in self.digests.items()]
        write_index(self.directory, self.contract, shards, self._spans)

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of every sealed shard, by its file's name."""
        return {shard_name(shard): digest for shard, digest in enumerate(self._digests)}

    def _seal(self) -> None:
        shard = len(self._digests)
        rows = [[row, *_plain(self._spans[row])] for row, _ in self._pending]
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
        self._pending_tokens, self._pending_last = 0, 0

    def _adopt(self, path: Path) -> None:
        """Take over a shard that an earlier attempt sealed."""
        contract, rows, _ = _open(path)
        check_contract(contract, self.contract)
        shard = len(self._digests)
        self._spans.update({row: Span(shard, *where) for row, *where in rows})
        self.done.update(row for row, *_ in rows)
        with path.open("rb") as file:
            self._digests.append(hashlib.file_digest(file, "sha256").hexdigest())


class ShardReader:
    """Rows by number, read into memory that is the caller's: what is read is all that takes any.

    Args:
        directory: of the set.
        reading: where several readers share what stays open.
        past_the_cache: read states so, where the file system can.
    """

    def __init__(self, directory: Path, reading: Reading | None = None, past_the_cache: bool = False) -> None:
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
            self._spans = {int(row): Span(*span) for row, span in index["rows"].items()}
            self._shards: list[dict[str, str]] = index["shards"]
            self._paths = [directory / shard["file"] for shard in self._shards]
        except FileNotFoundError:
            raise ContractError(f"{directory} has no {INDEX}: it is no set of hidden states", "extract them") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ContractError(f"{path} is damaged: {error!r}", "extract the hidden states again") from None
        self.rows: list[int] = sorted(self._spans)
        self._columns: dict[int, dict[str, Column]] = {}
        self._reading = reading or Reading()
        past = Reading(past=True) if past_the_cache and self._paths else None
        self._past = past if past is not None and past.can(self._paths[0]) else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What there is of one token, and in `LAST` of one place, by name: its type, and its shape."""
        return shard_layout(self.contract)

    def length(self, row: int) -> int:
        """Tokens of a row, without touching its shard."""
        return self._span(row).length

    def token_ids(self, row: int) -> torch.Tensor:
        """The ids that the states of a row belong to, int64 [T]."""
        return self._whole(row, ("token_ids",))["token_ids"]

    def last_places(self, row: int, tokens: int) -> npt.NDArray[np.bool_]:
        """A row's first tokens, true where the last layer is kept."""
        return self._span(row).places(tokens)

    def states(self, row: int) -> torch.Tensor:
        """The states of a row, [T, L, H], in the stored dtype, but in bfloat16 if that is float8.

        The last layer's are NaN where they were not kept.
        """
        sifted = self._whole(row, tuple(name for name in self.layout if name != "token_ids"))
        states, kept = decode(sifted), torch.from_numpy(self.last_places(row, self.length(row)))
        last = states.new_full((len(states), states.shape[-1]), math.nan)
        last[kept] = decode(last_of(sifted))
        return torch.cat([states, last[:, None]], 1)

    def fill(self, parts: Sequence[tuple[int, int]], into: Mapping[str, torch.Tensor]) -> None:
        """Read the beginnings of rows, one after the other.

        Args:
            parts: row and number of tokens of each.
            into: contiguous tensors by name, as `layout` has them, of all these tokens, or of those of them where the
                last layer is kept.
        """
        through: list[tuple[Path, int, Bytes]] = []
        past: list[tuple[Path, int, Bytes]] = []
        for name, tensor in into.items():
            room, begin = tensor.view(torch.uint8).flatten().numpy(), 0
            wanted = past if name in PAST and self._past is not None else through
            for row, tokens in parts:
                path, offset, size = self._place(row, tokens, name)
                wanted.append((path, offset, room[begin : begin + size]))
                begin += size
        self._reading.read(through)
        if self._past is not None:
            self._past.read(past)

    def will_need(self, parts: Sequence[tuple[int, int]]) -> None:
        """Let the kernel begin to read what `fill` will be asked for, where it is not in memory."""
        for name in self.layout:
            if self._past is not None and name in PAST:
                continue
            for row, tokens in parts:
                self._reading.will_need(*self._place(row, tokens, name))

    def write_parts(self, parts: Mapping[int, Part], contract: Mapping[str, Any], directory: Path) -> dict[str, str]:
        """Make another set of what is here, with an index of its own, over the same shards (`link`).

        Args:
            parts: what each row of the other set is, by its number.
            contract: of the other set. It may say of other tokens what these are the states of, and else is the same.
            directory: of the other set.

        Returns:
            The sha256 of every shard, by its file's name.
        """
        check_contract(self.contract, {**contract, "tokens": self.contract["tokens"]})
        spans = {number: self._span(part.row).part(part.begin, part.tokens) for number, part in parts.items()}
        for path in self._paths:
            link(path, directory / path.name)
        shards = [{**shard, "tokens": self.contract["tokens"]} for shard in self._shards]
        write_index(directory, contract, shards, spans)
        return {shard["file"]: shard["sha256"] for shard in shards}

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
        span, found = self._span(row), {}
        for name in names:
            dtype, shape = self.layout[name]
            count = span.before(span.length) if name in LAST.values() else span.length
            found[name] = torch.empty(count, *shape, dtype=dtype)
        self.fill([(row, span.length)], found)
        return found

    def _place(self, row: int, tokens: int, name: str) -> tuple[Path, int, int]:
        """Where what there is of a row's first tokens lies: file, first byte, bytes."""
        span = self._span(row)
        assert tokens <= span.length
        column = self._opened(span.shard)[name]
        start, count = (span.last, span.before(tokens)) if name in LAST.values() else (span.start, tokens)
        return self._paths[span.shard], column.offset + start * column.bytes, count * column.bytes

    def _opened(self, shard: int) -> dict[str, Column]:
        if shard not in self._columns:
            contract, _, columns = _open(self._paths[shard])
            own = self._shards[shard].get("tokens", self.contract["tokens"])
            check_contract(contract, {**self.contract, "tokens": own})
            self._columns[shard] = columns
        return self._columns[shard]


def _plain(span: Span) -> list[Any]:
    return [span.start, span.length, span.last, span.ranges]


def shard_layout(contract: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a shard holds of one token, or place, in the order in which it lies there: name, type and shape."""
    states = layout(len(contract["layer_ids"]), contract["hidden_size"], contract["dtype"])
    return {"token_ids": (torch.int64, ()), **states}


def shard_name(shard: int) -> str:
    """The file name of a shard."""
    return f"shard-{shard:05d}.safetensors"


def write_safetensors(path: Path, tensors: Mapping[str, list[torch.Tensor]], metadata: Mapping[str, str]) -> str:
    """Write tensors, each given as pieces along its first axis, and return the sha256 of the file.

    Piece by piece, so that a shard is never in memory twice, and in the order given, so that the same rows are the same
    bytes. Wider types have to come first: a tensor starts where the one before it ends. The `PAST` ones start at a
    sector, if the length of a token's states allows, so that they can be read straight into their place.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end, before = 0, 0
    for name, pieces in tensors.items():
        start, end = end, end + sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
        header[name] = {"dtype": DTYPES[pieces[0].dtype], "shape": shape, "data_offsets": [start, end]}
        before = before if name in PAST else end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text) + before) % Reading.SECTOR)
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


def write_index(
    directory: Path, contract: Mapping[str, Any], shards: Sequence[Mapping[str, str]], spans: Mapping[int, Span]
) -> None:
    """Write what makes shards a set.

    Each has its `file`, its `sha256`, and its `tokens` where those of its own contract are not the set's.
    """
    rows = {str(row): [span.shard, *_plain(span)] for row, span in sorted(spans.items())}
    write_json(directory / INDEX, {"contract": dict(contract), "shards": list(shards), "rows": rows})


def link(shard: Path, place: Path) -> None:
    """Have a shard in another set, without its bytes a second time where the file system has hard links.

    Nothing ever writes to a shard that bears its name.
    """
    try:
        os.link(shard, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(shard, place)


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


def _open(path: Path) -> tuple[dict[str, Any], list[list[Any]], dict[str, Column]]:
    """A shard's contract, its rows as [row, and what `_plain` gives], its tensors; the file is as long as they say."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        head = json.loads(header.pop("__metadata__")["contract"])
        contract, rows = head["contract"], head["rows"]
        spans, columns, begin = [Span(0, *where) for _, *where in rows], {}, 0
        tokens, places = sum(span.length for span in spans), sum(span.before(span.length) for span in spans)
        for name, (dtype, shape) in shard_layout(contract).items():
            each, count = dtype.itemsize * math.prod(shape), places if name in LAST.values() else tokens
            end = begin + count * each
            if header[name] != {"dtype": DTYPES[dtype], "shape": [count, *shape], "data_offsets": [begin, end]}:
                raise ValueError(f"{name} is {header[name]}, of {count} tokens")
            columns[name], begin = Column(8 + length + begin, each), end
        if 8 + length + begin != size:
            raise ValueError(f"it has {size} bytes, {8 + length + begin} were expected")
    except FileNotFoundError:
        raise missing(path) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise damaged(path, str(error) if type(error) is ValueError else repr(error)) from None
    return contract, rows, columns
