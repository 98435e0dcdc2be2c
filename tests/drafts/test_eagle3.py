"""EAGLE-3: documents apart from each other, the loss by hand, checkpoints."""

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
from safetensors.torch import load_file

from speculators.config.algorithms import DraftArch, Eagle3, Init
from speculators.config.schema import Train
from speculators.drafts import induction
from speculators.drafts.base import Predictions, Vocabulary
from speculators.drafts.eagle3 import Eagle3Draft
from speculators.drafts.layers import LayerConfig, Rotary
from speculators.errors import ContractError
from speculators.ops.distillation import TargetHead
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.training.losses import MetricSums, distill, next_token_in_vocabulary
from speculators.training.optim import Optimizers


def test_changing_one_document_leaves_the_others_bit_equal(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path), num_layers=2)
    pack, other = tiny.make_pack([20, 33, 9]), tiny.make_pack([20, 33, 9], seed=99)
    pack.hidden_states[20:53] = other.hidden_states[20:53]
    changed = tiny.make_pack([20, 33, 9])
    changed.token_ids[20:53] = other.token_ids[20:53]
    before, after = draft(pack), draft(changed)
    middle = before.valid & (before.target_index >= 20) & (before.target_index < 53)
    others = before.valid & ~middle
    assert torch.equal(before.hidden_states[others], after.hidden_states[others])
    assert not torch.equal(before.hidden_states[middle], after.hidden_states[middle])


def test_predictions_stay_in_their_document_and_follow_the_supervision(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path))
    pack = tiny.make_pack([6, 4])  # supervised: places 2 to 5, and 7 to 9
    found = draft(pack)
    by_step = [found.target_index[k][found.valid[k]].tolist() for k in range(3)]
    assert by_step == [[2, 3, 4, 5, 7, 8, 9], [2, 3, 4, 5, 8, 9], [3, 4, 5, 9]]
    assert found.weight.sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert found.weight[1].max().item() == pytest.approx(1 / 6)


def test_the_pieces_of_a_row_together_predict_what_the_whole_row_does(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path), num_layers=2)
    pack = tiny.make_pack([40])
    whole = draft(pack)
    expected = {(k, int(t)): whole.hidden_states[k, r] for k in range(3) for r, t in enumerate(whole.target_index[k])
                if whole.valid[k, r]}  # fmt: skip
    seen = []
    for begin, end in ((0, 17), (17, 26), (26, 40)):
        mask = pack.loss_mask[:end].clone()
        mask[:begin] = False
        piece = replace(
            pack, lengths=[end], token_ids=pack.token_ids[:end], loss_mask=mask, hidden_states=pack.hidden_states[:end]
        )
        found = draft(piece)
        for k, r in found.valid.nonzero().tolist():
            place = (k, int(found.target_index[k, r]))
            seen.append(place)
            torch.testing.assert_close(found.hidden_states[k, r], expected[place])
    assert sorted(seen) == sorted(expected)


def test_step_decay_weighs_the_steps(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path), ttt_step_decay=0.5)
    assert draft(tiny.make_pack([12])).weight.sum(1).tolist() == pytest.approx([1.0, 0.5, 0.25])


