"""The state that a killed run goes on from, written so that there is always a whole one.

    scratch/step-00000120/state.safetensors     tensors: parameters, momenta, moments, random generators
                          state-1.safetensors   rank 1's rows of the matrices, if each rank has its own
                          state.json            counters and sums
                          sealed.json           sha256 of all of them; written last

A directory without a fitting seal is rubbish and is removed. The newest sealed one is kept. What was written by some
number of ranks can be read by any other.
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

TENSORS, FACTS, SEAL = "state.safetensors", "state.json", "sealed.json"


def seal(
    directory: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], ranks: Ranks | None = None
) -> None:
    """Write the state after `step` steps and remove the ones before it.

    All ranks call it, each with the tensors that it has to write, if any; the first one's facts count, and it seals.
    """
    ranks = ranks or Ranks()
    place = directory / f"step-{step:08d}"
    if ranks.first:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    ranks.agree(None)  # nobody writes before it is there
    written = {}
    if tensors:
        file = _file(place, ranks.rank)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        _sync(file)
        written[file.name] = _digest(file)
    parts = ranks.gather(written)
    if not ranks.first:
        return
    write_json(place / FACTS, facts)
    _sync(place / FACTS)
    written[FACTS] = _digest(place / FACTS)
    for part in parts:
        written |= part
    write_json(place / SEAL, written)
    _sync(place / SEAL)
    _sync(place)
    for other in directory.glob("step-*"):
        if other != place:
            shutil.rmtree(other)


def newest(directory: Path) -> Path | None:
    """The newest whole state, for `read`, or None; what is not whole is removed."""
    for place in sorted(directory.glob("step-*"), reverse=True):
        try:
            there = [place / FACTS, *_files(place)]
            whole = json.loads((place / SEAL).read_text()) == {file.name: _digest(file) for file in there}
        except (OSError, ValueError):
            whole = False
        if whole:
            return place
        shutil.rmtree(place)
    return None


def read(place: Path, part: int = 0, parts: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a whole state; of matrices, the rows of one of `parts`."""
    facts = json.loads((place / FACTS).read_text())
    files = _files(place)
    if len(files) == parts:
        return load_file(files[0]) | (load_file(files[part]) if part else {}), facts
    every = [load_file(file) for file in files]
    tensors = every[0]
    for name, first in tensors.items():
        if first.ndim > 1:
            whole = torch.cat([each[name] for each in every])
            tensors[name] = whole[rows(len(whole), part, parts)].clone()
    return tensors, facts


def _file(place: Path, rank: int) -> Path:
    return place / TENSORS if rank == 0 else place / f"state-{rank}.safetensors"


def _files(place: Path) -> list[Path]:
    """The files of all ranks that wrote one, in their order."""
    return [_file(place, rank) for rank in range(1 + len(list(place.glob("state-*.safetensors"))))]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
