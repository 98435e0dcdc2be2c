"""Run by upstream's interpreter: load a checkpoint with upstream's package and compute its loss on a pack.

Usage: python upstream_loss.py CHECKPOINT PACK.safetensors  ->  one line of JSON
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file
from speculators.losses import resolve_loss_config
from speculators.model import SpeculatorModel
from speculators.models.eagle3.data import shift_batch


def main(checkpoint: str, pack_file: str) -> None:
    model = SpeculatorModel.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.transformer_layer_config._attn_implementation = "eager"
    model = type(model)(model.config)
    saved = load_file(f"{checkpoint}/model.safetensors")
    model.load_vocab_mappings(saved.get("t2d"), saved.get("d2t"))
    found = model.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in saved.items()}, strict=False
    )
    model.load_verifier_weights()
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
            **batch, ttt_steps=3, ttt_step_loss_decay=1.0, loss_config=resolve_loss_config("kl_div", "eager")
        )
    ignored = ("verifier_lm_head.weight", "verifier_norm.weight")
    answer = {
        "loss": float(loss),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "missing": [name for name in found.missing_keys if name not in ignored],
        "unexpected": list(found.unexpected_keys),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
