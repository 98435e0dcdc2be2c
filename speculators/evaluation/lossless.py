"""Greedy decoding with a draft gives the tokens that greedy decoding without it gives: checked here, token by token.

The proof holds for exact arithmetic. A server that verifies four tokens in one step adds in another order than one
that takes them one by one, so the logits differ in their last bits, and where two tokens are as likely as each
other, either may come out on top. Such a tie is told from a fault by asking the server without a draft for the
log-probabilities of both tokens after the text that the two answers share. After the first difference the texts
are different texts, so nothing is compared beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speculators.engine.client import Client

TOLERANCE = 1e-3
"""Largest difference of two log-probabilities, in nats, that counts as a tie in float32.

Float32 resolves a logit of size 32 to 4e-6, and sums in another order add up over the layers: 5.3e-5 was the most in
1 715 log-probabilities of SmolLM2-135M (30 layers), decoded with a draft, without, and in a prefill. Deeper and wider
targets err more, hence the margin. Two different tokens are hardly ever this close but by such a tie.
"""

_LIKELIEST = 5
"""Log-probabilities asked for; of two tokens that tie for the first place, both are among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two greedy answers to one prompt."""

    tokens: int
    """Compared: the common ones, and the first that differs."""
    difference: dict[str, Any] | None
    """Where they part: `position`, `plain` and `speculative` token, `gap` in nats, `verdict` tie or fault."""


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def verdict(likeliest: dict[int, float], plain: int | None, speculative: int | None) -> tuple[str, float | None]:
    """Whether two different tokens tie, and how far apart they are in nats.

    Args:
        likeliest: token -> log-probability at the place where they differ.
        plain: token without a draft, None where that answer ended before the other.
        speculative: the same with a draft.
    """
    if plain not in likeliest or speculative not in likeliest:
        return "fault", None
    gap = abs(likeliest[plain] - likeliest[speculative])
    return ("tie" if gap < TOLERANCE else "fault"), gap


async def compare_answers(
    client: Client, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int], *, item: str
) -> Comparison:
    """Compare two answers (token ids) to `prompt` (token ids); `client` is the server without a draft."""
    shared = common_prefix(plain, speculative)
    if shared == len(plain) == len(speculative):
        return Comparison(tokens=shared, difference=None)
    left = plain[shared] if shared < len(plain) else None
    right = speculative[shared] if shared < len(speculative) else None
    text = [*prompt, *plain[:shared]]
    answer = await client.complete(text, item=item, max_tokens=1, temperature=0.0, logprobs=_LIKELIEST)
    said, gap = verdict(answer.logprobs[0], left, right)
    difference = {"position": shared, "plain": left, "speculative": right, "gap": gap, "verdict": said}
    return Comparison(tokens=shared + 1, difference=difference)
