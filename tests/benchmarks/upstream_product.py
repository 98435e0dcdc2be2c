"""Upstream speculators 0.9.0 loads the EAGLE-3 draft that a run ended in, and computes its loss on the run's own data.

    python -m tests.benchmarks.upstream_product RUN_DIRECTORY UPSTREAM_PYTHON [ROWS]

UPSTREAM_PYTHON is an interpreter that has upstream's package. It is given the checkpoint and a few rows of the
validation split with their hidden states, and takes everything else from the target that the checkpoint names. Prints
both losses, which differ by the rounding of another order of summation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from speculators.config.algorithms import loss_weights
from speculators.drafts.eagle3 import Eagle3Draft
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.shards import ShardReader
from speculators.ops.distillation import TargetHead
from speculators.runner import history, products
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.training.losses import distill

SCRIPT = Path(__file__).parents[1] / "drafts" / "upstream_loss.py"


@torch.no_grad()
def main(directory: str, python: str, count: str = "4") -> None:
    """Print the loss of both, per token and summed over draft steps."""
    run = history.read_run(Path(directory))
    assert run is not None
    (product,) = products.of_run(run)
    paths = {slot: Path(run.stages[node].path) for slot, node in run.stages[product.node].inputs.items()}
    target = TargetCheckpoint(paths["target"])
    draft = Eagle3Draft.from_checkpoint(product.checkpoint, target.embeddings(), None)
    loader = DataLoader(paths["tokens"], ShardSource(ShardReader(paths["features"])))
    rows = loader.split(run.config["train"]["validation_ratio"])[1][: int(count)]
    batch = loader.pack(loader.row_slices(rows, 1 << 20), torch.device("cpu"))

    norm = target.final_norm()
    teacher = TargetHead(norm_weight=norm.weight, norm_eps=norm.eps, head=target.head(draft.vocabulary.tokens).float())
    weights = loss_weights(draft.options.loss_fn)
    ours = distill(draft(batch), batch.last_hidden_states, draft.lm_head.weight, teacher, weights).loss.item()

    last = batch.last_hidden_states[batch.last_index.clamp(0, len(batch.last_hidden_states) - 1)]
    tensors = {
        "token_ids": batch.token_ids,
        "loss_mask": batch.loss_mask,
        "states": torch.cat([batch.hidden_states, last[:, None]], 1).contiguous(),
        "lengths": torch.tensor(batch.lengths),
    }
    with tempfile.TemporaryDirectory() as scratch:
        save_file(tensors, Path(scratch) / "pack.safetensors")
        losses = json.dumps({{"kl": "kl_div", "js": "jsd"}.get(k.name, k.name): v for k, v in weights.items()})
        command = [python, str(SCRIPT), str(product.checkpoint), f"{scratch}/pack.safetensors", losses, "1.0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert not theirs["missing"], theirs
    assert not theirs["unexpected"], theirs
    print(f"draft     {product.checkpoint}")
    print(f"target    {product.verifier}")
    print(f"rows      {len(rows)}, {len(batch.token_ids)} tokens, {int(batch.loss_mask.sum())} supervised")
    print(f"loss      ours {ours:.6f}, upstream's {theirs['loss']:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
