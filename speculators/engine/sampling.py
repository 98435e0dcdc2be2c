"""Fields of requests for answers: variables of the chat template, sampling options, and the seed of each request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from speculators.config.schema import Regenerate, Target

SEED_BITS = 63
"""vLLM takes seeds of 64 bits with a sign."""


def template_fields(target: Target, conversation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that the chat template gets with the messages: the tools of the conversation, and
    variables, its own before the recipe's."""
    variables = target.chat_template_kwargs | (conversation.get("chat_template_kwargs") or {})
    fields = {"tools": conversation.get("tools"), "chat_template_kwargs": variables}
    return {name: value for name, value in fields.items() if value}


def sampling_fields(config: Regenerate) -> dict[str, Any]:
    """The sampling options of a request but its seed. All of them, since servers may have defaults of their own."""
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "presence_penalty": config.presence_penalty,
        "repetition_penalty": config.repetition_penalty,
    }


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
