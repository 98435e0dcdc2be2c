"""The state that a killed run goes on from, written so that there is always a whole one.

    scratch/step-00000120/state.safetensors   tensors: parameters, momenta, moments, random generators
                          state.json          counters and sums
                          sealed.json         sha256 of the two; written last

A directory without a fitting seal is rubbish and is removed. The newest sealed one is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.job import write_json

TENSORS, FACTS, SEAL = "state.safetensors", "state.json", "sealed.json"


def seal(directory: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state after `step` steps and remove the ones before it."""
    place = directory / f"step-{step:08d}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, place / TENSORS)
    write_json(place / FACTS, facts)
    for name in (TENSORS, FACTS):
        _sync(place / name)
    write_json(place / SEAL, _digests(place))
    _sync(place / SEAL)
    _sync(place)
    for other in directory.glob("step-*"):
        if other != place:
            shutil.rmtree(other)


def newest(directory: Path) -> Path | None:
    """The newest whole state, for `read`, or None; what is not whole is removed."""
    for place in sorted(directory.glob("step-*"), reverse=True):
        try:
            whole = json.loads((place / SEAL).read_text()) == _digests(place)
        except (OSError, ValueError):
            whole = False
        if whole:
            return place
        shutil.rmtree(place)
    return None


def read(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a whole state."""
    return load_file(place / TENSORS), json.loads((place / FACTS).read_text())


def _digests(place: Path) -> dict[str, str]:
    found = {}
    for name in (TENSORS, FACTS):
        with (place / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
