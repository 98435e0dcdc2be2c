"""The fidelity check on tiny models of each family: what passes, and that every mistake is called by its name.

The "server" is the model itself, run by transformers: its logits give the greedy tokens, hooks the hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from speculators.engine.client import Completion
from speculators.errors import ContractError
from speculators.targets import checkpoint, fidelity_check
from speculators.targets.fidelity_check import (
    FIRST_ROWS,
    GREEDY_TOKENS_FILE,
    EarlyFidelityCheck,
    FidelityCheck,
    greedy_tokens_in_answer,
    read_greedy_tokens,
    sample_positions,
    write_greedy_tokens,
)
from speculators.targets.readings import GreedyToken
from tests.smoke import tiny_gemma

LAYERS, CAPTURED = 6, [1, 3, 4, 6]
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3_tied": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE),
    "gemma4": lambda: Gemma4TextConfig(
        **{**SHAPE, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96},
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=8.0),
}

Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]


class World:
    """A target, rows of tokens with the hidden states of all its layers, and its greedy tokens."""

    def __init__(self, directory: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(7)
        self.directory, self.dtype = directory, dtype
        model: Any = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.copy_(p + 0.5 * torch.randn_like(p))
        model.save_pretrained(directory)
        self.rows: Rows = {}
        self.tokens: list[GreedyToken] = []
        for row in range(FIRST_ROWS):
            ids = torch.randint(1, 96, (24,))
            logits, states = run(model, ids)
            self.rows[row] = ids, states
            for position in (5, 16, 23):
                logprobs = logits[position].float().log_softmax(-1)
                token = int(logprobs.argmax())
                self.tokens.append(GreedyToken(row, position, token, float(logprobs[token])))

    def check(self, **options: Any) -> FidelityCheck:
        plain = {
            "checkpoint": self.directory,
            "layer_ids": CAPTURED,
            "compute_dtype": self.dtype,
            "stored_dtype": self.dtype,
        }
        return FidelityCheck(**{**plain, "min_agreement": 0.98, "max_reference_gib": 1.0, **options})

    def captured(self, layer_ids: list[int] = CAPTURED) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        return lambda row: (self.rows[row][0], self.rows[row][1][:, layer_ids])

    def refusal(self, layer_ids: list[int] = CAPTURED, **options: Any) -> ContractError:
        with pytest.raises(ContractError) as error:
            self.check(**options).check(self.tokens, self.captured(layer_ids))
        return error.value

    def tell(self, **config: Any) -> None:
        """Change what config.json says."""
        path = self.directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    def change(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the weights on disk."""
        path = self.directory / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V], and the input of every layer with the last one's output [T, layers + 1, H]."""
    last: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    said = model(ids[None], output_hidden_states=True, use_cache=False)
    hook.remove()
    return said.logits[0], torch.stack([*(s[0] for s in said.hidden_states[:-1]), last[0][0]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_target_computes_passes(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    world = World(tmp_path, family, dtype)
    found = world.check().check(world.tokens, world.captured())
    assert found["agree"] == found["picks"] == len(world.tokens)
    assert found["logprob_off"] < (1e-3 if dtype is torch.float32 else 0.1)
    assert found["states_off"] < (1e-3 if dtype is torch.float32 else 0.05)


def test_a_target_that_amplifies_rounding_passes_and_another_one_does_not(tmp_path: Path) -> None:
    tiny_gemma.write(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    samples = []
    for seed in range(2):
        ids = torch.randint(10, 250, (96,), generator=torch.Generator().manual_seed(seed))
        samples.append((ids, run(model, ids)[1][:, CAPTURED]))
    check = FidelityCheck(
        checkpoint=tmp_path, layer_ids=CAPTURED, compute_dtype=torch.bfloat16, stored_dtype=torch.bfloat16,
        min_agreement=0.98, max_reference_gib=1.0,
    )  # fmt: skip
    assert check.check_layers(samples)["states_off"] > 0.1  # more than eight roundings explain
    others = [(ids, states + 0.5 * states.norm(dim=-1, keepdim=True) * torch.randn(states.shape[-1]) / 11)
              for ids, states in samples]  # fmt: skip
    with pytest.raises(ContractError, match="come from other weights"):
        check.check_layers(others)


def test_states_stored_in_float8_pass(tmp_path: Path) -> None:
    world = World(tmp_path, "llama", torch.bfloat16)
    for row, (ids, states) in world.rows.items():
        scale = states.abs().amax(-1, keepdim=True) / 448
        world.rows[row] = ids, (states / scale).to(torch.float8_e4m3fn).to(torch.bfloat16) * scale
    found = world.check(stored_dtype=torch.float8_e4m3fn).check(world.tokens, world.captured())
    assert found["agree"] >= 0.98 * found["picks"]


def test_a_wrong_last_layer_is_named(tmp_path: Path) -> None:
    said = World(tmp_path, "llama").refusal([1, 3, 4, 5])
    assert "the target's norm and head reproduce" in said.message
    assert said.message.endswith("they are of other layers: 5 instead of 6")


def test_wrong_layers_are_named_though_the_last_one_is_right(tmp_path: Path) -> None:
    said = World(tmp_path, "llama").refusal([0, 2, 3, 6])
    assert said.message == (
        "the target's norm and head reproduce the server's greedy tokens, but they are of other layers: "
        "0 instead of 1, 2 instead of 3, 3 instead of 4"
    )
    assert "force=[extract]" in said.hint


def test_layers_in_another_order_are_named_without_a_reference(tmp_path: Path) -> None:
    said = World(tmp_path, "llama").refusal([6, 1, 3, 4], max_reference_gib=0.0)
    assert "the last layer's output is captured at index 0, where the input of layer 1 belongs" in said.message


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_states_that_are_normed_already_are_named(tmp_path: Path, family: str) -> None:
    world = World(tmp_path, family)
    norm = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm
    with torch.no_grad():
        for _, states in world.rows.values():
            states[:, -1] = norm(states[:, -1])
    assert "the hidden states are normed already" in world.refusal().message


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_gemma_norm_read_as_a_plain_one_is_named(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "UNIT_OFFSET_NORMS", frozenset())
    said = World(tmp_path, family).refusal()
    assert "multiplies by 1 + weight, as Gemma's does, and is computed with weight" in said.message
    assert f"`{family.replace('3', '3_text')}`" in said.hint


def test_a_plain_norm_read_as_a_gemma_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "UNIT_OFFSET_NORMS", frozenset({"llama"}))
    assert "multiplies by weight, and is computed with 1 + weight" in World(tmp_path, "llama").refusal().message


def test_a_tied_head_that_the_config_denies_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, "qwen3_tied")
    world.tell(tie_word_embeddings=False)
    said = world.refusal()
    assert "config.json says that the head is not tied to the embeddings, and it is" in said.message
    assert "`tie_word_embeddings` to true" in said.hint


def test_a_head_of_its_own_that_the_config_denies_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    world.tell(tie_word_embeddings=True)
    assert "says that the head is tied to the embeddings, and it is not" in world.refusal().message


def test_a_tied_head_is_found_where_nothing_is_said(tmp_path: Path) -> None:
    world = World(tmp_path, "qwen3_tied")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert world.check(max_reference_gib=0.0).check(world.tokens, world.captured())["agree"] == len(world.tokens)


@pytest.mark.parametrize("change", [0.3, 3.0])
def test_another_revision_of_the_weights_is_named(tmp_path: Path, change: float) -> None:
    world = World(tmp_path, "llama")

    def train_on(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers" in name:
                tensors[name] += change * tensors[name].std() * torch.randn_like(tensors[name])

    world.change(train_on)
    assert "they come from other weights: they differ from every layer of this target" in world.refusal().message


def test_another_head_is_told_by_its_tokens_alone(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    world.change(lambda tensors: tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].flip(0)))
    said = world.refusal(max_reference_gib=0.0)
    assert "no reading of norm and head agrees (the target has" in said.message
    assert "target.max_reference_gib=N" in said.hint


def test_logits_that_are_not_bounded_are_named(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    world.tell(final_logit_softcapping=1.0)
    said = world.refusal()
    assert "reproduce the server's greedy tokens, but their log-probabilities are off by" in said.message
    assert "the server has no softcap, the config has" in said.message


def test_a_bound_of_another_height_is_no_other_reading_but_is_caught(tmp_path: Path) -> None:
    world = World(tmp_path, "gemma2")
    world.tell(final_logit_softcapping=0.5)
    assert "their log-probabilities are off by" in world.refusal().message


def test_logits_that_are_scaled_otherwise_are_named(tmp_path: Path) -> None:
    world = World(tmp_path, "granite")
    world.tell(model_type="hyperclovax")  # which multiplies where Granite divides
    assert "the server multiplies its logits by 0.125, the checkpoint is read with 8" in world.refusal().message


def test_what_the_check_may_not_judge_passes(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    assert world.check(min_agreement=0.0).check(world.tokens, world.captured([0, 1, 2, 3])) == {"picks": 0}
    assert world.check().check([], world.captured([0, 1, 2, 3])) == {"picks": 0}


def test_states_that_came_without_greedy_tokens_are_compared_with_their_layers(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    assert world.check().check_layers(map(world.captured(), world.rows))["states_off"] < 1e-3
    with pytest.raises(ContractError, match="not the target's: they are of other layers: 2 instead of 3"):
        world.check().check_layers(map(world.captured([1, 2, 4, 6]), world.rows))
    assert world.check(min_agreement=0.0).check_layers([]) == {"picks": 0}


@pytest.mark.parametrize("kept", [[5, 16, 23], []])
def test_a_last_layer_that_is_kept_at_few_places_is_judged_there(tmp_path: Path, kept: list[int]) -> None:
    world = World(tmp_path, "llama")
    for _, states in world.rows.values():
        states[[place for place in range(24) if place not in kept], -1] = torch.nan
    if kept:
        assert world.check().check(world.tokens, world.captured())["agree"] == len(world.tokens)
        assert world.refusal([0, 2, 3, 6]).message.endswith("0 instead of 1, 2 instead of 3, 3 instead of 4")
    assert world.check().check_layers(map(world.captured(), world.rows))["states_off"] < 1e-3
    with pytest.raises(ContractError, match="not the target's: they are of other layers: 2 instead of 3"):
        world.check().check_layers(map(world.captured([1, 2, 4, 6]), world.rows))


def test_a_checkpoint_that_lacks_layers_is_no_reference(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    world.change(lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    found = world.check().check(world.tokens, world.captured())
    assert (found["agree"], found["states_off"]) == (len(world.tokens), None)


def test_a_tie_within_rounding_is_no_mismatch_and_a_clear_one_is(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")

    def duplicate(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["lm_head.weight"]
        head[[p.token for p in world.tokens[:1]]] *= 1 - 1e-7

    world.change(duplicate)
    assert world.check(max_reference_gib=0.0).check(world.tokens, world.captured())["agree"] == len(world.tokens)
    wrong = [p._replace(token=(p.token + 1) % 96, logprob=None) for p in world.tokens[:2]]
    with pytest.raises(ContractError, match=f"reproduce {len(world.tokens) - 2} of {len(world.tokens)} greedy"):
        world.check().check([*wrong, *world.tokens[2:]], world.captured())


def test_an_extraction_that_goes_wrong_ends_with_its_first_rows_and_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "target", "llama")
    for layer_ids, passes in ((CAPTURED, True), ([1, 3, 4, 5], False)):
        output = tmp_path / f"output-{passes}"
        output.mkdir()
        write_greedy_tokens(output, [p for p in world.tokens if p.position == 16])
        check = EarlyFidelityCheck(world.check(), read_greedy_tokens(output), output)
        states = world.captured(layer_ids)
        check.skip(2)
        for row in (r for r in range(FIRST_ROWS - 1) if r != 2):
            check.add(row, *states(row))
        assert not check.result
        if passes:
            check.add(FIRST_ROWS - 1, *states(FIRST_ROWS - 1))
            assert check.result["picks"] == FIRST_ROWS - 1
        else:
            with pytest.raises(ContractError, match="5 instead of 6"):
                check.add(FIRST_ROWS - 1, *states(FIRST_ROWS - 1))
        assert (output / GREEDY_TOKENS_FILE).exists() == passes


def test_places_are_the_same_every_time_in_the_first_rows_and_over_the_whole_table() -> None:
    found = sample_positions([200] * 1000)
    assert found == sample_positions([200] * 1000)
    rows = [row for row, _ in found]
    assert rows[:FIRST_ROWS] == list(range(FIRST_ROWS))
    assert max(rows) > 900
    assert len(rows) <= fidelity_check.SAMPLED_ROWS
    assert all(fidelity_check.MIN_TOKENS <= position + 1 <= fidelity_check.MAX_TOKENS for _, position in found)
    assert len({position for _, position in found}) > 10
    assert sample_positions([3, 0, 1]) == [(0, 2), (2, 0)]
    assert sample_positions([]) == []


def test_an_answers_picks_are_its_likeliest_tokens_not_those_it_drew(tmp_path: Path) -> None:
    logprobs = [{token: -2.0, token + 10: -0.5} for token in range(8)]
    said = Completion(
        prompt_ids=[1], token_ids=list(range(8)), text="", finish_reason="stop", logprobs=logprobs,
        kv_transfer_params={}, seconds=0.0,
    )  # fmt: skip
    assert greedy_tokens_in_answer(said) == [(0, 10, -0.5), (2, 12, -0.5), (4, 14, -0.5), (6, 16, -0.5)]
    picks = [GreedyToken(3, place, token, logprob) for place, token, logprob in greedy_tokens_in_answer(said)]
    write_greedy_tokens(tmp_path, picks[::-1])
    assert read_greedy_tokens(tmp_path) == picks
    assert read_greedy_tokens(tmp_path / "nowhere") == []