def test_the_loss_is_the_divergence_computed_by_hand() -> None:
    # Target logits (0, ln 3): p = 1/4, 3/4. Draft logits (0, 0): q = 1/2, 1/2.
    # KL = 1/4 ln(1/2) + 3/4 ln(3/2) = 0.1308; d KL / d logits = q - p = (1/4, -1/4).
    hidden = torch.zeros(1, 1, 2, requires_grad=True)
    head = torch.eye(2)
    last = torch.tensor([[0.0, 1.0]])  # its norm is (0, sqrt 2)
    teacher = TargetHead(norm_weight=torch.full((2,), math.log(3) / math.sqrt(2)), norm_eps=0.0, head=head)
    place = torch.zeros(1, 1, dtype=torch.int64)
    found = Predictions(hidden_states=hidden, target_index=place, valid=place == 0, weight=torch.full((1, 1), 0.5))
    outcome = distill(found, last, head, teacher)
    outcome.loss.backward()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert outcome.divergence.item() == pytest.approx(expected, abs=1e-6)
    assert outcome.loss.item() == pytest.approx(0.5 * expected, abs=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([0.125, -0.125], abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_chunks_change_neither_loss_nor_gradient(tmp_path: Path, chunk: int) -> None:
    draft, teacher = tiny.make_draft(tiny.write_target(tmp_path))
    pack = tiny.make_pack([20, 33, 9])
    found = draft(pack)
    hidden = found.hidden_states.detach().requires_grad_()
    again = Predictions(hidden_states=hidden, target_index=found.target_index, valid=found.valid, weight=found.weight)
    outcome = distill(again, pack.last_hidden_states, draft.lm_head.weight, teacher, chunk_elements=chunk)
    outcome.loss.backward()

    plain = found.hidden_states.detach().requires_grad_()
    log_p = teacher.logits(pack.last_hidden_states, torch.float32).log_softmax(-1)[found.target_index]
    log_q = (plain @ draft.lm_head.weight.T).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    (divergence * found.weight).sum().backward()
    torch.testing.assert_close(outcome.divergence, divergence.detach() * found.valid, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, plain.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(outcome.correct, (log_p.argmax(-1) == log_q.argmax(-1)) & found.valid)


def test_a_target_that_bounds_its_logits_teaches_bounded_ones() -> None:
    head, last = torch.eye(2) * 100.0, torch.tensor([[3.0, -3.0]])
    teacher = TargetHead(norm_weight=torch.ones(2), norm_eps=0.0, head=head, scale=0.5, softcap=30.0)
    expected = 30.0 * math.tanh(50.0 / 30.0)
    assert teacher.logits(last, torch.float32)[0].tolist() == pytest.approx([expected, -expected], rel=1e-5)


def test_tallies_count_whole_runs_and_add_up() -> None:
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    right = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    outcome_like = type("Outcome", (), {"divergence": torch.ones(3, 4), "correct": right})
    tally = MetricSums.of(valid, outcome_like)  # type: ignore[arg-type]
    tally.add(MetricSums.of(valid, outcome_like))  # type: ignore[arg-type]
    found = tally.metrics(step_decay=0.5)
    assert [found[f"full_acc_{k}"] for k in range(3)] == pytest.approx([3 / 4, 1 / 3, 1 / 2])
    assert [found[f"cond_acc_{k}"] for k in range(3)] == pytest.approx([3 / 4, 1 / 2, 1.0])
    assert found["loss"] == pytest.approx(1.75)


def test_a_token_outside_of_the_vocabulary_cannot_be_said() -> None:
    pack = tiny.make_pack([3, 2])
    pack.token_ids[:] = torch.tensor([5, 6, 5, 6, 6])
    t2d = torch.zeros(tiny.V, dtype=torch.bool)
    t2d[6] = True
    vocabulary = Vocabulary(d2t=torch.tensor([6]), t2d=t2d)
    assert next_token_in_vocabulary(pack, vocabulary).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("kept", [40, tiny.V], ids=["reduced", "full"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, kept: int) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path / "target"), kept)
    draft.save(tmp_path / "a", torch.float32)
    again = Eagle3Draft.from_checkpoint(tmp_path / "a")
    pack = tiny.make_pack([20, 9])
    assert torch.equal(draft(pack).hidden_states, again(pack).hidden_states)
    assert torch.equal(draft.vocabulary.tokens, again.vocabulary.tokens)
    again.save(tmp_path / "b", torch.float32)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_checkpoint_with_a_tensor_too_few_is_refused(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path / "target"))
    draft.save(tmp_path / "draft", torch.float32)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    config["transformer_layer_config"]["num_hidden_layers"] = 2
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"lacks .*layers\.1\.mlp"):
        Eagle3Draft.from_checkpoint(tmp_path / "draft")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_positions_equal_those_of_transformers(rope: dict[str, object]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {**tiny.CONFIG, "rope_parameters": rope, "initializer_range": 0.02}
    positions = torch.arange(70)
    keys = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
    reference = LlamaRotaryEmbedding(LlamaConfig(**{key: plain[key] for key in keys}))
    cosine, sine = Rotary(LayerConfig.from_dict(plain))(positions)
    expected = reference(torch.zeros(1, 1, 1), positions[None])
    torch.testing.assert_close(cosine[:, 0], expected[0][0])
    torch.testing.assert_close(sine[:, 0], expected[1][0])


def test_mixed_precision_on_the_cpu_stays_close(tmp_path: Path) -> None:
    draft, teacher = tiny.make_draft(tiny.write_target(tmp_path))
    pack = tiny.make_pack([20, 33])
    exact = distill(draft(pack), pack.last_hidden_states, draft.lm_head.weight, teacher).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = distill(draft(pack), pack.last_hidden_states, draft.lm_head.weight, teacher)
    outcome.loss.backward()
    assert outcome.loss.item() != exact
    assert outcome.loss.item() == pytest.approx(exact, rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in draft.parameters())


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({}, 0.7, 1.0),
        ({"draft_arch": DraftArch.qwen3, "fc_norm": True, "norm_before_fc": False}, 0.7, 1.0),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 0.7, 1.0),
        ({"init": Init.random}, 0.0, 0.1),
    ],
    ids=["llama", "qwen3, a norm per layer", "a query head per key", "without"],
)
def test_an_untrained_draft_copies_what_followed_the_last_time(
    options: dict[str, Any], least: float, most: float
) -> None:
    parts, full = tiny.copying_target()
    draft = Eagle3Draft.from_target(parts, Eagle3(**{"init": Init.induction, **options}), full, [1, 3, 4], seed=3)
    packs = tiny.repeating_packs(parts.embeddings, 40)
    if draft.options.init is Init.induction:
        induction.initialise(draft, packs[:30], seed=3)
    assert least <= tiny.copied(draft, packs[30:]) <= most


