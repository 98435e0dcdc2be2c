"""Tokens per second of a server that runs, by requests in flight.

    python tests/benchmarks/serving.py http://127.0.0.1:8000 MODEL conversations.jsonl 1x3x128 4x8x96 64x64x96

Each `IN_FLIGHT x REQUESTS x TOKENS` is one measurement: greedy answers to the first prompts of a `prompts` artifact.
One request before the first is not counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import httpx


async def measure(url: str, model: str, prompts: list[str], in_flight: int, tokens: int) -> tuple[int, int, float]:
    """Prompt tokens, answer tokens, seconds."""
    gate = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(prompt: str) -> dict[str, int]:
            async with gate:
                body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
                body |= {"max_tokens": tokens, "temperature": 0}
                answer = await client.post(f"{url}/v1/chat/completions", json=body)
                usage: dict[str, int] = answer.raise_for_status().json()["usage"]
                return usage

        began = time.perf_counter()
        used = await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - began
    return sum(u["prompt_tokens"] for u in used), sum(u["completion_tokens"] for u in used), seconds


def main(url: str, model: str, file: str, *shapes: str) -> None:
    """Print one line a measurement."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    prompts = [row["messages"][0]["content"] for row in rows]
    asyncio.run(measure(url, model, prompts[:1], 1, 16))
    for shape in shapes:
        in_flight, requests, tokens = map(int, shape.split("x"))
        read, said, seconds = asyncio.run(measure(url, model, prompts[:requests], in_flight, tokens))
        print(
            f"{in_flight:3} in flight: {said / seconds:6.1f} tokens/s ({said} answered, {read} read, {seconds:.1f} s)"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
