"""Training checkpoints: the state from which a killed run continues, written so that a complete one always exists.

    scratch/step-00000120/state.safetensors     tensors: parameters, momenta, moments, random generators
                          state-1.safetensors   rank 1's rows of the matrices, if they are sharded
                          state.json            counters and sums
                          sealed.json           sha256 of all of them; written last

A directory whose seal is missing or does not match is incomplete and is deleted. Only the newest complete one is kept.
A checkpoint that some number of ranks wrote can be read by any other number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.job import write_json
from speculators.training.ranks import Ranks, rows

TENSORS, STATE, SEAL = "state.safetensors", "state.json", "sealed.json"


def seal(
    scratch: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks | None = None
) -> None:
    """Write the checkpoint after `step` steps and delete earlier ones.

    All ranks call it, each with the tensors that it has to write, if any. Rank 0 writes its `state` and the seal.
    """
    ranks = ranks or Ranks()
    directory = scratch / f"step-{step:08d}"
    if ranks.first:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    ranks.broadcast_object(None)  # the directory exists before any rank writes
    digests = {}
    if tensors:
        file = _file(directory, ranks.rank)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        _sync(file)
        digests[file.name] = _digest(file)
    digests_by_rank = ranks.all_gather_object(digests)
    if not ranks.first:
        return
    write_json(directory / STATE, state)
    _sync(directory / STATE)
    digests[STATE] = _digest(directory / STATE)
    for of_rank in digests_by_rank:
        digests |= of_rank
    write_json(directory / SEAL, digests)
    _sync(directory / SEAL)
    _sync(directory)
    for other in scratch.glob("step-*"):
        if other != directory:
            shutil.rmtree(other)


def newest(scratch: Path) -> Path | None:
    """Return the newest complete checkpoint's directory, or None; incomplete ones are deleted."""
    for directory in sorted(scratch.glob("step-*"), reverse=True):
        try:
            files = [directory / STATE, *_files(directory)]
            complete = json.loads((directory / SEAL).read_text()) == {file.name: _digest(file) for file in files}
        except (OSError, ValueError):
            complete = False
        if complete:
            return directory
        shutil.rmtree(directory)
    return None


def read_checkpoint(directory: Path, index: int = 0, count: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and state of a complete checkpoint; of matrices, row shard `index` of `count`."""
    state = json.loads((directory / STATE).read_text())
    files = _files(directory)
    if len(files) == count:
        return load_file(files[0]) | (load_file(files[index]) if index else {}), state
    shards = [load_file(file) for file in files]
    tensors = shards[0]
    for name, first in tensors.items():
        if first.ndim > 1:
            matrix = torch.cat([shard[name] for shard in shards])
            tensors[name] = matrix[rows(len(matrix), index, count)].clone()
    return tensors, state


def _file(directory: Path, rank: int) -> Path:
    return directory / TENSORS if rank == 0 else directory / f"state-{rank}.safetensors"


def _files(directory: Path) -> list[Path]:
    """The tensor files, in rank order."""
    return [_file(directory, rank) for rank in range(1 + len(list(directory.glob("state-*.safetensors"))))]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
