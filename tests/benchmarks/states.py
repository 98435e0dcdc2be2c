"""What hidden states cost, on the real engine. `python tests/benchmarks/states.py STORE [PROMPTS [TOKENS]]`.

STORE is one in which the demo was run. Two servers with the same settings, one of them with our connector, are
measured by turns on the same prompts: answering them, without states and with; then running prompts and answers through
once more, without states and with. States are taken, checked and converted as the stages do it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from speculators.config import compose
from speculators.engine.client import Client, Completion
from speculators.engine.transfer import FileTransfer
from speculators.features.writer import check_hidden_states
from speculators.job import Endpoint
from speculators.runner.planning import derive
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store

ROUNDS = 2
KEEP: dict[str, Any] = {"kv_transfer_params": {"hidden_states": True, "include_output_tokens": True}}


class Measured:
    """One server and the seconds that it took for each kind of work."""

    def __init__(self, planner: Planner, target: Path, mode: str, root: Path) -> None:
        order = vllm.ServerOrder(
            config=planner.config,
            mode=mode,
            dtype=planner.config.target.dtype.name,
            target=str(target),
            capture_layer_ids=planner.derived["capture_layer_ids"] if mode == "extract" else None,
            max_model_len=derive.max_model_len(planner.config, planner.facts, "extract"),
            directories=str(root),
            logs=str(root),
        )
        self.service = vllm.make_server(order, {})
        spec, states = self.service.spec, self.service.directory / "states"
        self.compute = getattr(torch, planner.config.target.dtype.name)
        self.endpoint = Endpoint(
            url=spec.url, model=spec.model, api_key=spec.api_key, mode=mode, directory=states, log=spec.log
        )

    async def answer(self, prompts: list[list[dict[str, str]]], tokens: int, in_flight: int) -> list[list[int]]:
        """Greedy answers; returns the rows that prompts and answers make."""
        fields = KEEP if self.endpoint.mode == "extract" else {}

        async def one(client: Client, messages: list[dict[str, str]]) -> list[int]:
            said = await client.chat(messages, item="a prompt", max_tokens=tokens, temperature=0.0, **fields)
            row = [*said.prompt_ids, *said.token_ids[:-1]]
            if fields:
                await self._take(row, await client.requested_states(said, item="a prompt"))
            return row

        return await self._all(one, prompts, in_flight)

    async def read(self, rows: list[list[int]], in_flight: int) -> None:
        """Every row once through the target."""

        async def one(client: Client, row: list[int]) -> Completion | None:
            if self.endpoint.mode == "extract":
                return await self._take(row, await client.hidden_states(row, item="a row"))
            return await client.complete(row, item="a row", max_tokens=1, temperature=0.0)

        await self._all(one, rows, in_flight)

    async def _take(self, row: list[int], file: FileTransfer) -> None:
        def work() -> None:
            token_ids, states = file.load()
            check_hidden_states("a row", row, token_ids, states, self.compute)
            states.to(torch.bfloat16)

        await asyncio.to_thread(work)

    async def _all(self, one: Callable[[Client, Any], Awaitable[Any]], items: list[Any], in_flight: int) -> list[Any]:
        async with Client(self.endpoint, concurrency=in_flight, retries=0, timeout=600.0) as client:
            return [done async for done in client.map_in_order(lambda item: one(client, item), items)]


async def measure(servers: dict[str, Measured], prompts: list[Any], tokens: int, in_flight: int) -> None:
    """Print seconds and ratios."""
    seconds = dict.fromkeys(itertools.product(servers, ("answer", "read")), 0.0)
    answered = read = 0
    for server in servers.values():  # the first requests of a server are slow
        await server.answer(prompts[:4], 8, 4)
    for number in range(ROUNDS):
        part, rows = prompts[number::ROUNDS], []
        turns = list(servers.items())[:: 1 if number % 2 == 0 else -1]
        for name, server in turns:
            began = time.perf_counter()
            rows = await server.answer(part, tokens, in_flight)
            seconds[name, "answer"] += time.perf_counter() - began
        for name, server in turns:
            began = time.perf_counter()
            await server.read(rows, in_flight)
            seconds[name, "read"] += time.perf_counter() - began
        answered, read = answered + len(part), read + sum(map(len, rows))
    (plain, states), work = servers, ("answer", "read")
    for kind, what in zip(work, (f"{answered} answers", f"{read} tokens read"), strict=True):
        without, having = seconds[plain, kind], seconds[states, kind]
        print(f"{what}: {without:.1f} s without states, {having:.1f} s with them, {having / without:.2f} times as long")


def main(store: str, prompts: str = "96", tokens: str = "96") -> None:
    """Start both servers, measure, stop them."""
    config = compose.compose(["recipe=smollm2_eagle3"])
    planner = Planner(config, Store(Path(store)))
    steps = {step.node.name: step for step in planner.plan()}
    target, kept = steps["target"].path, steps["prompts"].path
    assert target is not None, "the demo was not run in this store"
    assert kept is not None, "the demo was not run in this store"
    lines = (kept / "conversations.jsonl").read_text().splitlines()[: int(prompts)]
    asked = [[m for m in json.loads(line)["messages"] if m["role"] != "assistant"] for line in lines]
    with tempfile.TemporaryDirectory() as root:
        servers = {mode: Measured(planner, target, mode, Path(root)) for mode in ("baseline", "extract")}
        try:
            for server in servers.values():
                server.service.start()
            while any(server.service.poll() == "starting" for server in servers.values()):
                time.sleep(0.1)
            for server in servers.values():
                if server.service.state == "dead":
                    raise server.service.failure()
            asyncio.run(measure(servers, asked, int(tokens), config.regenerate.concurrency))
        finally:
            for server in servers.values():
                server.service.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
