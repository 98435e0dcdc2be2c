"""Files of a Hugging Face checkpoint directory: whether it is complete, and the text part of its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.errors import SourceError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files that contain a vocabulary; a checkpoint with a tokenizer has at least one of them."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: `text_config` of a multimodal model, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and nested else config


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
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(file for file in listed if not (directory / file).is_file()):
            raise SourceError(f"{name} lacks {', '.join(missing)}, which its index lists", "fetch or save it again")
    if not draft and not any((directory / file).is_file() for file in TOKENIZER_FILES):
        raise SourceError(
            f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)})",
            "save the tokenizer next to the weights: AutoTokenizer.from_pretrained(ID).save_pretrained(DIRECTORY)",
        )
