"""DFlash: what a block sees, what its places are asked for and weigh, which anchors are drawn, checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open

from speculators.config.algorithms import DFlash, Init, Loss, Weighting
from speculators.config.schema import Train
from speculators.drafts import induction
from speculators.drafts.base import Predictions
from speculators.drafts.dflash import DFlashDraft, dpace_weights
from speculators.errors import ContractError
from speculators.evaluation.acceptance import AcceptanceCounts
from speculators.ops.distillation import TargetHead
from speculators.training.losses import correct_so_far, distill, next_token_in_vocabulary
from speculators.training.optim import Optimizers


def test_a_block_sees_states_strictly_before_its_anchor_in_its_own_document(tmp_path: Path) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path))
    pack = tiny.make_pack([20, 30])
    anchors = draft.layout(pack, None).anchors.tolist()
    before = draft(pack).hidden_states
    for place in (3, 12, 25, 40):
        changed = tiny.make_pack([20, 30])
        changed.hidden_states[place] += 1.0
        moved = (draft(changed).hidden_states != before).flatten(2).any(-1).any(0)
        end = 20 if place < 20 else 50
        assert [a for a, m in zip(anchors, moved, strict=True) if m] == [a for a in anchors if place < a < end]


def test_a_block_knows_its_anchor_token_and_no_other(tmp_path: Path) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path))
    pack, changed = tiny.make_pack([20, 30]), tiny.make_pack([20, 30])
    changed.token_ids[15] = (changed.token_ids[15] + 1) % tiny.V
    moved = (draft(changed).hidden_states != draft(pack).hidden_states).any(-1).any(0)
    assert draft.layout(pack, None).anchors[moved].tolist() == [15]


def test_predictions_stay_in_their_document_and_follow_the_supervision(tmp_path: Path) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path), weighting=Weighting.decay, decay_gamma=2.0)
    pack = tiny.make_pack([6, 4])  # supervised: places 2 to 5, and 7 to 9
    found = draft(pack)
    assert draft.layout(pack, None).anchors.tolist() == [2, 3, 4, 7, 8]
    by_place = [found.target_index[k][found.valid[k]].tolist() for k in range(3)]
    assert by_place == [[2, 3, 4, 7, 8], [3, 4, 8], [4]]
    decay = [math.exp(-k / 2.0) for k in range(3)]
    assert found.weight.sum(1).tolist() == pytest.approx([decay[0] * 5 / 9, decay[1] * 3 / 9, decay[2] * 1 / 9])


def test_where_nothing_is_supervised_a_step_has_gradients_that_are_zero(tmp_path: Path) -> None:
    draft, teacher = tiny.make_dflash(tiny.write_target(tmp_path))
    pack = tiny.make_pack([12])
    pack.loss_mask[:] = False
    pack.loss_mask[5] = True  # a token alone: no anchor, for no supervised one follows
    outcome = distill(
        draft(pack, tiny.state_at(0)), pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft)
    )
    outcome.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in draft.parameters())


def test_each_step_draws_its_own_anchors_and_always_the_same(tmp_path: Path) -> None:
    target = tiny.write_target(tmp_path)
    draft, again = (tiny.make_dflash(target, max_anchors=9)[0] for _ in range(2))
    pack = tiny.make_pack([40, 40])
    drawn = []
    for step in range(6):
        drawn.append(draft.layout(pack, tiny.state_at(step)).anchors.tolist())
    assert all(len(anchors) == 9 and anchors == sorted(set(anchors)) for anchors in drawn)
    assert len({tuple(anchors) for anchors in drawn}) == 6
    assert again.layout(pack, tiny.state_at(4)).anchors.tolist() == drawn[4]
    for validated in (draft, again):
        everywhere = validated.layout(pack, None).anchors.tolist()
        assert everywhere == [*range(13, 39), *range(53, 79)]


def test_cross_entropy_is_against_the_most_likely_token_by_hand() -> None:
    # Target logits (0, ln 3): label 1. Draft logits (0, 0): q = 1/2, 1/2. CE = ln 2; slope = q - (0, 1) = (1/2, -1/2).
    hidden = torch.zeros(1, 1, 2, requires_grad=True)
    teacher = TargetHead(norm_weight=torch.full((2,), math.log(3) / math.sqrt(2)), norm_eps=0.0, head=torch.eye(2))
    place = torch.zeros(1, 1, dtype=torch.int64)
    found = Predictions(hidden_states=hidden, target_index=place, valid=place == 0, weight=torch.full((1, 1), 0.5))
    outcome = distill(found, torch.tensor([[0.0, 1.0]]), torch.eye(2), teacher, Loss.ce)
    outcome.loss.backward()
    assert outcome.divergence.item() == pytest.approx(math.log(2), abs=1e-6)
    assert outcome.loss.item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([0.25, -0.25], abs=1e-6)


def test_dpace_weighs_a_place_by_how_likely_it_and_later_ones_are_reached() -> None:
    # One block, alpha 1/2, confidences 1/2, 1/4, then a place that is not supervised, then 1:
    # passed 3/4, 5/8, 1, 1; reached 3/4, 15/32, -, 15/32; summed from the end: 27/16, 15/16, 0, 15/32.
    divergence = -torch.tensor([[0.5], [0.25], [1.0], [1.0]]).log()
    share = torch.tensor([[1.0], [1.0], [0.0], [1.0]]) / 3
    expected = [27 / 16 / 3, 15 / 16 / 3, 0.0, 15 / 32 / 3]
    assert dpace_weights(divergence, share, 0.5).flatten().tolist() == pytest.approx(expected)
    # alpha 1/4: passed 5/8, 7/16, 1, 1; reached 5/8, 35/128, -, 35/128; summed 75/64, 35/64, 0, 35/128.
    expected = [75 / 64 / 3, 35 / 64 / 3, 0.0, 35 / 128 / 3]
    assert dpace_weights(divergence, share, 0.25).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [Loss.ce, Loss.kl])
@pytest.mark.parametrize("chunk", [200, 1 << 20])
def test_weights_that_follow_from_the_losses_give_the_gradient_of_constants(
    tmp_path: Path, loss: Loss, chunk: int
) -> None:
    draft, teacher = tiny.make_dflash(tiny.write_target(tmp_path))
    pack = tiny.make_pack([20, 33, 9])
    found = draft(pack)
    hidden = found.hidden_states.detach().requires_grad_()
    outcome = distill(
        replace(found, hidden_states=hidden),
        pack.last_hidden_states,
        draft.lm_head.weight,
        teacher,
        loss,
        chunk_elements=chunk,
    )
    outcome.loss.backward()

    plain = found.hidden_states.detach().requires_grad_()
    log_p = teacher.logits(pack.last_hidden_states, torch.float32).log_softmax(-1)[found.target_index]
    log_q = (plain @ draft.lm_head.weight.T).log_softmax(-1)
    if loss is Loss.ce:
        each = -log_q.gather(-1, log_p.argmax(-1, keepdim=True))[..., 0]
    else:
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
    weight = dpace_weights(each.detach() * found.valid, found.weight, draft.options.dpace_alpha)
    (each * weight).sum().backward()
    assert outcome.loss.item() == pytest.approx((each * weight).sum().item(), rel=1e-5)
    torch.testing.assert_close(outcome.divergence, each.detach() * found.valid, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, plain.grad, atol=1e-6, rtol=1e-4)


def test_mixed_precision_on_the_cpu_stays_close(tmp_path: Path) -> None:
    draft, teacher = tiny.make_dflash(tiny.write_target(tmp_path))
    pack = tiny.make_pack([20, 33])
    exact = distill(
        draft(pack), pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft)
    ).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = distill(draft(pack), pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft))
    outcome.loss.backward()
    assert outcome.loss.item() != exact
    assert outcome.loss.item() == pytest.approx(exact, rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in draft.parameters())


def test_overfitting_one_row_reaches_nearly_all_acceptance(tmp_path: Path) -> None:
    draft, teacher = tiny.make_dflash(tiny.write_target(tmp_path), tiny.V, max_anchors=16)
    pack = tiny.make_pack([40])
    logits = teacher.logits(pack.last_hidden_states, torch.float32)
    pack.token_ids[1:] = logits.argmax(-1)[:-1]  # the row is what the target says
    optimizers = Optimizers(draft, Train(lr=2e-2))
    for step in range(60):
        distill(
            draft(pack, tiny.state_at(step)),
            pack.last_hidden_states,
            draft.lm_head.weight,
            teacher,
            tiny.losses_of(draft),
        ).loss.backward()
        optimizers.step(1.0 - step / 60)
    with torch.no_grad():
        predictions = draft(pack)
        outcome = distill(predictions, pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft))
    walk = AcceptanceCounts.empty(3)
    sayable = next_token_in_vocabulary(pack, draft.vocabulary)[predictions.target_index]
    walk.add(predictions.target_index[0].tolist(), correct_so_far(predictions.valid & outcome.correct & sayable))
    # 27 supervised tokens: an anchor and the 26 after it, in proposals of three and the target's own.
    assert walk.proposals == 7
    assert walk.metrics()["acceptance_length"] > 3.7


def layer_tensors(index: int) -> dict[str, list[int]]:
    prefix = f"layers.{index}."
    return {
        f"{prefix}input_layernorm.weight": [32],
        f"{prefix}post_attention_layernorm.weight": [32],
        f"{prefix}self_attn.q_proj.weight": [32, 32],
        f"{prefix}self_attn.k_proj.weight": [16, 32],
        f"{prefix}self_attn.v_proj.weight": [16, 32],
        f"{prefix}self_attn.o_proj.weight": [32, 32],
        f"{prefix}self_attn.q_norm.weight": [8],
        f"{prefix}self_attn.k_norm.weight": [8],
        f"{prefix}mlp.gate_proj.weight": [48, 32],
        f"{prefix}mlp.up_proj.weight": [48, 32],
        f"{prefix}mlp.down_proj.weight": [32, 48],
    }


@pytest.mark.parametrize("kept", [40, tiny.V], ids=["reduced", "full"])
def test_a_checkpoint_has_the_formats_tensors_and_comes_back_as_it_was(tmp_path: Path, kept: int) -> None:
    target = tiny.write_target(tmp_path / "target")
    draft, _ = tiny.make_dflash(target, kept)
    draft.save(tmp_path / "a", torch.float32)
    expected = {"fc.weight": [32, 96], "hidden_norm.weight": [32], "norm.weight": [32]}
    expected |= layer_tensors(0) | layer_tensors(1)
    expected |= {"lm_head.weight": [kept, 32], "d2t": [kept], "t2d": [tiny.V]} if kept < tiny.V else {}
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {name: list(file.get_slice(name).get_shape()) for name in file.keys()} == expected  # noqa: SIM118
    parts, _ = tiny.make_parts(target, kept)
    again = DFlashDraft.from_checkpoint(tmp_path / "a", parts.embeddings, parts.head)
    pack = tiny.make_pack([20, 9])
    assert torch.equal(draft(pack).hidden_states, again(pack).hidden_states)
    again.save(tmp_path / "b", torch.float32)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_checkpoint_without_the_targets_matrices_asks_for_them(tmp_path: Path) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path / "target"))
    draft.save(tmp_path / "draft", torch.float32)
    with pytest.raises(ContractError, match=r"does not hold embed_tokens\.weight"):
        DFlashDraft.from_checkpoint(tmp_path / "draft")


def test_the_config_says_what_a_server_and_upstream_need(tmp_path: Path) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path / "target"))
    draft.save(tmp_path / "draft", torch.bfloat16)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": [1, 3, 4],
        "block_size": 4,
        "draft_vocab_size": 40,
        "dtype": "bfloat16",
        "mask_token_id": 7,
        "sample_from_anchor": False,
        "sliding_window_non_causal": True,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": str(tmp_path / "target")},
        },
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
    }
    assert layer["model_type"] == "qwen3"
    assert layer["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("options", "layer_type", "window", "non_causal"),
    [
        ({}, "full_attention", None, True),
        ({"sliding_window": 9}, "sliding_attention", 9, True),
        ({"causal": True, "sliding_window": 9}, "sliding_attention", 9, False),
        ({"causal": True}, "sliding_attention", 256, False),
    ],
    ids=["full", "window", "causal with a window", "causal"],
)
def test_variants_are_written_so_that_servers_and_upstream_read_them_alike(
    tmp_path: Path, options: dict[str, Any], layer_type: str, window: int | None, non_causal: bool
) -> None:
    draft, _ = tiny.make_dflash(tiny.write_target(tmp_path / "target"), **options)
    layer = draft.config["transformer_layer_config"]
    assert (layer["layer_types"], layer.get("sliding_window")) == ([layer_type] * 2, window)
    assert draft.config["sliding_window_non_causal"] is non_causal
    assert [(part.window, part.causal) for part in draft.layers] == [(window, not non_causal)] * 2


def test_a_mask_token_that_the_target_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="the mask token is 96, the target has 96 tokens"):
        tiny.make_dflash(tiny.write_target(tmp_path), mask_token_id=tiny.V)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({}, 0.7, 1.0),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 0.7, 1.0),
        ({"num_layers": 1}, 0.0, 0.1),
        ({"init": Init.random}, 0.0, 0.1),
    ],
    ids=["two query heads per key", "a query head per key", "one layer", "without"],
)
def test_an_untrained_draft_copies_what_followed_the_last_time(
    options: dict[str, Any], least: float, most: float
) -> None:
    parts, full = tiny.copying_target()
    given = {"num_layers": 2, "block_size": 4, "mask_token_id": 7, "init": Init.induction, **options}
    draft = DFlashDraft.from_target(parts, DFlash(**given), full, [0, 1, 3], seed=3)
    packs = tiny.repeating_packs(parts.embeddings, 40)
    if draft.options.init is Init.induction:
        induction.initialise(draft, packs[:30], seed=3)
    assert least <= tiny.copied(draft, packs[30:]) <= most


def test_a_checkpoint_reads_states_as_they_are_where_the_draft_was_trained_on_unit_sizes(tmp_path: Path) -> None:
    parts, full = tiny.copying_target()
    options = DFlash(num_layers=2, block_size=4, mask_token_id=7, init=Init.induction)
    draft = DFlashDraft.from_target(parts, options, full, [0, 1, 3], seed=3)
    packs = tiny.repeating_packs(parts.embeddings, 12)
    induction.initialise(draft, packs[:10], seed=3)
    assert (draft.fc_scale != 1.0).any(), "or there is nothing to fold"
    draft.save(tmp_path, torch.float32)
    loaded = DFlashDraft.from_checkpoint(tmp_path, parts.embeddings, parts.head)
    assert not loaded.fitted_tensors()
    assert not torch.equal(loaded.fc.weight, draft.fc.weight)
    for pack in packs[10:]:
        torch.testing.assert_close(loaded(pack).hidden_states, draft(pack).hidden_states, atol=1e-4, rtol=1e-4)
