"""Fields of requests for answers: variables of the chat template, sampling options, and the seed of each request."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from speculators.config.choices import Sampling
from speculators.config.schema import Regenerate, Target
from speculators.errors import StageError
from speculators.tokenizer_files import read_json

SEED_BITS = 63
"""vLLM takes seeds of 64 bits with a sign."""
VLLM_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Options that vLLM takes from a target's generation_config.json, each with its value where that has none."""


def template_fields(target: Target, conversation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that the chat template gets with the messages: the tools of the conversation, and
    variables, its own before the recipe's."""
    variables = target.chat_template_kwargs | (conversation.get("chat_template_kwargs") or {})
    fields = {"tools": conversation.get("tools"), "chat_template_kwargs": variables}
    return {name: value for name, value in fields.items() if value}


def sampling_fields(config: Regenerate, target: Path | None, digest: str) -> dict[str, Any]:
    """The sampling options of a conversation's requests, but the seed. All of them, since servers may have defaults.

    `target` is the directory of the checkpoint, and `digest` the conversation's, by which it draws its temperature.
    """
    if config.sampling is Sampling.model:
        assert target is not None
        return model_sampling(target)
    temperature = config.temperature
    if config.temperatures:
        weights = config.temperature_weights or [1.0] * len(config.temperatures)
        share = _uniform(f"{config.seed}/temperature/{digest}") * sum(weights)
        chosen = bisect_right(list(accumulate(weights)), share)
        temperature = config.temperatures[min(chosen, len(weights) - 1)]
    return {
        "temperature": temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "presence_penalty": config.presence_penalty,
        "repetition_penalty": config.repetition_penalty,
    }


def model_sampling(target: Path) -> dict[str, Any]:
    """The sampling options with which vLLM serves a target by default.

    Raises:
        StageError: the target has no generation_config.json.
    """
    try:
        config = read_json(target / "generation_config.json")
    except FileNotFoundError:
        raise StageError(
            "sampling=model: the target has no generation_config.json", "sampling=recipe, with a temperature"
        ) from None
    return {name: default if config.get(name) is None else config[name] for name, default in VLLM_DEFAULTS.items()}


def _uniform(text: str) -> float:
    """A number from 0 to below 1 that follows from a text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def request_seed(seed: int, digest: str, turn: int, sample: int = 0) -> int:
    """The seed of the request for one answer: one seed for all would draw the same noise for every conversation.

    Args:
        seed: `regenerate.seed`.
        digest: `answers.row_digest` of the conversation, so that the same conversation has the same answers under any
            id and in any data set.
        turn: index of the answer in the conversation.
        sample: index among several answers to the same prompt.
    """
    text = f"{seed}/{digest}/{turn}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - SEED_BITS)
