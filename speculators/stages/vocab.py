"""vocab: tokens -> draft vocabulary. Count the supervised tokens and keep the most frequent ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from safetensors.torch import save_file

from speculators.checkpoint_files import common_names, text_config
from speculators.errors import ContractError, RecipeError, SourceError
from speculators.job import Job, write_json


def main(job: Job) -> None:
    """Write `vocab.safetensors` (d2t, t2d) and `coverage.json`."""
    target_size = target_vocabulary(job.inputs["target"])
    size = target_size if job.config.vocab.size is None else min(job.config.vocab.size, target_size)
    if size < 1:
        raise RecipeError(f"vocab.size is {size}", "set it to at least 1, or to null for the target's full vocabulary")
    counts = count_supervised(job.inputs["tokens"], target_size)
    token_ids = most_frequent(counts, size)
    d2t, t2d = mapping(token_ids, target_size)
    save_file({"d2t": d2t, "t2d": t2d}, job.output / "vocab.safetensors")
    supervised, covered = int(counts.sum()), int(counts[token_ids].sum())
    coverage = {
        "size": size,
        "target_size": target_size,
        "supervised_tokens": supervised,
        "covered_tokens": covered,
        "share": covered / supervised,
        "distinct_tokens": int((counts > 0).sum()),
        "never_seen_but_included": int((counts[token_ids] == 0).sum()),
    }
    write_json(job.output / "coverage.json", coverage)
    job.record |= coverage


def target_vocabulary(target: Path) -> int:
    """Number of rows of the target's embedding, which may exceed the number of its tokenizer's tokens."""
    config = json.loads((target / "config.json").read_text())
    size = common_names(text_config(config)).get("vocab_size") or config.get("vocab_size")
    if size is None:
        raise SourceError(
            f"{target / 'config.json'} has no vocab_size", "name a transformers checkpoint of a text model"
        )
    return int(size)


def count_supervised(tokens: Path, target_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count how often each target token is supervised, int64 [V_target].

    Raises:
        ContractError: no token is supervised, or a token id is outside the target's vocabulary.
    """
    counts = np.zeros(target_size, dtype=np.int64)
    columns = load_from_disk(tokens).select_columns(["input_ids", "loss_mask"])
    for table in columns.with_format("arrow").iter(batch_size=1024):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy()
        mask = table["loss_mask"].combine_chunks().flatten().to_numpy()
        ids = ids[mask == 1]
        if ids.size and ids.max() >= target_size:
            raise ContractError(
                f"token id {ids.max()} exceeds the target's last one, {target_size - 1}",
                "tokens and target do not match: make both in one run",
            )
        counts += np.bincount(ids, minlength=target_size)
    if not counts.any():
        raise ContractError("no token is supervised", "check that the conversations have answers")
    return counts


def most_frequent(counts: np.ndarray[Any, np.dtype[np.int64]], size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The `size` token ids with the highest counts, ascending; of equal counts the lower id."""
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def mapping(token_ids: np.ndarray[Any, np.dtype[np.int64]], target_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d2t, int64 [V_draft]: target id = i + d2t[i]. t2d, bool [V_target]: whether the draft can propose the token."""
    ids = torch.from_numpy(token_ids)
    d2t = ids - torch.arange(len(ids))
    t2d = torch.zeros(target_size, dtype=torch.bool)
    t2d[ids] = True
    return d2t, t2d
