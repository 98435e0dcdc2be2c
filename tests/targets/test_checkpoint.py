"""Reading a target's checkpoint: tied and untied heads, shards, nested configs, kinds of norms, what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from speculators.errors import ContractError, SourceError
from speculators.targets import checkpoint
from speculators.targets.checkpoint import TargetCheckpoint, rope_parameters

H, V = 16, 24
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
}


def weights(prefix: str = "model.", head: str | None = "lm_head.weight") -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{prefix}embed_tokens.weight": torch.randn(V, H, generator=draw),
        f"{prefix}norm.weight": torch.randn(H, generator=draw),
        f"{prefix}layers.0.input_layernorm.weight": torch.randn(H, generator=draw),
    }
    if head:
        tensors[head] = torch.randn(V, H, generator=draw)
    return tensors


def write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TargetCheckpoint:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return TargetCheckpoint(directory)


def test_an_untied_head_is_read_by_rows(tmp_path: Path) -> None:
    tensors = weights()
    target = write(tmp_path, {**CONFIG, "tie_word_embeddings": False}, tensors)
    rows = torch.tensor([3, 5, 20])
    assert torch.equal(target.head(rows), tensors["lm_head.weight"][rows])
    assert torch.equal(target.embeddings(), tensors["model.embed_tokens.weight"])
    assert (target.hidden_size, target.vocab_size, target.parts().name) == (H, V, str(tmp_path))
    assert target.parts(name="org/model").name == "org/model"


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    target = write(tmp_path, {**CONFIG, "tie_word_embeddings": True}, weights(head=None))
    assert torch.equal(target.head(), target.embeddings())


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    tensors = weights()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    names = sorted(tensors)
    for number, name in enumerate(names):
        save_file({name: tensors[name]}, tmp_path / f"part-{number}.safetensors")
    index = {"weight_map": {name: f"part-{number}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(TargetCheckpoint(tmp_path).head(), tensors["lm_head.weight"])


def test_the_text_model_inside_a_multimodal_one_is_found(tmp_path: Path) -> None:
    text = {**{k: v for k, v in CONFIG.items() if k != "architectures"}, "model_type": "gemma3_text", "head_dim": 8}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    tensors = weights("model.language_model.", head=None)
    target = write(tmp_path, config, tensors)
    assert target.hidden_size == H
    assert torch.equal(target.head(), tensors["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize(("kind", "offset"), [("llama", 0.0), ("qwen3", 0.0), ("gemma2", 1.0)])
def test_the_final_norm_is_what_is_multiplied_by(tmp_path: Path, kind: str, offset: float) -> None:
    tensors = weights()
    norm = write(tmp_path, {**CONFIG, "model_type": kind, "head_dim": 8}, tensors).final_norm()
    torch.testing.assert_close(norm.weight, tensors["model.norm.weight"] + offset)
    assert norm.eps == 1e-5


def test_bounded_and_scaled_logits_are_known(tmp_path: Path) -> None:
    bounded = write(tmp_path / "a", {**CONFIG, "model_type": "gemma2", "final_logit_softcapping": 30.0}, weights())
    scaled = write(tmp_path / "b", {**CONFIG, "model_type": "granite", "logits_scaling": 8.0}, weights())
    assert (bounded.logit_softcap, bounded.logit_scale) == (30.0, 1.0)
    assert (scaled.logit_softcap, scaled.logit_scale) == (None, 0.125)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"model_type": "cohere", "logit_scale": 0.25}, 0.25),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5),
        ({"model_type": "hyperclovax", "logits_scaling": 4.0}, 4.0),
        ({"model_type": "granite", "logits_scaling": 4.0}, 0.25),
    ],
)
def test_every_family_has_its_own_name_for_the_scale(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    assert write(tmp_path, {**CONFIG, **config}, weights()).logit_scale == scale


def test_a_layer_norm_without_a_bias_is_refused(tmp_path: Path) -> None:
    target = write(tmp_path, {**CONFIG, "model_type": "cohere"}, weights())
    with pytest.raises(ContractError, match="subtracts the mean"):
        target.final_norm()


def test_every_family_of_transformers_that_multiplies_by_one_and_the_weight_is_known() -> None:
    """Of those whose final norm is such a one, and which are decoders that are served as text models."""
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for path in models.glob("*/modeling_*.py"):
        text = path.read_text()
        kinds = re.findall(
            r"class (\w+Norm)\(nn\.Module\):(?:(?!\nclass ).)*?\(1(?:\.0)? \+ self\.weight", text, re.DOTALL
        )
        if any(re.search(rf"self\.norm = {kind}\(", text) for kind in kinds):
            found.add(path.parent.name)
    assert {name for name in found if not name.startswith(("t5gemma", "videoprism"))} <= checkpoint.UNIT_OFFSET_NORMS


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("lm_head.weight", "no output head"),
        ("model.norm.weight", "no final norm"),
        ("model.embed_tokens.weight", "no input embeddings"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, drop: str, message: str) -> None:
    tensors = weights()
    del tensors[drop]
    target = write(tmp_path, {**CONFIG, "tie_word_embeddings": False}, tensors)
    with pytest.raises(ContractError, match=message):
        target.head(), target.final_norm(), target.embeddings()


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    target = write(tmp_path, {**CONFIG, "vocab_size": V + 1, "tie_word_embeddings": False}, weights())
    with pytest.raises(ContractError, match=rf"\[{V}, {H}\], config.json says \[{V + 1}, {H}\]"):
        target.head()


def test_a_final_norm_with_a_bias_is_refused(tmp_path: Path) -> None:
    target = write(tmp_path, CONFIG, {**weights(), "model.norm.bias": torch.zeros(H)})
    with pytest.raises(ContractError, match="LayerNorm"):
        target.final_norm()


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        TargetCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceError, match="no safetensors"):
        TargetCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "no_such_model"}))
    with pytest.raises(SourceError, match="transformers cannot read"):
        TargetCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
                }
            },
            {"rope_type": "default", "rope_theta": 1e6},
        ),
    ],
    ids=["flat", "linear", "by layer type"],
)
def test_rotary_parameters_are_those_of_full_attention(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rope_parameters(config) == expected
