"""Hidden states as the PyPI package speculators 0.9 keeps them, read and written.

    DIR/*.arrow, dataset_info.json, state.json    rows: input_ids, loss_mask, seq_len
    DIR/hidden_states/hs_<row>.safetensors        hidden_states [T, L, H] bfloat16, token_ids int64 [T]

The layers are the draft's own and then the state that leaves the last layer, not normed, as in our shards. Its float8
files hold float8 states and `hidden_states_scales` float32 [T, 1, 1]. A file says nothing of its target or its layers.

Upstream has a row, and a file, for every answer of a conversation, each with the whole history before it. `histories`
finds the rows that others begin with: they need neither a row of their own nor states.

    python -m speculators.features.upstream TOKENS FEATURES DIR

writes such a directory for upstream's trainer, out of the data of two artifacts: what `tokenize` made and what
`extract` or `collect` made.
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

from speculators.data.token_table import save_table, write_table
from speculators.errors import ContractError, RunError
from speculators.features.shards import ShardReader

STATES = "hidden_states"
"""The directory of the files, and the tensor in each."""


def states_path(directory: Path, row: int) -> Path:
    """The file of one row."""
    return directory / STATES / f"hs_{row}.safetensors"


def read_states(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids int64 [T] and states [T, L, H] of one file, of a float8 file in bfloat16.

    Raises:
        ContractError: there is no such file, or it is not one of these.
    """
    hint = "make it again with upstream's `generate-offline-data`, or leave its row out"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        token_ids, states = tensors["token_ids"], tensors[STATES]
    except FileNotFoundError:
        raise ContractError(f"{path} is missing", hint) from None
    except Exception as error:  # safetensors has one error of its own for whatever is wrong with a file
        raise ContractError(f"{path} is damaged: {error!r}", hint) from None
    if "hidden_states_scales" in tensors:
        states = (states.float() * tensors["hidden_states_scales"]).to(torch.bfloat16)
    if states.dim() != 3 or not states.is_floating_point() or len(token_ids) != len(states):
        raise ContractError(f"{path} holds {list(states.shape)} {states.dtype} of {len(token_ids)} tokens", hint)
    return token_ids, states


def histories(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """The rows that no other row begins with, in order, each with the loss mask of all rows that it begins with.

    Of rows that are the same, the first. A row that several begin with is supervised in one of them, so that every
    answer is supervised once.
    """
    # Big-endian, so that bytes sort as token ids do: what begins with a row then comes right after it.
    keys = [np.asarray(row, dtype=">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=lambda row: (keys[row], -row))
    joined = {row: list(masks[row]) for row in order}
    for row, following in itertools.pairwise(order):
        if keys[following].startswith(keys[row]):
            mask = joined.pop(row)
            joined[following][: len(mask)] = [a | b for a, b in zip(mask, joined[following], strict=False)]
    return dict(sorted(joined.items()))


def export_for_upstream(tokens: Path, features: Path, directory: Path) -> int:
    """Write rows and states for upstream's trainer; returns the number of rows.

    States in bfloat16, whatever they are stored in; the last layer's are 0 where they were not kept, which is where
    upstream, too, multiplies what it makes of them by 0. A row whose last token has no state is one token shorter.

    Raises:
        ContractError: the states are not those of these tokens, or `directory` holds something.
    """
    from datasets import load_from_disk

    if directory.exists() and any(directory.iterdir()):
        raise ContractError(f"{directory} is not empty", "name a directory that is not there yet")
    reader = ShardReader(features)
    table: Any = load_from_disk(str(tokens))
    if reader.rows != list(range(len(table))):
        raise ContractError(f"{features} is of {len(reader)} rows, {tokens} of {len(table)}", "name one run's two")
    (directory / STATES).mkdir(parents=True)
    arrow = directory / STATES / ".rows.arrow"  # not in `directory`: what is read there cannot be saved there
    write_table(_exported(table, reader, directory), arrow)
    save_table(arrow, directory, row_format="torch")  # upstream's trainer takes it that rows come as tensors
    return len(table)


def _exported(table: Any, reader: ShardReader, directory: Path) -> Iterator[dict[str, Any]]:
    for number in reader.rows:
        row, token_ids = table[number], reader.token_ids(number)
        length = len(token_ids)
        if row["input_ids"][:length] != token_ids.tolist():
            raise ContractError(f"the states of row {number} are of other tokens", "name one run's two artifacts")
        path = states_path(directory, number)
        beside = path.with_name(f".{path.name}")
        states = reader.states(number).to(torch.bfloat16).nan_to_num(nan=0.0)
        save_file({STATES: states, "token_ids": token_ids.contiguous()}, beside)
        os.replace(beside, path)
        cut = {name: row[name][:length] for name in ("input_ids", "loss_mask")}
        yield {**row, **cut, "seq_len": length}


def main(arguments: list[str]) -> int:
    """Export; returns the exit code."""
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
