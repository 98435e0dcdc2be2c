"""What upstream speculators 0.9.0 makes of our checkpoints, asked of upstream itself.

Runs where SPECULATORS_UPSTREAM_PYTHON names an interpreter that has it: it cannot share an environment with us.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from speculators.drafts.eagle3 import Eagle3Draft
from speculators.training.losses import Tally, distill

PYTHON = os.environ.get("SPECULATORS_UPSTREAM_PYTHON", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not PYTHON, reason="SPECULATORS_UPSTREAM_PYTHON names no interpreter with upstream 0.9.0"),
    pytest.mark.timeout(300),
]


def ask_upstream(checkpoint: Path, pack: Any, directory: Path) -> dict[str, Any]:
    tensors = {"token_ids": pack.token_ids, "loss_mask": pack.loss_mask, "states": pack.states}
    save_file({**tensors, "lengths": torch.tensor(pack.lengths)}, directory / "pack.safetensors")
    script = Path(__file__).parent / "upstream_loss.py"
    command = [PYTHON, str(script), str(checkpoint), str(directory / "pack.safetensors")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | {"PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    ("kept", "options"),
    [
        (40, {}),
        (tiny.V, {"norm_output": False, "norm_before_residual": False, "norm_before_fc": False}),
        (40, {"num_layers": 2}),
    ],
    ids=["reduced vocabulary", "full vocabulary, no extra norms", "two layers"],
)
def test_upstream_loads_our_checkpoint_whole_and_computes_our_loss(
    tmp_path: Path, kept: int, options: dict[str, Any]
) -> None:
    draft, teacher = tiny.make_draft(tiny.write_target(tmp_path / "target"), kept, **options)
    with torch.no_grad():
        for parameter in draft.parameters():  # larger than fresh weights, so that every part of the model matters
            parameter.mul_(4.0)
    draft.save(tmp_path / "draft", torch.bfloat16)
    draft = Eagle3Draft.load(tmp_path / "draft")
    pack = tiny.make_pack([20, 33, 9, 14])
    predictions = draft(pack)
    outcome = distill(predictions, pack.states[:, -1], draft.lm_head.weight, teacher)
    ours = Tally.of(predictions.valid, outcome).metrics()

    theirs = ask_upstream(tmp_path / "draft", pack, tmp_path)

    assert theirs["missing"] == []
    assert theirs["unexpected"] == []
    assert outcome.loss.item() == pytest.approx(theirs["loss"], abs=1e-3)
    for step in range(3):
        assert ours[f"loss_{step}"] == pytest.approx(theirs["metrics"][f"loss_{step}_sum"], abs=1e-3)
    assert ours["full_0"] == pytest.approx(
        theirs["metrics"]["full_acc_0_sum"] / theirs["metrics"]["full_acc_0_total"], abs=1e-4
    )
