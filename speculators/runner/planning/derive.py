"""Derived values: computed from the recipe and the target's config.json, and shown by `plan`.

While neither the recipe nor a fetched checkpoint gives the target's shape, derived values are unknown, and stages that
need them wait for the target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint_files import text_config
from speculators.config.choices import LastLayerPositions
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Shape of the target, from its config.json or from the recipe."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    heads: int | None = None
    """Query heads, and key and value heads; None without a checkpoint."""
    key_value_heads: int | None = None
    positions: int | None = None
    """Longest sequence of the target, in tokens; None if unknown, or extended by rotary scaling."""
    head_dim: int | None = None
    """Width of a head, and width inside the MLPs; None without a checkpoint."""
    intermediate_size: int | None = None
    sliding_window: int | None = None
    """Tokens that the attention of `windowed_layers` layers reaches back."""
    windowed_layers: int = 0


def facts(config: Config, checkpoint: Path | None) -> Facts | None:
    """Shape of the target; None if the recipe lacks a value and there is no checkpoint yet.

    Raises:
        ContractError: recipe and checkpoint disagree, or config.json lacks a value.
    """
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    expected = {name: getattr(config.target, name) for name in names}
    if checkpoint is None:
        return None if None in expected.values() else Facts(**expected)
    path = checkpoint / "config.json"
    try:
        text = text_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ContractError(
            f"target.source: {path} is not a JSON object ({error})", "fetch or save the target again"
        ) from None
    for name in names:
        if not isinstance(text.get(name), int):
            raise ContractError(
                f"target.source={config.target.source}: its config.json has no {name}",
                "name a language model in the format of transformers: target.source=DIRECTORY or hub:ID@REVISION",
            )
    actual = {name: text[name] for name in names}
    for name in names:
        if expected[name] is not None and expected[name] != actual[name]:
            raise ContractError(
                f"target.{name} is {expected[name]} in the recipe and {actual[name]} in the checkpoint's config.json",
                f"set target.{name}={actual[name]}, or target.{name}=null to read it from there",
            )
    heads = text.get("num_attention_heads")
    groups = text.get("num_key_value_heads") or heads
    return Facts(
        **actual,
        heads=heads,
        key_value_heads=groups,
        positions=_positions(text),
        head_dim=text.get("head_dim") or (text["hidden_size"] // heads if heads else None),
        intermediate_size=text.get("intermediate_size"),
        sliding_window=text.get("sliding_window"),
        windowed_layers=(text.get("layer_types") or []).count("sliding_attention"),
    )


def _positions(text: Mapping[str, Any]) -> int | None:
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    positions = text.get("max_position_embeddings")
    return positions if isinstance(positions, int) and "factor" not in json.dumps(scaling) else None


def derive(config: Config, known: Facts) -> dict[str, Any]:
    """Compute all derived values, by name.

    `layer_ids`: target layers whose *input* the draft reads. `capture_layer_ids`: the same, followed by the target's
    depth, for the last layer's output before the final norm, from which training computes the target's logits.
    `last_state`: positions whose last-layer hidden state is stored.

    Raises:
        RecipeError: an option does not fit the target.
    """
    depth = known.num_hidden_layers
    layer_ids = config.speculator.target_layer_ids or config.speculator.default_target_layer_ids(depth)
    outside = [i for i in layer_ids if not 0 <= i <= depth]
    if outside or sorted(set(layer_ids)) != list(layer_ids):
        raise RecipeError(
            f"speculator.target_layer_ids={layer_ids}: must be ascending ids from 0 to {depth}, the target's layers",
            f"speculator.target_layer_ids=null, for {config.speculator.default_target_layer_ids(depth)}",
        )
    size = config.vocab.size
    if size is not None and not 0 < size <= known.vocab_size:
        raise RecipeError(
            f"vocab.size={size}: must be at most {known.vocab_size}, the target's vocabulary",
            "vocab.size=null, for the target's vocabulary",
        )
    mask = getattr(config.speculator, "mask_token_id", None)
    if mask is not None and mask >= known.vocab_size:
        raise RecipeError(
            f"speculator.mask_token_id={mask}: must be below {known.vocab_size}, the target's vocabulary",
            "speculator.mask_token_id=null, which selects a token",
        )
    heads = config.speculator.num_attention_heads or known.heads
    groups = config.speculator.num_key_value_heads or known.key_value_heads
    if heads is not None and groups is not None and heads % groups:
        raise RecipeError(
            f"speculator.num_attention_heads={heads}: must be a multiple of speculator.num_key_value_heads={groups}",
            f"set both to null, for the target's {known.heads} and {known.key_value_heads}",
        )
    captured, last = [*layer_ids, depth], config.extract.last_state
    if last is LastLayerPositions.auto:
        last = LastLayerPositions.everywhere if config.train.train_on_prompts else LastLayerPositions.answers
    elif last is LastLayerPositions.answers and config.train.train_on_prompts:
        raise RecipeError(
            "extract.last_state=answers: train.train_on_prompts needs last-layer hidden states at every position",
            "extract.last_state=auto, or train.train_on_prompts=false",
        )
    return {
        "layer_ids": list(layer_ids),
        "capture_layer_ids": captured,
        "last_state": last.name,
    }


def max_model_len(config: Config, known: Facts | None) -> int:
    """Longest sequence for which a server is started, in tokens: a row and an answer of evaluation, within the target's
    positions."""
    longest = config.max_seq_len + config.evaluate.max_tokens
    return longest if known is None or known.positions is None else min(longest, known.positions)


def feature_bytes_per_token(config: Config, known: Facts) -> int:
    """Largest size of the stored hidden states of a token, in bytes: with its last-layer hidden state."""
    width, scale = {"float32": (4, 0), "float8_e4m3fn": (1, 2)}.get(config.extract.dtype.name, (2, 0))
    return len(derive(config, known)["capture_layer_ids"]) * (known.hidden_size * width + scale)
