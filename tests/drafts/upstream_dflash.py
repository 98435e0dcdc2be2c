"""Run by upstream's interpreter: load a DFlash checkpoint, compute upstream's loss on a pack, and save it again.

Usage: python upstream_dflash.py CHECKPOINT PACK.safetensors OPTIONS SAVED  ->  one line of JSON

OPTIONS is JSON: `loss_fn`, `per_position_loss_weight`, `gamma`, `dpace_alpha`. The pack brings its own anchors, where
upstream would draw some.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file
from speculators.losses import resolve_loss_config
from speculators.models.dflash import core
from upstream_model import answer, load


def main(checkpoint: str, pack_file: str, options: str, saved_to: str) -> None:
    model, found = load(checkpoint, saved_to)
    pack = load_file(pack_file)
    anchors, lengths = pack["anchors"], pack["lengths"]
    core.select_anchors = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    asked = json.loads(options)
    with torch.no_grad():
        _, loss, metrics = model(
            hidden_states=pack["states"][None, :, :-1].flatten(2).float(),
            input_ids=pack["token_ids"][None],
            loss_mask=pack["loss_mask"][None].long(),
            verifier_last_hidden_states=pack["states"][None, :, -1].float(),
            document_ids=torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            loss_config=resolve_loss_config(asked.pop("loss_fn"), "eager"),
            max_anchors=len(anchors),
            **asked,
        )
    taken = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")
    answer(found, taken, loss, metrics)


if __name__ == "__main__":
    main(*sys.argv[1:])
