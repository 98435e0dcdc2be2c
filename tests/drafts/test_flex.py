"""Drafts on a GPU, where attention is a compiled kernel: the same numbers and gradients as on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from speculators.drafts.base import Draft
from speculators.features.batch import PackedBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def computed(draft: Draft, pack: PackedBatch, device: str) -> list[torch.Tensor]:
    """What goes into the head, and the gradient of its mean square."""
    draft = draft.to(device)
    tensors = {name: getattr(pack, name).to(device) for name in ("token_ids", "loss_mask", "states")}
    draft.zero_grad()
    found = draft(replace(pack, **tensors))
    kept = found.hidden_states[found.valid]
    (kept.square().mean() + kept[:, 0].mean()).backward()
    return [x.detach().cpu() for x in (kept, *(p.grad for p in draft.parameters() if p.grad is not None))]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.make_draft, {"num_layers": 2}),
        (tiny.make_dflash, {}),
        (tiny.make_dflash, {"causal": True, "sliding_window": 9}),
    ],
    ids=["eagle3", "dflash", "dflash, causal, window"],
)
def test_a_gpu_gives_the_numbers_of_the_cpu(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    # Heads of 16 dimensions, the least that the kernels take.
    directory = tiny.write_target(tmp_path, head_dim=16)
    draft, _ = make(directory, **options)
    pack = tiny.make_pack([150, 33, 9, 64])
    for found, expected in zip(computed(draft, pack, "cuda"), computed(draft, pack, "cpu"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
