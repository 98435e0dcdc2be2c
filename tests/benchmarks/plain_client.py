"""Acceptance that a plain client of vLLM sees, beside what `evaluate` measured of the same draft and prompts.

    python tests/benchmarks/plain_client.py EVALUATION DRAFT [VLLM ARGUMENTS]

EVALUATION is the data of an `evaluate` artifact with one request in flight, DRAFT the checkpoint that it measured, in
the speculators format. vLLM is started as a stranger starts it, `--model DRAFT`, so that it finds target, method and
number of tokens by itself. It gets the prompts as token ids, one at a time; the counters on /metrics are read before
and after. Nothing of this package takes part in that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total\{[^}]*\} (\S+)$", re.MULTILINE)
POSITION = re.compile(r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="(\d+)"[^}]*\} (\S+)$', re.M)
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextmanager
def served(draft: Path, arguments: list[str]) -> Iterator[str]:
    """The URL of a server while it is up."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(draft.absolute())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm", *arguments]
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=sys.stderr, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "vLLM ended"
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def counters(url: str) -> dict[str, float]:
    """Drafts, accepted tokens, and accepted tokens by position from 0."""
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    return {name: float(value) for pattern in (COUNTER, POSITION) for name, value in pattern.findall(page)}


def main(evaluation: str, draft: str, *arguments: str) -> None:
    """Print both, a line each, for every dataset."""
    results: dict[str, Any] = json.loads((Path(evaluation) / "evaluation.json").read_text())
    with served(Path(draft), list(arguments)) as url:
        model = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
        for name, measured in results["datasets"].items():
            assert measured["concurrency"] == 1
            lines = (Path(evaluation) / f"{name.replace('/', '%2F')}.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines][: measured["prompts"]]
            before, same = counters(url), 0
            for record in records:
                body = {"model": model, "prompt": record["prompt_ids"], "max_tokens": results["max_tokens"],
                        "temperature": results["temperature"], "return_token_ids": True}  # fmt: skip
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=None, trust_env=False)
                same += (
                    answer.raise_for_status().json()["choices"][0]["token_ids"] == record["speculative"]["token_ids"]
                )
            time.sleep(2)  # the engine counts its last step after the answer
            after = counters(url)
            counted = {key: after[key] - before.get(key, 0) for key in after}
            shares = [counted[str(i)] / counted["drafts"] for i in range(measured["num_speculative_tokens"])]
            lengths = measured["acceptance_length"], 1 + counted["accepted_tokens"] / counted["drafts"]
            for who, length, positions in zip(
                ("evaluate", "plain client"), lengths, (measured["per_position"], shares), strict=True
            ):
                print(f"{name}, {who}: {length:.4f} ({', '.join(f'{share:.4f}' for share in positions)})")
            print(f"{name}: {same} of {len(records)} answers are the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
