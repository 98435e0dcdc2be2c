"""Compares greedy answers with and without a draft, token by token: they should be the same.

That holds in exact arithmetic. A server that verifies four tokens in one step adds in another order than one that
decodes them one by one, so logits differ in their last bits, and either of two equally probable tokens may win. To
separate such a tie from a fault, the server without a draft is asked for the log-probabilities of both tokens after
the text that the answers share. Behind the first difference the texts differ, so nothing more is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speculators.engine.client import Client

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of two log-probabilities, in nats, that counts as a tie, by the format of the target.

Float32 resolves a logit of size 32 to 4e-6, and rounding accumulates over the layers: 5.3e-5 was the most in 1 715
log-probabilities of SmolLM2-135M (30 layers), decoded with a draft, without, and in a prefill. Deeper and wider
targets err more, hence the margin. Without a tie, two tokens are hardly ever this close. Bfloat16 resolves the same
logit to 0.25 and float16 to 0.03: there 0.38 and 0.055 were the most (`tests/benchmarks/ties.py`, docs/log.md), and a
comparison finds gross faults only, which is why float32 is used where it fits.
"""

_TOP_LOGPROBS = 5
"""Log-probabilities that are requested; two tokens that tie for the largest are among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The result of comparing two greedy answers to one prompt."""

    tokens: int
    """Compared tokens: the shared ones, and the first that differs."""
    difference: dict[str, Any] | None
    """First difference: `position`, `baseline` and `speculative` token, `gap` in nats, `verdict` tie or fault."""


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the tokens that two sequences share from the start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def verdict(
    logprobs: dict[int, float], baseline: int | None, speculative: int | None, tolerance: float
) -> tuple[str, float | None]:
    """Decide whether two different tokens tie ("tie" or "fault"), and how far apart they are in nats.

    Args:
        logprobs: token -> log-probability at the position where they differ.
        baseline: token without a draft, None where that answer has ended.
        speculative: token with a draft, None likewise.
        tolerance: largest distance of a tie, in nats.
    """
    if baseline not in logprobs or speculative not in logprobs:
        return "fault", None
    gap = abs(logprobs[baseline] - logprobs[speculative])
    return ("tie" if gap < tolerance else "fault"), gap


async def compare_answers(
    client: Client,
    prompt: Sequence[int],
    baseline: Sequence[int],
    speculative: Sequence[int],
    *,
    tolerance: float,
    item: str,
) -> Comparison:
    """Compare two answers (token ids) to `prompt` (token ids); `client` is of the server without a draft."""
    shared = common_prefix(baseline, speculative)
    if shared == len(baseline) == len(speculative):
        return Comparison(tokens=shared, difference=None)
    left = baseline[shared] if shared < len(baseline) else None
    right = speculative[shared] if shared < len(speculative) else None
    text = [*prompt, *baseline[:shared]]
    completion = await client.complete(text, item=item, max_tokens=1, temperature=0.0, logprobs=_TOP_LOGPROBS)
    result, gap = verdict(completion.logprobs[0], left, right, tolerance)
    difference = {"position": shared, "baseline": left, "speculative": right, "gap": gap, "verdict": result}
    return Comparison(tokens=shared + 1, difference=difference)
