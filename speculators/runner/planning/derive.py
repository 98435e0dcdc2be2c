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

from speculators.checkpoint_files import common_names, text_config
from speculators.config.choices import LastLayerPositions
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError

POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
"""Fields of config.json that limit the length of a sequence."""
SCALED_BEFORE = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary scaling with which these fields hold the extended length; with other kinds it is `factor` times
theirs."""


SIZES = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings"),
)
"""Fields of a config.json that are positive integers, or lists of them by layer, where they are present."""


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
    """Longest sequence of the target, in tokens; None if unknown."""
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
        text = common_names(text_config(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ContractError(
            f"target.source: {path} is not a JSON object ({error})", "fetch or save the target again"
        ) from None
    for name in SIZES:
        size = text.get(name)
        if not isinstance(size, list | None) and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ContractError(
                f"target.source={config.target.source}: its config.json has {name}={size!r}, which must be positive",
                "fetch or save the target again",
            )
    actual = {name: text[name] if isinstance(text.get(name), int) else expected[name] for name in names}
    for name, value in actual.items():
        if value is None:
            raise ContractError(
                f"target.source={config.target.source}: its config.json has no {name}",
                "name a language model in the format of transformers, target.source=DIRECTORY or ORG/NAME; or give the "
                f"number that its architecture has: target.{name}=NUMBER",
            )
    differing = [name for name in names if expected[name] not in (None, actual[name])]
    if differing:
        name = differing[0]
        raise ContractError(
            f"target.{name} is {expected[name]} in the recipe and {actual[name]} in the checkpoint's config.json",
            f"{' '.join(f'target.{other}=null' for other in differing)}, to read it from there",
        )
    heads = text.get("num_attention_heads")
    groups = text.get("num_key_value_heads") or heads
    return Facts(
        **actual,
        heads=heads,
        key_value_heads=groups,
        positions=_positions(text),
        head_dim=text.get("head_dim") or (actual["hidden_size"] // heads if heads else None),
        intermediate_size=text.get("intermediate_size"),
        sliding_window=text.get("sliding_window"),
        windowed_layers=(text.get("layer_types") or []).count("sliding_attention"),
    )


def _positions(text: Mapping[str, Any]) -> int | None:
    """Longest sequence that vLLM serves, in tokens, computed as there; None if nothing limits it."""
    limits = [text[name] for name in POSITIONS if isinstance(text.get(name), int)]
    if not limits:
        return None
    positions = text["model_max_length"] if isinstance(text.get("model_max_length"), int) else min(limits)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scalings = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]
    factors = [s.get("factor") for s in scalings if s.get("rope_type", s.get("type")) not in SCALED_BEFORE]
    factor = next((factor for factor in factors if isinstance(factor, int | float)), 1.0)
    return positions if "gemma3" in str(text.get("model_type")) else int(positions * factor)


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


def default_length(config: Config, known: Facts) -> int:
    """`max_seq_len`, or if it has its default one less than the target's positions, where answers fit into that.

    One less, because a server that extracts a row generates a token after it.
    """
    positions = known.positions
    if positions is None or config.max_seq_len != Config().max_seq_len or config.answer_limit() >= positions - 1:
        return config.max_seq_len
    return min(config.max_seq_len, positions - 1)


def max_model_len(config: Config, known: Facts | None, mode: str) -> int:
    """Longest sequence for which a server is started, in tokens, within the target's positions.

    Answering and extracting need a row, and the token that a server generates after it; evaluation a row and an answer.
    """
    longest = config.max_seq_len + (1 if mode in ("generate", "extract") else config.evaluate.max_tokens)
    return longest if known is None or known.positions is None else min(longest, known.positions)


def feature_bytes_per_token(config: Config, known: Facts) -> int:
    """Largest size of the stored hidden states of a token, in bytes: with its last-layer hidden state."""
    width, scale = {"float32": (4, 0), "float8_e4m3fn": (1, 2)}.get(config.extract.dtype.name, (2, 0))
    return len(derive(config, known)["capture_layer_ids"]) * (known.hidden_size * width + scale)
