"""Hidden states of a conversation's answers: one file a turn in the scratch directory, then one row of the shards.

A turn that is the beginning of the next one's prompt needs no file: the next one's has its hidden states.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.config.choices import OnBadRow
from speculators.data.answer_log import StoredHiddenStates
from speculators.data.template import TokenSequence, merge_turns, stored_turns
from speculators.engine.transfer import Transfer
from speculators.errors import StageError
from speculators.features.encoding import encode, split_last_layer
from speculators.features.writer import check_hidden_states, last_layer_mask
from speculators.job import Job

STATES = "states"
"""Directory of the turns' hidden states in the scratch directory."""


class TurnFiles:
    """The files with the hidden states of one conversation's turns in the scratch directory."""

    def __init__(self, job: Job, index: int, *, sampled: bool) -> None:
        self.request: dict[str, Any] = {"kv_transfer_params": {"hidden_states": True, "include_output_tokens": True}}
        """Parameters with which the server exports the hidden states of a request."""
        self.sampled = sampled
        """Whether greedy tokens of the answers are kept."""
        if sampled:
            # Two, because the server lists the sampled token first, and the greedy one may be the other.
            self.request["logprobs"] = 2
        self.skips = job.config.extract.on_bad_row is OnBadRow.skip
        """Whether unusable hidden states end the conversation before their answer instead of stopping the stage."""
        self._directory = job.scratch / STATES
        self._index = index
        self._stored_dtype = job.config.extract.dtype.name
        self._compute_dtype = getattr(torch, job.config.target.dtype.name)

    def write(self, turn: int, input_ids: Sequence[int], transfer: Transfer) -> str:
        """Check the hidden states of a turn and write them in the stored dtype; returns the name of the file."""
        token_ids, hidden_states = transfer.load()
        item = f"conversation {self._index}"
        check_hidden_states(item, input_ids, token_ids, hidden_states, self._compute_dtype)
        name = f"{self._index:07d}-{turn}.safetensors"
        self._directory.mkdir(exist_ok=True)
        encoded = encode(item, hidden_states, self._stored_dtype)
        save_file({"token_ids": token_ids, **encoded}, self._directory / f".{name}")
        os.replace(self._directory / f".{name}", self._directory / name)
        return name

    def delete(self, name: str) -> None:
        """Delete the file of a turn whose hidden states are also in that of the next turn."""
        (self._directory / name).unlink()


def continues(turn: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether the prompt of `later` begins with all tokens of `turn`, so that its hidden states include the turn's."""
    token_ids = [*turn["prompt_ids"], *turn["answer_ids"]]
    return bool(later["prompt_ids"][: len(token_ids)] == token_ids)


def last_turns(turns: list[dict[str, Any]]) -> list[int]:
    """Indices of the turns that are not the beginning of the next one's prompt: one for each row of `merge_turns`."""
    return [i for i, turn in enumerate(turns) if turn is turns[-1] or not continues(turn, turns[i + 1])]


def sequences(turns: list[dict[str, Any]]) -> list[TokenSequence]:
    """The token rows of a conversation's turns."""
    return merge_turns(stored_turns(turns))


def set_slices(turns: list[dict[str, Any]], row: int) -> None:
    """Replace the names of the turns' files by the slices of a row of the shards that have their hidden states."""
    begin = 0
    for index, sequence in zip(last_turns(turns), sequences(turns), strict=True):
        turns[index]["states"] = [row, begin, len(sequence.input_ids) - 1]
        begin += len(sequence.input_ids) - 1


def turn_files(job: Job, turns: list[dict[str, Any]]) -> list[Path]:
    """The files of the turns that have one, in order."""
    return [job.scratch / STATES / turn["states"] for turn in turns if "states" in turn]


def copy_turns(
    job: Job, stored: StoredHiddenStates, rows: list[TokenSequence]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Read one conversation from an earlier artifact; returns what `read_turn_files` does."""
    input_ids = [token for row in rows for token in row.input_ids[:-1]]
    mask = torch.cat([last_layer_mask(job, row.loss_mask)[:-1] for row in rows])
    token_ids, tensors = stored.shards.read(stored.row, input_ids, mask)
    return token_ids, tensors, mask


def read_turn_files(job: Job, files: list[Path], rows: list[TokenSequence]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Read one conversation: token ids [T], tensors of `split_last_layer`, and the mask [T] of its last layer."""
    turns = []
    for file, row in zip(files, rows, strict=True):
        try:
            encoded = load_file(file)
        except FileNotFoundError:
            raise StageError(
                f"the hidden states {file.name} of a finished answer are missing", f"delete {job.scratch}"
            ) from None
        mask = last_layer_mask(job, row.loss_mask)[:-1]
        turns.append({"token_ids": encoded.pop("token_ids"), "mask": mask, **split_last_layer(encoded, mask)})
    tensors = {name: torch.cat([turn[name] for turn in turns]) for name in turns[0]}
    return tensors.pop("token_ids"), tensors, tensors.pop("mask")
