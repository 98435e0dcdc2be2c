"""The part of the stages that write hidden states: checks of what a server exports, bad rows, contract and writer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from speculators.checkpoint_files import common_names, text_config
from speculators.config.choices import OnBadRow
from speculators.data.token_table import prediction_mask
from speculators.errors import ContractError, RunError, StageError
from speculators.features.contract import EVERYWHERE, feature_contract
from speculators.features.shards import ShardWriter
from speculators.job import Job, write_json

SKIPPED = "skipped.json"
ANSWER_STATES = "states"
"""Directory of the answers' hidden states in the artifact of `regenerate`."""
MAX_SKIPPED, MAX_SKIPPED_RATIO = 4, 0.02
"""Rows that may be skipped: this number, plus this share of those that were seen."""


def check_hidden_states(
    item: str, sent: Sequence[int], token_ids: torch.Tensor, hidden_states: torch.Tensor, compute_dtype: torch.dtype
) -> None:
    """Check the hidden states [T, L, H] that a server exported for the token ids `sent`.

    Raises:
        ContractError: they are of other tokens, or of another shape or dtype.
        StageError: a value is not finite.
    """
    hint = "the server is not this run's, or is broken; look at its log"
    if token_ids.tolist() != list(sent):
        raise ContractError(f"{item}: the server exported the hidden states of other tokens", hint)
    if hidden_states.dim() != 3 or len(hidden_states) != len(sent):
        raise ContractError(f"{item}: hidden states {list(hidden_states.shape)} of {len(sent)} tokens", hint)
    if hidden_states.dtype != compute_dtype:
        dtypes = f"{hidden_states.dtype}, `target.dtype` is {compute_dtype}"
        raise ContractError(f"{item}: the server computes in {dtypes}", hint)
    if not bool(torch.isfinite(hidden_states).all()):
        layers = (~torch.isfinite(hidden_states)).any(-1).any(0).nonzero().flatten().tolist()
        raise StageError(
            f"{item}: the target's hidden states are not finite (captured layers number {layers})",
            "a target in float16 overflows easily: set target.dtype=bfloat16",
        )


class BadRows:
    """Rows whose hidden states cannot be used: `extract.on_bad_row` ends the stage at the first, or has all skipped.

    `skipped.json`, next to the shards, has row -> reason of the skipped ones; a later attempt does not request them.
    """

    def __init__(self, job: Job) -> None:
        self._path = job.output / SKIPPED
        self._skip = job.config.extract.on_bad_row is OnBadRow.skip
        self.reasons = read_skipped(job.output)

    def skip(self, row: int, error: RunError, seen: int) -> None:
        """Skip a row; `seen` is the number of rows that this attempt has had so far.

        Raises:
            RunError: `error`, if rows may not be skipped.
            StageError: there are so many that the rows are hardly the cause.
        """
        if not self._skip:
            raise error
        self.reasons[row] = error.message
        try:
            refuse_too_many(len(self.reasons), error.message, "rows", seen, error.hint)
        except StageError:
            self._path.unlink(missing_ok=True)  # the next attempt may work with a repaired server
            raise
        write_json(self._path, {str(row): reason for row, reason in sorted(self.reasons.items())})

    def record(self) -> dict[str, Any]:
        """The skipped rows for the artifact's record."""
        if not self.reasons:
            return {}
        row, reason = next(iter(self.reasons.items()))
        note = f"{len(self.reasons)} rows were left out because their hidden states cannot be used, row {row}: {reason}"
        return {"skipped": len(self.reasons), "skipped_rows": sorted(self.reasons)[:20], "notes": [note]}


def refuse_too_many(count: int, reason: str, what: str, seen: int, hint: str = "see the server's log") -> None:
    """Raise StageError where so many of those seen, `count`, were skipped that they are hardly the cause."""
    if count > MAX_SKIPPED + MAX_SKIPPED_RATIO * seen:
        raise StageError(
            f"the hidden states of {count} {what} cannot be used, after {seen} {what}; the last: {reason}",
            hint,
        )


def read_skipped(directory: Path) -> dict[int, str]:
    """Read row -> reason of the rows that a directory of hidden states lacks."""
    path = directory / SKIPPED
    return {int(row): reason for row, reason in json.loads(path.read_text()).items()} if path.exists() else {}


def hidden_states_writer(job: Job, tokens: str = "tokens", subdirectory: str = "") -> ShardWriter:
    """Open a stage's shards, after those of an earlier attempt; `tokens` names the input with their tokens."""
    return ShardWriter(job.output / subdirectory, hidden_states_contract(job, tokens), job.config.extract.shard_tokens)


def last_layer_mask(job: Job, loss_mask: Sequence[int], extra: Iterable[int] = ()) -> torch.Tensor:
    """bool [T], true where a stage keeps the last layer of a row; also at the positions `extra`."""
    if job.derived["last_state"] == EVERYWHERE:
        return torch.ones(len(loss_mask), dtype=torch.bool)
    mask = torch.from_numpy(prediction_mask(loss_mask))
    mask[list(extra)] = True
    return mask


def hidden_states_contract(job: Job, tokens: str = "tokens") -> dict[str, Any]:
    """Build the contract of the hidden states that a stage writes; `tokens` names the input with their tokens."""
    return feature_contract(
        target=job.digests["target"],
        tokens=job.digests[tokens],
        dtype=job.config.extract.dtype.name,
        compute_dtype=job.config.target.dtype.name,
        layer_ids=job.derived["capture_layer_ids"],
        hidden_size=hidden_size(job.inputs["target"]),
        last_state=job.derived["last_state"],
    )


def hidden_size(target: Path) -> int:
    """Read the width of the target's residual stream from its `config.json`."""
    config = json.loads((target / "config.json").read_text())
    return int(common_names(text_config(config))["hidden_size"])
