"""The contract of hidden states: which target, tokens and layers they are of, and their format. Every shard has it.

Its fields: `format`, `target` and `tokens` (digests), `dtype` (stored, see `encoding`), `compute_dtype`,
`layer_ids`, `convention`, `hidden_size`, `normed`, `last_state` (at which positions the last layer is kept).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speculators.errors import ContractError

FORMAT = 3
"""Number of the format; it grows when readers of an older release cannot read the shards."""
CONVENTION = (
    "layer id i is the residual stream entering layer i; the number of layers is the last one's output, not normed"
)
EVERYWHERE, ANSWERS = "everywhere", "answers"
"""Values of `last_state`: the last layer is kept at every position, or only where an answer token is predicted."""


def feature_contract(
    *, target: str, tokens: str, dtype: str, compute_dtype: str, layer_ids: list[int], hidden_size: int,
    last_state: str = EVERYWHERE,
) -> dict[str, Any]:  # fmt: skip
    """Build a contract. `target` and `tokens` are digests; `layer_ids` are all captured layers in ascending order."""
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


def check_contract(contract: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a contract has the expected fields; fields that are not expected are ignored.

    Raises:
        ContractError: one differs; the message names every one.
    """
    wrong = [
        f"{name} is {json.dumps(contract.get(name))}, expected {json.dumps(value)}"
        for name, value in expected.items()
        if contract.get(name) != value
    ]
    if wrong:
        raise ContractError(
            f"the hidden states do not fit: {'; '.join(wrong)}",
            "extract them again from this target, these tokens and these layers: force=[extract]",
        )
