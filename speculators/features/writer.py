"""Hidden states as a server hands them out: whether they are what was asked for, and where a stage puts them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from speculators.config.choices import OnBadRow
from speculators.data.token_table import prediction_mask
from speculators.errors import ContractError, RunError, StageError
from speculators.features.contract import EVERYWHERE, feature_contract
from speculators.features.shards import ShardWriter
from speculators.job import Job, write_json

SKIPPED = "skipped.json"
ANSWER_STATES = "states"
"""Directory of the answers' hidden states in the artifact with the answers."""
FEW, SHARE = 4, 0.02
"""Rows that may be left out: so many, and this share of those that were seen."""


def check_states(
    item: str, sent: Sequence[int], token_ids: torch.Tensor, states: torch.Tensor, compute: torch.dtype
) -> None:
    """Raise where the states [T, L, H] that came for `item` are not those of the tokens that were sent."""
    hint = "the server is not this run's, or is broken; look at its log"
    if token_ids.tolist() != list(sent):
        raise ContractError(f"{item}: the server gave the states of other tokens than were sent", hint)
    if states.dim() != 3 or len(states) != len(sent):
        raise ContractError(f"{item}: the server gave states {list(states.shape)} of {len(sent)} tokens", hint)
    if states.dtype != compute:
        raise ContractError(f"{item}: the server computes in {states.dtype}, `target.dtype` is {compute}", hint)
    if not bool(torch.isfinite(states).all()):
        layers = (~torch.isfinite(states)).any(-1).any(0).nonzero().flatten().tolist()
        raise StageError(
            f"{item}: the target's hidden states are not finite (captured layers number {layers})",
            "a target in float16 overflows easily: set target.dtype=bfloat16",
        )


class BadRows:
    """Rows whose states cannot be used, by what `extract.on_bad_row` says: the first one stops, or they are left out.

    What is left out lies in `skipped.json` beside the shards, row -> reason, and is not asked for by a later attempt.
    """

    def __init__(self, job: Job) -> None:
        self._path = job.output / SKIPPED
        self._skip = job.config.extract.on_bad_row is OnBadRow.skip
        self.reasons = read_skipped(job.output)

    def leave_out(self, row: int, error: RunError, seen: int) -> None:
        """One more. `seen` is how many rows this attempt has had so far.

        Raises:
            RunError: that error, if rows are not to be left out.
            StageError: there are too many of them for it to be the rows' fault.
        """
        if not self._skip:
            raise error
        self.reasons[row] = error.message
        try:
            refuse_too_many(list(self.reasons.values()), "rows", seen, error.hint)
        except StageError:
            self._path.unlink(missing_ok=True)  # whatever is wrong, the next attempt may find it mended
            raise
        write_json(self._path, {str(row): reason for row, reason in sorted(self.reasons.items())})

    def record(self) -> dict[str, Any]:
        """What the artifact says about them."""
        if not self.reasons:
            return {}
        row, reason = next(iter(self.reasons.items()))
        note = f"{len(self.reasons)} rows were left out because their hidden states cannot be used, row {row}: {reason}"
        return {"skipped": len(self.reasons), "skipped_rows": sorted(self.reasons)[:20], "notes": [note]}


def refuse_too_many(reasons: Sequence[str], what: str, seen: int, hint: str = "see the server's log") -> None:
    """Raise StageError where so many were left out, of so many seen, that it is hardly the fault of each."""
    if len(reasons) > FEW + SHARE * seen:
        raise StageError(
            f"the hidden states of {len(reasons)} {what} cannot be used, after {seen} {what}; the last: {reasons[-1]}",
            hint,
        )


def read_skipped(directory: Path) -> dict[int, str]:
    """Row -> why it was left out of a set of hidden states."""
    path = directory / SKIPPED
    return {int(row): why for row, why in json.loads(path.read_text()).items()} if path.exists() else {}


def states_writer(job: Job, tokens: str = "tokens", below: str = "") -> ShardWriter:
    """The shards of a stage that gives hidden states; it goes on where an earlier attempt stopped.

    Args:
        job: the stage's.
        tokens: the input that their tokens come from.
        below: the directory in its output.
    """
    return ShardWriter(job.output / below, states_contract(job, tokens), job.config.extract.shard_tokens)


def last_layer_mask(job: Job, loss_mask: Sequence[int], asked: Iterable[int] = ()) -> torch.Tensor:
    """Where such a stage keeps the last layer of a row, bool [T]; also where the server was asked for its pick."""
    if job.derived["last_state"] == EVERYWHERE:
        return torch.ones(len(loss_mask), dtype=torch.bool)
    places = torch.from_numpy(prediction_mask(loss_mask))
    places[list(asked)] = True
    return places


def states_contract(job: Job, tokens: str = "tokens") -> dict[str, Any]:
    """What the hidden states are that such a stage makes; `tokens` is the input that their tokens come from."""
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
    """The width of the target's residual stream, from its `config.json`."""
    config = json.loads((target / "config.json").read_text())
    return int(config.get("text_config", config)["hidden_size"])
