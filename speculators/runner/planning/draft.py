"""What a draft's checkpoint says of itself: how vLLM serves it, how many tokens it proposes, and for which targets.

Read from config.json at planning; for a draft that the recipe trains, computed from its options. Two formats are known:
the speculators format, which this package and the PyPI package speculators write, and that of drafts made for vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config.algorithms import SERVED_ONLY, SPECULATORS, Speculator, proposed_tokens
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError
from speculators.runner.planning.derive import Facts

OPTION = "evaluate.draft"


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftFacts:
    """What is known of a draft without its weights."""

    method: Mapping[str, Any]
    """vLLM's speculative config for it, but for its path and the number of tokens."""
    num_speculative_tokens: int | None
    """Tokens that it proposes in one step by default; None if its config.json names no number."""
    max_tokens: int | None
    """Most tokens that it can propose in one step; None: any number."""
    shape: Mapping[str, int] = field(default_factory=dict)
    """`hidden_size` and `vocab_size` of its target, and `layer_id`, the highest layer whose input it reads; without
    those that its config.json does not name."""


def of_recipe(speculator: Speculator) -> DraftFacts:
    """The facts of the draft that a recipe trains, which fits its target."""
    return DraftFacts(
        method={"method": speculator.vllm_method()},
        num_speculative_tokens=speculator.num_speculative_tokens or speculator.trained_tokens(),
        max_tokens=speculator.max_tokens(),
    )


def of_checkpoint(directory: Path) -> DraftFacts:
    """The facts of the draft in a directory.

    Raises:
        ContractError: its config.json is not that of a draft that vLLM serves.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config.get("speculators_model_type")
        if name in SERVED_ONLY:
            # Drafts of whole blocks: more tokens than they were trained for are never good.
            tokens = proposed_tokens(config)
            return DraftFacts(
                method=SERVED_ONLY[name], num_speculative_tokens=tokens, max_tokens=tokens, shape=_shape(config)
            )
        schema = SPECULATORS.get(name) if name else next((s for s in SPECULATORS.values() if s.is_native(config)), None)
        if schema is None:
            raise ContractError(
                f"{OPTION}: {path} is not that of a draft of a known format"
                + (f": its speculators_model_type is {name}" if name else ""),
                f"name a checkpoint in the speculators format ({', '.join([*SPECULATORS, *SERVED_ONLY])}), or of "
                f"{' or '.join(SPECULATORS)} for vLLM",
            )
        options = schema.of_checkpoint(config)
        return DraftFacts(
            method={"method": options.vllm_method()},
            num_speculative_tokens=proposed_tokens(config) or options.max_tokens(),
            max_tokens=options.max_tokens(),
            shape=_shape(config),
        )
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ContractError(
            f"{OPTION}: {path} is not the config.json of a draft ({type(error).__name__}: {error})",
            "name the directory of a draft's checkpoint",
        ) from None


def _shape(config: Mapping[str, Any]) -> dict[str, int]:
    layer = config.get("transformer_layer_config") or config
    if config.get("speculators_model_type") in SPECULATORS and layer is config:
        raise KeyError("transformer_layer_config")
    ids = [
        *(config.get("eagle_aux_hidden_state_layer_ids") or config.get("aux_hidden_state_layer_ids") or ()),
        *((config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or ()),
    ]
    values = {
        "hidden_size": config.get("target_hidden_size") or layer.get("hidden_size"),
        "vocab_size": layer.get("vocab_size"),
        "layer_id": max(ids, default=None),
    }
    checked = values | {"draft_vocab_size": config.get("draft_vocab_size"), "first layer_id": min(ids, default=None)}
    for name, value in checked.items():
        if value is not None and (type(value) is not int or value < ("layer_id" not in name)):
            raise ValueError(f"{name} is {value!r}")
    return {name: value for name, value in values.items() if value is not None}


def check_fits(config: Config, draft: DraftFacts, target: Facts) -> None:
    """Check a draft against the recipe's target, as far as their files tell.

    Raises:
        RecipeError: the draft is for another target.
    """
    names = {"hidden_size": "hidden states of width", "vocab_size": "a vocabulary of", "layer_id": "layer"}
    actual = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "layer_id": target.num_hidden_layers,
    }
    for name, value in draft.shape.items():
        fits = value <= actual[name] if name == "layer_id" else value == actual[name]
        if not fits:
            raise RecipeError(
                f"{OPTION}={config.evaluate.draft}: the draft reads {names[name]} {value}, and the target has "
                f"{actual[name]}{' layers' if name == 'layer_id' else ''}",
                f"name the draft's own target: target.source=PATH, or another draft: {OPTION}=PATH",
            )


def tokens_to_measure(config: Config, draft: DraftFacts) -> list[int]:
    """The numbers of tokens proposed in one step that `evaluate` measures, without repetitions.

    Raises:
        RecipeError: the draft cannot propose so many, or neither recipe nor checkpoint names a number.
    """
    option = "evaluate.num_speculative_tokens"
    tokens = list(dict.fromkeys(config.evaluate.num_speculative_tokens))
    if not tokens and draft.num_speculative_tokens is None:
        raise RecipeError(
            f"{option}=[]: the config.json of {config.evaluate.draft} names no number of tokens", f"{option}=[3]"
        )
    tokens = tokens or [draft.num_speculative_tokens or 0]
    if draft.max_tokens is not None and max(tokens) > draft.max_tokens:
        raise RecipeError(
            f"{option}={tokens}: must be at most {draft.max_tokens}, what a step of the draft proposes",
            f"{option}=[{draft.max_tokens}]",
        )
    return tokens
