"""`recipe=gemma4_dflash` on a random and tiny Gemma 4: it plans, its parts are found, a draft learns from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "drafts"))

import tiny

from speculators.config import compose
from speculators.config.algorithms import DFlash, Loss
from speculators.config.schema import Train
from speculators.drafts.base import TrainState, Vocabulary
from speculators.drafts.dflash import DFlashDraft
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch
from speculators.ops.distillation import TargetHead
from speculators.runner.planning.plan import Planner, State
from speculators.runner.store.artifacts import Store
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.training.losses import distill
from speculators.training.optim import Optimizers

V, DEPTH, MASK = 64, 8, 4


def write_tokenizer(directory: Path, size: int, **special: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"word{i}" for i in range(size - 5))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The checkpoint's directory, and the model."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    config = Gemma4TextConfig(
        vocab_size=V, vocab_size_per_layer_input=V, hidden_size=32, hidden_size_per_layer_input=0, intermediate_size=48,
        num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16,
        max_position_embeddings=256, sliding_window=16, layer_types=kinds, final_logit_softcapping=5.0,
        initializer_range=0.2,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config).eval()
    with torch.no_grad():  # a weight of ones would not show whether the norm multiplies by it or by one more
        model.model.norm.weight.uniform_(0.5, 1.5)
    directory = tmp_path_factory.mktemp("gemma4")
    model.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    write_tokenizer(directory, V, mask_token="<mask>", pad_token="<pad>", eos_token="<eos>")
    return directory, model


def states_of(model: Any, tokens: torch.Tensor, layer_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters each layer and, last, the final norm [T, L + 1, H]; and the model's logits [T, V]."""
    last: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0][0]))
    with torch.no_grad():
        out = model(tokens[None], output_hidden_states=True)
    handle.remove()
    return torch.stack([*(out.hidden_states[i][0] for i in layer_ids), last[0]], dim=1), out.logits[0]


def test_the_recipe_plans_with_layers_spread_over_the_targets_depth(gemma: tuple[Path, Any], store: Store) -> None:
    shape = [f"target.{name}=null" for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    short = ["max_seq_len=128", "regenerate.max_tokens=64", "evaluate.max_tokens=64", "vocab.size=null"]
    config = compose.compose(["recipe=gemma4_dflash", f"target.source={gemma[0]}", *short, *shape])
    planner = Planner(config, store)
    assert planner.derived["layer_ids"] == [2, 3, 4, 5, 6]
    assert planner.derived["capture_layer_ids"] == [2, 3, 4, 5, 6, DEPTH]
    states = {step.node.name: step.state for step in planner.plan()}
    assert states["target"] is State.cached
    assert states["train"] is State.waits


def test_a_draft_of_the_recipe_learns_from_its_states(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = gemma
    target, ids = TargetCheckpoint(directory), [2, 4, 6]
    full = Vocabulary(d2t=torch.zeros(V, dtype=torch.int64), t2d=torch.ones(V, dtype=torch.bool))
    parts = target.parts()
    options = DFlash(num_layers=2, block_size=4, mask_token_id=target.mask_token_id())
    draft = DFlashDraft.from_target(parts, options, full, ids, seed=1)
    assert draft.mask_token_id == MASK
    norm = target.final_norm()
    teacher = TargetHead(
        norm_weight=norm.weight, norm_eps=norm.eps, head=draft.lm_head.weight, softcap=target.logit_softcap
    )
    tokens = torch.randint(V, (40,), generator=torch.Generator().manual_seed(2))
    states, logits = states_of(model, tokens, ids)
    torch.testing.assert_close(teacher.logits(states[:, -1], torch.float32), logits, atol=1e-4, rtol=1e-4)

    pack = PackedBatch(
        rows=[0],
        lengths=[40],
        token_ids=tokens,
        loss_mask=torch.arange(40) > 9,
        hidden_states=states[:, :-1],
        last_hidden_states=states[:, -1],
        last_index=torch.arange(40),
    )
    optimizers = Optimizers(draft, Train(lr=1e-2))
    losses = []
    for step in range(30):
        outcome = distill(
            draft(pack, TrainState(step=step, total_steps=30, seed=1)),
            pack.last_hidden_states,
            draft.lm_head.weight,
            teacher,
            {Loss.ce: 1.0},
        )
        outcome.loss.backward()
        optimizers.step(1.0)
        losses.append(outcome.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    draft.save(tmp_path, torch.bfloat16)
    assert DFlashDraft.from_checkpoint(tmp_path, parts.embeddings, parts.head).mask_token_id == MASK


@pytest.mark.parametrize(
    ("size", "special", "found"),
    [
        (V, {"mask_token": "<mask>", "pad_token": "<pad>"}, 4),
        (V - 6, {"pad_token": "<pad>"}, V - 6),
        (V, {"pad_token": "<pad>", "eos_token": "<eos>"}, 0),
        (V, {"eos_token": "<eos>"}, 1),
        (V, {"mask_token": "<added>", "pad_token": "<pad>"}, 0),
    ],
    ids=["its own", "an unused row", "padding", "the end", "its own comes after the embeddings"],
)
def test_a_mask_token_is_found(tmp_path: Path, size: int, special: dict[str, str], found: int) -> None:
    directory = tiny.write_target(tmp_path, vocab_size=V)
    write_tokenizer(directory, size, **special)
    assert TargetCheckpoint(directory).mask_token_id() == found


def test_a_tokenizer_with_nothing_to_mask_with_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    directory = tiny.write_target(tmp_path, vocab_size=V)
    write_tokenizer(directory, V)
    with pytest.raises(ContractError, match="no token for masks"):
        TargetCheckpoint(directory).mask_token_id()
