"""Memory of `regenerate` over many answers: `python -m tests.benchmarks.answers_memory [CONVERSATIONS [TOKENS]]`.

The target is played, so that what is measured is the bookkeeping: log, index, resuming from it, and publishing. Prints
the peak of the resident memory, and what one conversation adds to it.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speculators.config import compose
from speculators.engine.client import Client, Completion
from speculators.job import Endpoint, Job
from speculators.stages import regenerate
from tests.stages.jobs import make_job


class Played(Client):
    """A client whose answers are numbers that differ."""

    tokens = 500

    async def tokenize(self, messages: Any, *, item: str, affinity_key: str = "", **fields: Any) -> list[int]:
        return list(range(100))

    async def chat(self, messages: Any, *, item: str, affinity_key: str = "", **fields: Any) -> Completion:
        ids = [(fields["seed"] + 7919 * index) % 50_000 for index in range(self.tokens)]
        return Completion(
            prompt_ids=list(range(100)), token_ids=ids, text="word " * self.tokens, finish_reason="length", logprobs=[],
            kv_transfer_params={}, seconds=0.0,
        )  # fmt: skip


def job_of(root: Path, prompts: Path) -> Job:
    """A job over the conversations in `prompts`."""
    job = make_job("regenerate", root / "work", compose.compose(["recipe=smollm2_eagle3"]), prompts=prompts)
    job.services["target"] = Endpoint(
        url="http://127.0.0.1:1", model="m", api_key="", mode="generate", directory=root, log=root / "log"
    )
    return job


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Answer all conversations, then resume from the whole log."""
    count, Played.tokens = [*map(int, sys.argv[1:]), *(100_000, 500)[len(sys.argv) - 1 :]]
    regenerate.Client = Played  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "prompts").mkdir()
        with (root / "prompts/conversations.jsonl").open("w") as file:
            for number in range(count):
                messages = [{"role": "user", "content": f"question {number} " + "and so on " * 20}]
                file.write(json.dumps({"id": f"d/{number}", "source": "d", "messages": messages}) + "\n")
        before = peak_mib()
        for attempt in ("answered", "resumed"):
            start = time.monotonic()
            regenerate.main(job_of(root, root / "prompts"))
            seconds = time.monotonic() - start
            added = (peak_mib() - before) * 1024 / count
            log = (root / "work/scratch/answers.jsonl").stat().st_size / 2**20
            print(f"{attempt}: {count} answers of {Played.tokens} tokens, {seconds:.0f} s, peak {peak_mib():.0f} MiB")
            print(f"  {before:.0f} MiB before, {added:.1f} KiB a conversation, log {log:.0f} MiB")


if __name__ == "__main__":
    main()