def test_the_first_share_of_a_training_unrolls_one_step(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path), ttt_warmup_ratio=0.5)
    steps = []
    for step in (0, 49, 50, 100):
        steps.append(len(draft(tiny.make_pack([12]), tiny.state_at(step)).hidden_states))
    assert steps == [1, 1, 3, 3]
    assert len(draft(tiny.make_pack([12])).hidden_states) == 3, "validation unrolls all"


def test_drawn_numbers_of_steps_depend_on_the_seed_and_the_step_alone(tmp_path: Path) -> None:
    draft, _ = tiny.make_draft(tiny.write_target(tmp_path), ttt_random_steps=True, ttt_steps=4)
    again, _ = tiny.make_draft(tmp_path, ttt_random_steps=True, ttt_steps=4)
    steps = []
    for step in range(40):
        steps.append(draft.unrolled_steps(tiny.state_at(step)))
    assert set(steps) == {1, 2, 3, 4}
    assert again.unrolled_steps(tiny.state_at(17)) == steps[17]
    assert again.unrolled_steps(None) == 4


def names(directory: Path) -> dict[str, list[int]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_a_checkpoint_of_every_variant_has_the_tensors_that_servers_look_for(tmp_path: Path) -> None:
    tiny.write_target(tmp_path / "target")
    plain, _ = tiny.make_draft(tmp_path / "target", num_layers=2)
    variant, _ = tiny.make_draft(
        tmp_path / "target", num_layers=2, draft_arch=DraftArch.qwen3, fc_norm=True, norm_before_fc=False
    )
    for name, draft in (("plain", plain), ("variant", variant)):
        draft.save(tmp_path / name, torch.float32)
    expected = names(tmp_path / "plain")
    assert expected.pop("input_norm.weight") == [96]
    expected |= {f"fc_norm.{i}.weight": [32] for i in range(3)}
    expected |= {f"layers.{i}.self_attn.{x}_norm.weight": [8] for i in range(2) for x in "qk"}
    assert names(tmp_path / "variant") == expected
    config = json.loads((tmp_path / "variant" / "config.json").read_text())
    assert (config["fc_norm"], config["norm_before_fc"], config["norm_output"]) == (True, False, True)
    assert config["transformer_layer_config"]["model_type"] == "qwen3"
    pack = tiny.make_pack([20, 9])
    assert torch.equal(
        Eagle3Draft.from_checkpoint(tmp_path / "variant")(pack).hidden_states, variant(pack).hidden_states
    )


def test_a_draft_may_be_of_another_shape_than_its_target(tmp_path: Path) -> None:
    tiny.write_target(tmp_path / "target")
    draft, _ = tiny.make_draft(tmp_path / "target", num_attention_heads=6, num_key_value_heads=3, intermediate_size=40)
    draft.save(tmp_path / "draft", torch.float32)
    shapes = names(tmp_path / "draft")
    assert shapes["layers.0.self_attn.q_proj.weight"] == [6 * 8, 2 * 32]
    assert shapes["layers.0.self_attn.k_proj.weight"] == shapes["layers.0.self_attn.v_proj.weight"] == [3 * 8, 2 * 32]
    assert shapes["layers.0.mlp.up_proj.weight"] == [40, 32]
    told = json.loads((tmp_path / "draft" / "config.json").read_text())["transformer_layer_config"]
    assert (told["num_attention_heads"], told["num_key_value_heads"], told["head_dim"]) == (6, 3, 8)
    assert told["intermediate_size"] == 40


@pytest.mark.parametrize("layer_ids", [[1, 2, 3, 4], [2, 4]])
def test_a_server_is_told_how_many_layers_are_read_unless_they_are_three(tmp_path: Path, layer_ids: list[int]) -> None:
    parts, vocabulary = tiny.make_parts(tiny.write_target(tmp_path))
    told = [Eagle3Draft.from_target(parts, Eagle3(), vocabulary, ids, 0).config for ids in (layer_ids, [1, 3, 4])]
    assert told[0]["transformer_layer_config"]["num_aux_hidden_states"] == len(layer_ids)
    assert "num_aux_hidden_states" not in told[1]["transformer_layer_config"]


@pytest.mark.parametrize("make", [tiny.make_draft, tiny.make_dflash], ids=["eagle3", "dflash"])
@pytest.mark.parametrize("asked", [(True, False), (False, True), (True, True)], ids=["head", "embeddings", "both"])
def test_head_and_embeddings_are_trained_where_it_is_asked(tmp_path: Path, make: Any, asked: tuple[bool, bool]) -> None:
    directory = tiny.write_target(tmp_path / "target", tie_word_embeddings=True)
    draft, teacher = make(directory, tiny.V, train_lm_head=asked[0], embed_requires_grad=asked[1])
    target = TargetCheckpoint(directory)
    pack = tiny.make_pack([20, 33])
    optimizers = Optimizers(draft, Train(lr=1e-2))
    assert not {"lm_head.weight", "embed_tokens.weight"} & set(optimizers.matrices)  # Muon is for inner matrices
    losses = []
    for _ in range(4):
        outcome = distill(draft(pack), pack.last_hidden_states, draft.lm_head.weight, teacher, tiny.losses_of(draft))
        outcome.loss.backward()
        optimizers.step(1.0)
        losses.append(outcome.loss.item())
    assert losses[-1] < losses[0]
    of_target = {"lm_head.weight": target.head(draft.vocabulary.tokens), "embed_tokens.weight": target.embeddings()}
    for (name, theirs), trained in zip(of_target.items(), asked, strict=True):
        assert torch.equal(draft.get_parameter(name) if trained else draft.get_buffer(name), theirs.float()) != trained
    assert torch.equal(teacher.head, of_target["lm_head.weight"].float())

    draft.save(tmp_path / "a", torch.float32)
    held = load_file(tmp_path / "a" / "model.safetensors")
    for name, trained in zip(of_target, asked, strict=True):
        assert name in held if trained or make is tiny.make_draft else name not in held
        assert not trained or torch.equal(held[name], draft.get_parameter(name))
    again = type(draft).from_checkpoint(tmp_path / "a", of_target["embed_tokens.weight"], of_target["lm_head.weight"])
    assert torch.equal(again(pack).hidden_states, draft(pack).hidden_states)
    assert torch.equal(again.lm_head.weight, draft.lm_head.weight)
    again.save(tmp_path / "b", torch.float32)
    assert names(tmp_path / "b") == names(tmp_path / "a")


def test_the_gradients_of_head_and_embeddings_are_autograds(tmp_path: Path) -> None:
    draft, teacher = tiny.make_draft(tiny.write_target(tmp_path), train_lm_head=True, embed_requires_grad=True)
    pack = tiny.make_pack([20, 33])
    found = draft(pack)
    distill(found, pack.last_hidden_states, draft.lm_head.weight, teacher, chunk_elements=300).loss.backward()
    mine = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    found = draft(pack)
    log_p = teacher.logits(pack.last_hidden_states, torch.float32).log_softmax(-1)[found.target_index]
    log_q = (found.hidden_states @ draft.lm_head.weight.T).log_softmax(-1)
    ((log_p.exp() * (log_p - log_q)).sum(-1) * found.weight).sum().backward()
    assert set(mine) == set(dict(draft.named_parameters()))
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, atol=2e-5, rtol=1e-3)
