"""Hidden states as a server hands them out: whether they are what was asked for, and where a stage puts them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from speculators.data.shards import ShardWriter, feature_contract
from speculators.errors import ContractError, StageError
from speculators.job import Job


def check_states(
    item: str, sent: Sequence[int], token_ids: torch.Tensor, states: torch.Tensor, compute: torch.dtype
) -> None:
    """Raise where the states [T, L, H] that came for `item` are not those of the tokens that were sent."""
    hint = "the server is not this run's, or is broken; look at its log"
    if token_ids.tolist() != list(sent):
        raise ContractError(f"{item}: the server gave the states of other tokens than were sent", hint)
    if states.dtype != compute:
        raise ContractError(f"{item}: the server computes in {states.dtype}, `target.dtype` is {compute}", hint)
    if not bool(torch.isfinite(states).all()):
        layers = (~torch.isfinite(states)).any(-1).any(0).nonzero().flatten().tolist()
        raise StageError(
            f"{item}: the target's hidden states are not finite (captured layers number {layers})",
            "a target in float16 overflows easily: set target.dtype=bfloat16",
        )


def states_writer(job: Job) -> ShardWriter:
    """The shards of a stage whose output is hidden states; it goes on where an earlier attempt stopped."""
    contract = feature_contract(
        target=job.digests["target"],
        tokens=job.digests["tokens"],
        dtype=job.config.extract.dtype.name,
        compute_dtype=job.config.target.dtype.name,
        layer_ids=job.derived["capture_layer_ids"],
        hidden_size=hidden_size(job.inputs["target"]),
    )
    return ShardWriter(job.output, contract, job.config.extract.shard_tokens)


def hidden_size(target: Path) -> int:
    """The width of the target's residual stream, from its `config.json`."""
    config = json.loads((target / "config.json").read_text())
    return int(config.get("text_config", config)["hidden_size"])
