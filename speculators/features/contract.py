"""What a set of hidden states is: of which target, tokens and layers, in which format. It lies in every shard.

The contract: `format`, `target` and `tokens` (digests), `dtype` (stored, see `encoding`), `compute_dtype`,
`layer_ids`, `convention`, `hidden_size`, `normed`, `last_state` (where the last layer's are kept, a name).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speculators.errors import ContractError

FORMAT = 3
"""Raised when a reader of an older release could not read the shards."""
CONVENTION = (
    "layer id i is the residual stream entering layer i; the number of layers is the last one's output, not normed"
)
EVERYWHERE, ANSWERS = "everywhere", "answers"
"""A contract's `last_state`: of every token; where an answer is predicted."""


def feature_contract(
    *, target: str, tokens: str, dtype: str, compute_dtype: str, layer_ids: list[int], hidden_size: int,
    last_state: str = EVERYWHERE,
) -> dict[str, Any]:  # fmt: skip
    """What a set of hidden states is; `target` and `tokens` are digests, `layer_ids` everything captured, in order."""
    return {
        "format": FORMAT,
        "target": target,
        "tokens": tokens,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "layer_ids": list(layer_ids),
        "convention": CONVENTION,
        "hidden_size": hidden_size,
        "normed": False,
        "last_state": last_state,
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
