"""Run by upstream's interpreter: load an EAGLE-3 checkpoint and compute upstream's loss on a pack.

Usage: python upstream_loss.py CHECKPOINT PACK.safetensors LOSS DECAY  ->  one line of JSON
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from speculators.losses import resolve_loss_config
from speculators.models.eagle3.data import shift_batch
from upstream_model import answer, load


def main(checkpoint: str, pack_file: str, loss_fn: str, decay: str) -> None:
    model, found = load(checkpoint)
    pack = load_file(pack_file)
    parts, first = [], 0
    for length in pack["lengths"].tolist():
        rows = slice(first, first + length)
        first += length
        row = {
            "input_ids": pack["token_ids"][rows],
            "hidden_states": pack["states"][rows, :-1].flatten(1).float(),
            "verifier_last_hidden_states": pack["states"][rows, -1].float(),
            "loss_mask": pack["loss_mask"][rows],
            "lengths": torch.tensor([length]),
            "position_ids": torch.arange(length),
        }
        parts.append(shift_batch(row))
    batch = {name: torch.cat([p[name] for p in parts])[None] for name in parts[0] if name != "lengths"}
    lengths = torch.cat([p["lengths"] for p in parts])
    batch["document_ids"] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    with torch.no_grad():
        _, loss, metrics = model(
            **batch,
            ttt_steps=3,
            ttt_step_loss_decay=float(decay),
            loss_config=resolve_loss_config(loss_fn, "eager"),
        )
    answer(found, ("verifier_lm_head.weight", "verifier_norm.weight"), loss, metrics)


if __name__ == "__main__":
    main(*sys.argv[1:])
