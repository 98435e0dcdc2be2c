"""What is known of a target from its files alone, whatever its architecture calls things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.checkpoint_files import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    common_names,
    find_tensor,
    layer_norm,
    stated_tying,
    tensor_shapes,
    text_config,
)
from speculators.errors import SourceError
from tests.conftest import write_header

SHAPE = {"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 32}


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 32},
        {"n_layer": 3, "n_embd": 8, "vocab_size": 32},  # GPT-2
        {"n_layers": 3, "d_model": 8, "vocab_size": 32},  # MPT, DBRX
        {"num_layers": 3, "hidden_size": 8, "padded_vocab_size": 32},  # ChatGLM
        {"layers_block_type": ["mamba", "attention", "mamba"], "hidden_size": 8, "vocab_size": 32},  # NemotronH
        {"hybrid_override_pattern": "M*-", "hidden_size": 8, "vocab_size": 32},
        {"text_config": SHAPE, "vision_config": {"hidden_size": 1}},
        {"llm_config": SHAPE, "hidden_size": 1},  # InternVL
        {"thinker_config": {"text_config": SHAPE}},  # Qwen Omni
    ],
    ids=lambda config: "-".join(config),
)
def test_every_family_has_names_of_its_own_for_its_shape(config: dict[str, Any]) -> None:
    text = common_names(text_config(config))
    assert {name: text[name] for name in SHAPE} == SHAPE


def test_a_name_that_is_there_counts_before_other_names() -> None:
    text = common_names({"num_hidden_layers": 3, "layers_block_type": ["mamba"], "hidden_size": 8, "d_model": 9})
    assert (text["num_hidden_layers"], text["hidden_size"]) == (3, 8)
    assert common_names({"layer_norm_epsilon": 1e-5})["rms_norm_eps"] == 1e-5
    assert common_names({"num_kv_heads": 2})["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), (0, 1, 2)),
        (("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"), (0, 1, 2)),
        (("language_model.model.embed_tokens.weight", "language_model.model.norm.weight"), (0, 1, None)),
        (("transformer.wte.weight", "transformer.ln_f.weight"), (0, 1, None)),
        (("model.embed_tokens.weight", "model.embedding_norm.weight"), (0, 1, None)),  # LFM2
        (("model.layers.0.mlp.weight",), (None, None, None)),
    ],
)
def test_embeddings_norm_and_head_are_found_by_their_names(
    names: tuple[str, ...], found: tuple[int | None, ...]
) -> None:
    expected = [None if index is None else names[index] for index in found]
    assert [find_tensor(names, candidates) for candidates in (EMBEDDINGS, FINAL_NORM, HEAD)] == expected


def test_a_layer_norm_is_told_by_its_bias_or_its_family() -> None:
    assert layer_norm("gpt2", "transformer.ln_f.weight", {"transformer.ln_f.bias"}) == "has a bias"
    assert layer_norm("mpt", "transformer.norm_f.weight", set()) == "subtracts the mean"
    assert layer_norm("llama", "model.norm.weight", {"model.layers.0.norm.bias"}) == ""


def test_the_text_config_counts_before_the_multimodal_one() -> None:
    assert stated_tying({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}) is False
    assert stated_tying({"text_config": {"hidden_size": 8}}) is None


def test_shapes_are_read_from_all_files_of_an_index(tmp_path: Path) -> None:
    write_header(tmp_path / "a.safetensors", vocab=32, hidden=8)
    index: dict[str, Any] = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert tensor_shapes(tmp_path) == {"model.embed_tokens.weight": [32, 8], "model.norm.weight": [8]}
    index["weight_map"]["lm_head.weight"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"a\.safetensors lacks lm_head\.weight"):
        tensor_shapes(tmp_path)
    path.write_text("[]")
    with pytest.raises(SourceError, match="is no index"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize("content", [b"weights", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="is no safetensors file"):
        tensor_shapes(tmp_path)


def test_a_file_that_was_cut_is_one_error(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    with pytest.raises(SourceError, match=r"bytes of \d+"):
        tensor_shapes(tmp_path)
