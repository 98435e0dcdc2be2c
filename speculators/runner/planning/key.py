"""Cache keys: the digest of everything that determines a stage's output.

    key = sha256(canonical JSON of the preimage)
    preimage = {tag, stage, version, config {dotted name: value}, inputs {name: content digest},
                packages {distribution: version}, service {name: value}}

Inputs enter by the digest of their *content*, so that stages after one that reproduces its output are not run again
(early cut-off; "constructive traces" in Mokhov et al., Build Systems a la Carte, 2018).
A preimage contains no path, time, host, source code or git state; those are provenance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

TAG = "speculators-run/key/1"
"""Name and version of the scheme. A new version invalidates every key."""
MAX_CHANGES = 8
"""Changed options that a reason names; an artifact with more changes is hardly related."""


def canonical(value: Any) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, no NaN, tuples as lists, integral floats as floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def preimage(
    stage: str,
    version: int,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    packages: Mapping[str, str],
    service: Mapping[str, Any],
) -> dict[str, Any]:
    """The structure whose digest is the key; stored in the artifact's manifest so that a miss can be explained."""
    return {
        "tag": TAG,
        "stage": stage,
        "version": version,
        "config": dict(config),
        "inputs": dict(inputs),
        "packages": dict(packages),
        "service": dict(service),
    }


def preimage_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Values in which two preimages differ, as (name, old, new); None stands for an absent value."""
    before, after = flatten_preimage(old), flatten_preimage(new)
    return [(n, before.get(n), after.get(n)) for n in sorted({*before, *after}) if before.get(n) != after.get(n)]


def is_related(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an artifact's preimage explains a miss: no more than eight options, or half of them, differ.

    Else the artifact is one of another recipe, and a list of all differences explains nothing.
    """
    names = {*old["config"], *new["config"]}
    different = sum(old["config"].get(name) != new["config"].get(name) for name in names)
    return different <= max(MAX_CHANGES, len(names) // 2)


def flatten_preimage(image: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a preimage by the names used in messages: `train.lr`, `input tokens`, `package vllm`, `version`."""
    values: dict[str, Any] = {"version": image["version"], **image["config"]}
    values |= {f"input {name}": value for name, value in image["inputs"].items()}
    values |= {f"package {name}": value for name, value in image["packages"].items()}
    values |= {f"service {name}": value for name, value in image["service"].items()}
    return values
