"""Keys: what made an artifact, as one digest.

    key = sha256(canonical JSON of the preimage)
    preimage = {tag, stage, version, config {dotted name: value}, inputs {name: content digest},
                packages {distribution: version}, service {name: value}}

Inputs enter by the digest of their *content*, so a stage that is run again and gives the same bytes stops the
re-running there (early cut-off; "constructive traces" in Mokhov et al., Build Systems a la Carte, 2018).
No path, time, host, source text or git state is in a preimage; those are provenance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

TAG = "speculators-run/key/1"
"""Names the scheme. A new number makes every key new, so it changes only when the scheme must."""


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, no NaN, tuples as lists, whole floats as they are typed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical text, in hex."""
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
    """The structure that a key is the digest of; stored beside the artifact so that a miss can be explained."""
    return {
        "tag": TAG,
        "stage": stage,
        "version": version,
        "config": dict(config),
        "inputs": dict(inputs),
        "packages": dict(packages),
        "service": dict(service),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Leaves in which two preimages differ, as (name, old, new); a leaf that one lacks is None there.

    Names are as a user writes them: `train.lr`, `input tokens`, `package vllm`, `version`.
    """
    before, after = leaves(old), leaves(new)
    return [(n, before.get(n), after.get(n)) for n in sorted({*before, *after}) if before.get(n) != after.get(n)]


def leaves(image: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a preimage by the name that a user knows it by."""
    found: dict[str, Any] = {"version": image["version"], **image["config"]}
    found |= {f"input {name}": value for name, value in image["inputs"].items()}
    found |= {f"package {name}": value for name, value in image["packages"].items()}
    found |= {f"service {name}": value for name, value in image["service"].items()}
    return found
