"""What nobody has to type: values computed from (target, speculator, hardware), shown by `plan`.

A value that depends on the target's depth is unknown until the target's config.json is at hand or the recipe's
target says it; `derive` then leaves it out and the stages that need it wait for the target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.config.choices import LastLayerPositions
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rest is computed from, read off the target's config.json or given by the recipe."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    heads: int | None = None
    """Query heads, and those of keys and values; None where only the recipe is known."""
    key_value_heads: int | None = None
    positions: int | None = None
    """Longest sequence that the target takes, in tokens; None where that is not known, or rotary scaling extends it."""


def facts(config: Config, checkpoint: Path | None) -> Facts | None:
    """The target's facts; None while neither the recipe nor a checkpoint tells them.

    Raises:
        ContractError: the recipe says something else than the checkpoint, or its config.json lacks one of them.
    """
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    given = {name: getattr(config.target, name) for name in names}
    if checkpoint is None:
        return None if None in given.values() else Facts(**given)
    path = checkpoint / "config.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        text = whole.get("text_config") or whole
    except (ValueError, AttributeError) as error:
        raise ContractError(f"target.source: {path} is no JSON object ({error})", "fetch or save it again") from None
    for name in names:
        if not isinstance(text.get(name), int):
            raise ContractError(
                f"target.source={config.target.source}: its config.json has no {name}",
                "name a language model in the format of transformers: target.source=DIRECTORY or hub:ID@REVISION",
            )
    found = {name: text[name] for name in names}
    for name in names:
        if given[name] is not None and given[name] != found[name]:
            raise ContractError(
                f"target.{name} is {given[name]} in the recipe and {found[name]} in the checkpoint's config.json",
                f"set target.{name}={found[name]}, or target.{name}=null to read it from there",
            )
    heads = text.get("num_attention_heads")
    groups = text.get("num_key_value_heads") or heads
    return Facts(**found, heads=heads, key_value_heads=groups, positions=_positions(text))


def _positions(text: Mapping[str, Any]) -> int | None:
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    positions = text.get("max_position_embeddings")
    return positions if isinstance(positions, int) and "factor" not in json.dumps(scaling) else None


def derive(config: Config, known: Facts) -> dict[str, Any]:
    """Everything derived, by name.

    `layer_ids`: target layers whose *input* the draft reads. `capture_layer_ids`: the same and, as the last, the state
    that leaves the last layer before the final norm, from which training computes the target's own distribution.
    `last_state`: where the last one's are kept.
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
            "vocab.size=null, which keeps the whole vocabulary",
        )
    mask = getattr(config.speculator, "mask_token_id", None)
    if mask is not None and mask >= known.vocab_size:
        raise RecipeError(
            f"speculator.mask_token_id={mask}: must be below {known.vocab_size}, the target's vocabulary",
            "speculator.mask_token_id=null, which finds one",
        )
    heads = config.speculator.num_attention_heads or known.heads
    groups = config.speculator.num_key_value_heads or known.key_value_heads
    if heads is not None and groups is not None and heads % groups:
        raise RecipeError(
            f"speculator.num_attention_heads={heads}: must be a multiple of speculator.num_key_value_heads={groups}",
            "let speculator.num_attention_heads be a multiple of speculator.num_key_value_heads; the target has "
            f"{known.heads} and {known.key_value_heads}",
        )
    captured, last = [*layer_ids, depth], config.extract.last_state
    if last is LastLayerPositions.auto:
        last = LastLayerPositions.everywhere if config.train.train_on_prompts else LastLayerPositions.answers
    elif last is LastLayerPositions.answers and config.train.train_on_prompts:
        raise RecipeError(
            "extract.last_state=answers keeps nothing by which train.train_on_prompts could train on prompts",
            "leave extract.last_state out, or set train.train_on_prompts=false",
        )
    return {
        "layer_ids": list(layer_ids),
        "capture_layer_ids": captured,
        "last_state": last.name,
    }


def max_model_len(config: Config, known: Facts | None) -> int:
    """Tokens that a server must take: the longest row and the answer that evaluation adds to a prompt, as far as the
    target has positions for them."""
    longest = config.max_seq_len + config.evaluate.max_tokens
    return longest if known is None or known.positions is None else min(longest, known.positions)


def feature_bytes_per_token(config: Config, known: Facts) -> int:
    """Bytes of hidden states stored for one token, at most: of those whose last state is kept, too."""
    width, scale = {"float32": (4, 0), "float8_e4m3fn": (1, 2)}.get(config.extract.dtype.name, (2, 0))
    return len(derive(config, known)["capture_layer_ids"]) * (known.hidden_size * width + scale)
