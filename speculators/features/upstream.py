"""Reads and writes hidden states in the format of the PyPI package speculators 0.9.

    DIR/*.arrow, dataset_info.json, state.json    rows: input_ids, loss_mask, seq_len
    DIR/hidden_states/hs_<row>.safetensors        hidden_states [T, L, H] bfloat16, token_ids int64 [T]

The L layers are those that the draft reads and then the last layer's output, not normed, as in our shards. A float8
file also has `hidden_states_scales` float32 [T, 1, 1]. Files name neither their target nor their layers.

Upstream has a row, and a file, for every answer of a conversation, each with the whole history before it. `histories`
drops the rows that others begin with: these need neither a row of their own nor hidden states.

    python -m speculators.features.upstream TOKENS FEATURES DIR

writes such a directory for upstream's trainer from the data of an artifact of `tokenize` and one with hidden states.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from speculators.data.token_table import TokenRow, save_table, write_table
from speculators.errors import ContractError, RunError
from speculators.features.shards import ShardReader

STATES = "hidden_states"
"""The directory of the files, and the tensor in each."""


def hidden_states_path(directory: Path, row: int) -> Path:
    """The file of one row."""
    return directory / STATES / f"hs_{row}.safetensors"


def read_hidden_states(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the token ids int64 [T] and hidden states [T, L, H] of one file; those of a float8 file in bfloat16.

    Raises:
        ContractError: the file is missing or damaged.
    """
    hint = "make it again with upstream's `generate-offline-data`, or leave its row out"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        token_ids, hidden_states = tensors["token_ids"], tensors[STATES]
    except FileNotFoundError:
        raise ContractError(f"{path} is missing", hint) from None
    except Exception as error:  # safetensors has one error of its own for whatever is wrong with a file
        raise ContractError(f"{path} is damaged: {error!r}", hint) from None
    if "hidden_states_scales" in tensors:
        hidden_states = (hidden_states.float() * tensors["hidden_states_scales"]).to(torch.bfloat16)
    shape, dtype = list(hidden_states.shape), hidden_states.dtype
    if len(shape) != 3 or not dtype.is_floating_point or len(token_ids) != len(hidden_states):
        raise ContractError(f"{path} holds {shape} {dtype} of {len(token_ids)} tokens", hint)
    return token_ids, hidden_states


def histories(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Find the rows that are no prefix of another row.

    Returns row -> its loss mask joined with those of its prefixes, in ascending order. Where a row is a prefix of
    several, one of them gets its mask, so that every answer is supervised once. Of equal rows the first is used.
    """
    # Big-endian, so that bytes sort as token ids do: a row comes right before the rows that begin with it.
    keys = [np.asarray(row, dtype=">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=lambda row: (keys[row], -row))
    joined = {row: list(masks[row]) for row in order}
    for row, following in itertools.pairwise(order):
        if keys[following].startswith(keys[row]):
            mask = joined.pop(row)
            joined[following][: len(mask)] = [a | b for a, b in zip(mask, joined[following], strict=False)]
    return dict(sorted(joined.items()))


def export_for_upstream(tokens: Path, features: Path, directory: Path) -> int:
    """Write token rows and hidden states for upstream's trainer; returns the number of rows.

    All is written in bfloat16. The last layer is 0 where it was not kept; upstream gives these positions no weight
    either. A row whose last token has no hidden states is one token shorter.

    Raises:
        ContractError: the hidden states are of other tokens, or `directory` is not empty.
    """
    from datasets import load_from_disk

    if directory.exists() and any(directory.iterdir()):
        raise ContractError(f"{directory} is not empty", "name a new directory")
    reader = ShardReader(features)
    table: Any = load_from_disk(str(tokens))
    if reader.rows != list(range(len(table))):
        raise ContractError(
            f"{features} has {len(reader)} rows, {tokens} has {len(table)}", "name two artifacts of one run"
        )
    (directory / STATES).mkdir(parents=True)
    arrow = directory / STATES / ".rows.arrow"  # not in `directory`, where `save_table` writes
    write_table(_exported(table, reader, directory), arrow)
    save_table(arrow, directory, row_format="torch")  # upstream's trainer expects rows as tensors
    return len(table)


def _exported(table: Any, reader: ShardReader, directory: Path) -> Iterator[TokenRow]:
    for number in reader.rows:
        row, token_ids = table[number], reader.token_ids(number)
        length = len(token_ids)
        if row["input_ids"][:length] != token_ids.tolist():
            raise ContractError(f"hidden states of row {number} are of other tokens", "name two artifacts of one run")
        path = hidden_states_path(directory, number)
        temporary = path.with_name(f".{path.name}")
        hidden_states = reader.hidden_states(number).to(torch.bfloat16).nan_to_num(nan=0.0)
        save_file({STATES: hidden_states, "token_ids": token_ids.contiguous()}, temporary)
        os.replace(temporary, path)
        input_ids, loss_mask = row["input_ids"][:length], row["loss_mask"][:length]
        yield TokenRow(input_ids=input_ids, loss_mask=loss_mask, seq_len=length, id=row["id"], source=row["source"])


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if len(arguments) != 3:
        print("usage: python -m speculators.features.upstream TOKENS FEATURES DIR", file=sys.stderr)
        return 1
    try:
        rows = export_for_upstream(*map(Path, arguments))
    except RunError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(f"exported {rows} rows to {arguments[2]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
