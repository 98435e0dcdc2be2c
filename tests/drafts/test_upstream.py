"""What upstream speculators 0.9.0 makes of our checkpoints, asked of upstream itself.

Runs where SPECULATORS_UPSTREAM_PYTHON names an interpreter that has it: it cannot share an environment with us.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from speculators.config.algorithms import DraftArch, Loss, Weighting
from speculators.drafts.base import TARGET_MATRICES, Draft
from speculators.drafts.dflash import DFlashDraft
from speculators.drafts.eagle3 import Eagle3Draft
from speculators.training.losses import MetricSums, correct_so_far, distill

PYTHON = os.environ.get("SPECULATORS_UPSTREAM_PYTHON", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not PYTHON, reason="SPECULATORS_UPSTREAM_PYTHON names no interpreter with upstream 0.9.0"),
    pytest.mark.timeout(300),
]


THEIRS = {"kl": "kl_div", "js": "jsd"}
"""What upstream calls a loss, where it is another name than ours."""


def their_loss(ours: Mapping[Loss, float]) -> str:
    return json.dumps({THEIRS.get(loss.name, loss.name): weight for loss, weight in ours.items()})


def ask_upstream(
    checkpoint: Path, pack: Any, directory: Path, script: str, *words: str, **more: torch.Tensor
) -> dict[str, Any]:
    tensors = {"token_ids": pack.token_ids, "loss_mask": pack.loss_mask, "states": tiny.whole(pack), **more}
    save_file({**tensors, "lengths": torch.tensor(pack.lengths)}, directory / "pack.safetensors")
    command = [
        PYTHON,
        str(Path(__file__).parent / script),
        str(checkpoint),
        str(directory / "pack.safetensors"),
        *words,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | {"PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@torch.no_grad()
def larger(draft: Draft) -> None:
    """Larger weights than fresh ones, so that every part of the model matters; and head and embeddings of its own."""
    for name, parameter in draft.named_parameters():
        parameter.mul_(1.2 if name in TARGET_MATRICES else 4.0)


@pytest.mark.parametrize(
    ("kept", "options"),
    [
        (40, {}),
        (tiny.V, {"norm_output": False, "norm_before_residual": False, "norm_before_fc": False}),
        (40, {"num_layers": 2}),
        (40, {"loss_fn": {loss.name: 0.2 + 0.1 * i for i, loss in enumerate(Loss)}, "ttt_step_decay": 0.7}),
        (
            40,
            {"draft_arch": DraftArch.qwen3, "num_layers": 3, "fc_norm": True, "norm_before_fc": False}
            | {"train_lm_head": True, "embed_requires_grad": True},
        ),
    ],
    ids=[
        "reduced vocabulary",
        "full vocabulary, no extra norms",
        "two layers",
        "every loss, decay",
        "qwen3, three layers, a norm per layer, own head and embeddings",
    ],
)
def test_upstream_loads_our_checkpoint_whole_and_computes_our_loss(
    tmp_path: Path, kept: int, options: dict[str, Any]
) -> None:
    # Of moderate logits: upstream's `nla` is cut off where fewer than 1 in 100 000 samples would be accepted.
    draft, teacher = tiny.make_draft(tiny.write_target(tmp_path / "target", head=0.3), kept, **options)
    larger(draft)
    draft.save(tmp_path / "draft", torch.bfloat16)
    asked, draft = draft, Eagle3Draft.from_checkpoint(tmp_path / "draft")
    pack = tiny.make_pack([20, 33, 9, 14])
    predictions = draft(pack)
    weights, decay = tiny.losses_of(asked), asked.options.ttt_step_decay
    predictions = replace(predictions, weight=predictions.weight * decay ** torch.arange(3)[:, None])
    outcome = distill(predictions, pack.last_hidden_states, draft.lm_head.weight, teacher, weights)
    ours = MetricSums.of(predictions.valid, outcome).metrics()

    theirs = ask_upstream(tmp_path / "draft", pack, tmp_path, "upstream_loss.py", their_loss(weights), str(decay))

    assert theirs["missing"] == []
    assert theirs["unexpected"] == []
    assert outcome.loss.item() == pytest.approx(theirs["loss"], abs=1e-4, rel=1e-4)
    for step in range(3):
        told = theirs["metrics"][f"loss_{step}_sum"] / decay**step
        assert ours[f"loss_{step}"] == pytest.approx(told, abs=1e-4, rel=1e-4)
    for loss in weights if len(weights) > 1 else ():
        alone = distill(predictions, pack.last_hidden_states, draft.lm_head.weight, teacher, loss)
        each = (alone.divergence * predictions.weight).sum(1).tolist()
        told = [theirs["metrics"][f"{THEIRS.get(loss.name, loss.name)}_loss_{step}_sum"] for step in range(3)]
        assert each == pytest.approx(told, abs=1e-4, rel=1e-4), loss
    assert ours["full_acc_0"] == pytest.approx(
        theirs["metrics"]["full_acc_0_sum"] / theirs["metrics"]["full_acc_0_total"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("kept", "options"),
    [
        (40, {}),
        (tiny.V, {"loss_fn": "kl", "weighting": Weighting.decay, "decay_gamma": 2.5}),
        (40, {"sliding_window": 6, "dpace_alpha": 0.25}),
        (40, {"sliding_window": 6, "causal": True}),
        (40, {"causal": True, "num_layers": 1}),
        (40, {"loss_fn": {"ce": 0.1, "tv": 0.9}, "weighting": Weighting.decay}),
    ],
    ids=[
        "reduced vocabulary",
        "full vocabulary, kl, fixed decay",
        "window",
        "window, causal",
        "causal, one layer",
        "mixture of losses",
    ],
)
def test_upstream_and_we_load_each_others_dflash_and_compute_one_loss(
    tmp_path: Path, kept: int, options: dict[str, Any]
) -> None:
    parts, _ = tiny.make_parts(tiny.write_target(tmp_path / "target"), kept)
    draft, teacher = tiny.make_dflash(tmp_path / "target", kept, **options)
    asked = draft.options
    larger(draft)
    draft.save(tmp_path / "draft", torch.float32)
    pack = tiny.make_pack([20, 33, 17, 14])
    asked.max_anchors = 25
    anchors = draft.layout(pack, tiny.state_at(2)).anchors
    anchors = anchors[anchors < 80]  # upstream has no anchors in the last block of a pack
    draft._draw_anchors = lambda *_: anchors  # type: ignore[method-assign]
    predictions = draft(pack)
    outcome = distill(predictions, pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft))

    how = {
        "loss_fn": their_loss(tiny.losses_of(draft)),
        "per_position_loss_weight": {Weighting.dpace: "dpace", Weighting.decay: "fixed-exp-decay"}[asked.weighting],
        "gamma": asked.decay_gamma,
        "dpace_alpha": asked.dpace_alpha,
    }
    words = ("upstream_dflash.py", json.dumps(how), str(tmp_path / "theirs"))
    theirs = ask_upstream(tmp_path / "draft", pack, tmp_path, *words, anchors=anchors)

    assert theirs["missing"] == []
    assert theirs["unexpected"] == []
    assert outcome.loss.item() == pytest.approx(theirs["loss"], abs=1e-4)
    right = predictions.valid & outcome.correct
    told = theirs["metrics"]
    for k in range(3):
        assert right[k].sum() == told[f"position_{k + 1}_acc_sum"]
        assert predictions.valid[k].sum() == told[f"position_{k + 1}_acc_total"]
    assert right.sum() == told["full_acc_sum"]
    assert predictions.valid.sum() == told["full_acc_total"]
    assert correct_so_far(right).sum() + predictions.valid.any(0).sum() == told["eal_sum"]

    again = DFlashDraft.from_checkpoint(tmp_path / "theirs", parts.embeddings, parts.head)
    again._draw_anchors = draft._draw_anchors  # type: ignore[method-assign]
    assert torch.equal(again(pack).hidden_states, predictions.hidden_states)
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as their_file:
        names = set(their_file.keys())
    with safe_open(tmp_path / "draft" / "model.safetensors", "pt") as our_file:
        assert set(our_file.keys()) == names
