"""Files of a Hugging Face checkpoint directory, read without torch: config.json, names and shapes of tensors.

Architectures name the same things differently: `common_names` gives the fields of config.json their most common names,
and `find_tensor` knows the names of the tensors that a draft needs of its target.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from speculators.errors import SourceError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files that contain a vocabulary; a checkpoint with a tokenizer has at least one of them."""

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Fields of a multimodal config.json that contain the language model's."""

FIELDS = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "vocab_size": ("padded_vocab_size",),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length"),
    "rms_norm_eps": (
        *("norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "rms_norm_epsilon", "norm_epsilon"),
        "eps",
    ),
}
"""Other names of fields in config.json, by the most common one."""
LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types")
"""Fields with an item for each layer, for a config.json that gives no number of layers."""

PREFIXES = (
    *("", "model.", "model.language_model.", "language_model.model.", "language_model.", "transformer."),
    *("backbone.", "language_model.backbone.", "gpt_neox.", "model.decoder.", "model.text_model."),
    *("thinker.model.", "thinker."),
)
"""Prefixes of tensor names, of a text model alone or inside a multimodal one; tried in this order."""
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "embeddings.weight", "embedding.weight"),
    *("word_embeddings.weight", "embed_in.weight", "embedding.word_embeddings.weight"),
)
FINAL_NORM = (
    *("norm.weight", "final_layernorm.weight", "norm_f.weight", "ln_f.weight", "final_norm.weight", "out_norm.weight"),
    *("embedding_norm.weight", "final_layer_norm.weight", "encoder.final_layernorm.weight"),
)
HEAD = ("lm_head.weight", "output.weight", "embed_out.weight", "output_layer.weight")
LAYER_NORMS = ("cohere", "mpt", "dbrx")
"""Prefixes of the model types whose final norm is a LayerNorm without a bias, which no tensor shows."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: one of `TEXT_CONFIGS` of a multimodal model, else all of it."""
    for name in TEXT_CONFIGS:
        nested = config.get(name)
        if isinstance(nested, Mapping) and nested:
            return text_config(nested)
    return config


def common_names(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text config with the most common names of its fields in addition to its own."""
    common = {
        name: next(text[other] for other in others if text.get(other) is not None)
        for name, others in FIELDS.items()
        if text.get(name) is None and any(text.get(other) is not None for other in others)
    }
    if "num_hidden_layers" not in {**text, **common}:
        lists = [len(text[name]) for name in LAYER_LISTS if isinstance(text.get(name), str | list)]
        common |= {"num_hidden_layers": lists[0]} if lists else {}
    return {**text, **common}


def find_tensor(names: Collection[str], candidates: Collection[str]) -> str | None:
    """The first of the `candidates` that is among a checkpoint's tensors under one of the prefixes; None if none is."""
    present = (prefix + name for name in candidates for prefix in PREFIXES if prefix + name in names)
    return next(present, None)


def layer_norm(model_type: str, final_norm: str, names: Collection[str]) -> str:
    """Why the final norm is a LayerNorm and not an RMSNorm; empty if it is none."""
    if model_type.startswith(LAYER_NORMS):
        return "subtracts the mean"
    return "has a bias" if final_norm.removesuffix("weight") + "bias" in names else ""


def stated_tying(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json says that the head is the embeddings; the text config counts before the multimodal one."""
    parts = (text_config(config), config)
    stated = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
    return bool(stated[0]) if stated else None


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in a checkpoint's safetensors files, by name; reads the files' headers only.

    Raises:
        SourceError: a file is damaged, or lacks a tensor that the index lists in it.
    """
    index = _index(directory)
    files = sorted(set(index.values())) or sorted(path.name for path in directory.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    for file in files:
        header = read_header(directory / file)
        if missing := [name for name, listed in index.items() if listed == file and name not in header]:
            raise SourceError(
                f"{directory / file} lacks {missing[0]}, which the index lists in it", "fetch or save it again"
            )
        shapes |= {name: tensor["shape"] for name, tensor in header.items()}
    return shapes


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and offsets of each tensor in a safetensors file: 8 bytes with the length of the JSON, then the JSON.

    Raises:
        SourceError: it is no such file, or was cut.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise SourceError(f"{path} is no safetensors file ({error})", "fetch or save it again") from None
    if size < expected:
        raise SourceError(f"{path} has {size} bytes of {expected}", "fetch or save it again")
    return header


def check_checkpoint(directory: Path, option: str = "", draft: bool = False) -> None:
    """Check that a directory has a configuration, all weights in safetensors and, unless it is a `draft`, a tokenizer.

    `option` is the recipe's option that names the directory, for messages.

    Raises:
        SourceError: one of them is missing.
    """
    name = f"{option}: `{directory}`" if option else str(directory)
    if not (directory / "config.json").is_file():
        inner = next(iter(sorted(directory.glob("*best/config.json"))), None) if draft else None
        hint = f"{option}={inner.parent}" if inner else "name the directory of a Hugging Face checkpoint"
        raise SourceError(f"{name} has no config.json", hint)
    if not any(directory.glob("*.safetensors")):
        raise SourceError(
            f"{name} has no *.safetensors", "save the weights with `save_pretrained`; pickled weights are not loaded"
        )
    if missing := sorted(file for file in set(_index(directory).values()) if not (directory / file).is_file()):
        raise SourceError(f"{name} lacks {', '.join(missing)}, which its index lists", "fetch or save it again")
    if not draft and not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise SourceError(
            f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)})",
            "save the tokenizer next to the weights: AutoTokenizer.from_pretrained(ID).save_pretrained(DIRECTORY)",
        )


def _index(directory: Path) -> dict[str, str]:
    """File names by tensor, from the index of a checkpoint in several files; empty for one without an index."""
    index = directory / "model.safetensors.index.json"
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else None
        if files is not None and not (files and all(isinstance(file, str) for file in files.values())):
            raise ValueError("its weight_map names no files")
    except (ValueError, LookupError, TypeError) as error:
        raise SourceError(f"{index} is no index of safetensors files ({error})", "fetch or save it again") from None
    return files or {}
