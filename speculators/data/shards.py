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

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from speculators.data.encoding import FLOAT8, decode, encode
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
        encoded = encode(f"row {row}", states, self.contract["dtype"])
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
        tensors = {name: [its[name] for _, its in self._pending] for name in shard_tensors(self.contract)}
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


class ShardReader:
    """Rows by number, memory-mapped: a row costs what it touches, and any number of processes share the pages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / INDEX
        try:
            index = json.loads(path.read_text())
            self.contract: dict[str, Any] = index["contract"]
            self._spans = {int(row): Span(*span) for row, span in index["rows"].items()}
            self._files = [directory / shard["file"] for shard in index["shards"]]
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
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, row: int) -> int:
        """Tokens of a row, without touching its shard."""
        return self._span(row).length

    def token_ids(self, row: int) -> torch.Tensor:
        """The ids that the states of a row belong to, int64 [T]."""
        return self._slices(row, ("token_ids",))["token_ids"]

    def states(self, row: int) -> torch.Tensor:
        """The states of a row, [T, L, H]; not to be written to.

        A view of the file in the stored dtype, but of float8 a copy in bfloat16.
        """
        return decode(self.encoded(row))

    def encoded(self, row: int) -> dict[str, torch.Tensor]:
        """The states of a row as `data.encoding.decode` takes them: views of the file.

        Many rows are joined name by name and decoded once, on the device that they are for.
        """
        return self._slices(row, ("states", "scales"))

    def _span(self, row: int) -> Span:
        if row not in self._spans:
            raise ContractError(
                f"{self.directory} has no hidden states of row {row}", "extract the hidden states again"
            )
        return self._spans[row]

    def _slices(self, row: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """A row's part of the tensors of these names that its shard has."""
        span = self._span(row)
        if span.shard not in self._shards:
            contract, _, tensors = _open(self._files[span.shard])
            check_contract(contract, self.contract)
            self._shards[span.shard] = tensors
        tensors, end = self._shards[span.shard], span.start + span.length
        return {name: tensors[name][span.start : end] for name in names if name in tensors}


def shard_tensors(contract: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors in a shard."""
    return ("token_ids", "scales", "states") if contract["format"] == FORMAT_SCALED else ("token_ids", "states")


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


def _open(path: Path) -> tuple[dict[str, Any], list[list[int]], dict[str, torch.Tensor]]:
    """A shard's contract, its rows as [row, start, length], and its tensors, which map the file."""
    try:
        with safe_open(path, "pt") as shard:
            head = json.loads(shard.metadata()["contract"])
            names = shard_tensors(head["contract"])
            return head["contract"], head["rows"], {name: shard.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ContractError(f"{path} is missing", "extract the hidden states again") from None
    except Exception as error:  # safetensors has one error of its own for whatever is wrong with a file
        raise ContractError(f"{path} is damaged: {error}", "delete it and run the same command again") from None
