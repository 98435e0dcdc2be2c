"""Hidden states out of a Mooncake store: whole or an error, removed then, and nothing is waited for without end."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import re
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from speculators.config.execution import Mooncake
from speculators.engine.client import Client
from speculators.errors import RunError, ServiceError, StageError
from speculators.job import Endpoint
from speculators.packages import install_command
from tests.stages.states_server import StatesServer, states_of

PROMPT = [10, 3, 4]


class FakeStore:
    """Objects in a dictionary, behind as much of Mooncake's client as is used."""

    objects: dict[str, bytes]
    connections = 0
    status = 0
    answers = threading.Event()

    def setup(self, *where: Any) -> int:
        type(self).connections += 1
        return self.status

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        self.answers.wait(10)
        return [self.status or int(key in self.objects) for key in keys]

    def get_size(self, key: str) -> int:
        return len(self.objects[key]) if key in self.objects else -704

    def get_into(self, key: str, place: int, size: int) -> int:
        ctypes.memmove(place, self.objects[key], size)
        return size

    def register_buffer(self, place: int, size: int) -> int:
        return 0

    def unregister_buffer(self, place: int) -> int:
        return 0

    def remove(self, key: str, force: bool) -> int:
        return 0 if self.objects.pop(key, None) else -704


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStore]]:
    class Fresh(FakeStore):
        objects: dict[str, bytes] = {}  # noqa: RUF012
        answers = threading.Event()

    Fresh.answers.set()
    module = types.ModuleType("mooncake.store")
    module.MooncakeDistributedStore = Fresh  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.store", module)
    yield Fresh
    Fresh.answers.set()


@pytest.fixture
def master() -> Iterator[str]:
    """Something that accepts connections, where nothing more is asked of a master."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def server(tmp_path: Path, store: type[FakeStore]) -> Iterator[StatesServer]:
    made = StatesServer(tmp_path)
    made.connector, made.put = "mooncake", store.objects.__setitem__
    yield made
    made.stop()


def use(url: str, master: str | None, work: Callable[[Client], Awaitable[Any]], *, timeout: float = 20.0) -> Any:
    options = Mooncake(master=master) if master else None
    endpoint = Endpoint(
        url=url, model="m", api_key="k", mode="extract", directory=Path("none"), log=Path("log"), mooncake=options
    )

    async def run() -> Any:
        async with Client(endpoint, concurrency=4, retries=0, timeout=timeout) as client:
            return await work(client)

    return asyncio.run(run())


async def row(client: Client, prompt: list[int] = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    states = await client.hidden_states(prompt, item="row 7")
    return await asyncio.to_thread(states.load)


def test_states_are_what_was_put_and_are_gone_then_over_one_connection(
    server: StatesServer, store: type[FakeStore], master: str
) -> None:
    prompts = [[token, *range(token)] for token in range(1, 20)]

    async def draw(client: Client) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [drawn async for drawn in client.map_in_order(lambda prompt: row(client, prompt), prompts)]

    for prompt, (ids, states) in zip(prompts, use(server.url, master, draw), strict=True):
        assert (ids.tolist(), ids.dtype) == (prompt, torch.int64)
        assert torch.equal(states, states_of(prompt))
    assert (store.objects, store.connections) == ({}, 1)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        (
            "version",
            ServiceError,
            r"sent a manifest of version 2 for the hidden states of row 7; this release reads version 1",
        ),
        (
            "outside",
            StageError,
            r"row 7: the hidden states in cmpl-.* cannot be read: .*does not fit an object of 192 bytes",
        ),
        ("before", StageError, r"row 7: .*the manifest entry does not fit an object of 192 bytes: .*'offset': -64"),
        ("crooked", StageError, r"row 7: .*the manifest entry does not fit an object of 192 bytes: .*'offset': 1"),
        (
            "shape",
            StageError,
            r"row 7: .*the manifest entry does not fit an object of 192 bytes: .*'shape': \[3, 2, 9\]",
        ),
        ("type", StageError, r"row 7: the hidden states in cmpl-.* cannot be read: AttributeError"),
        ("nameless", StageError, r"row 7: the hidden states in cmpl-.* cannot be read: KeyError: 'token_ids'"),
        (
            "truncated",
            StageError,
            r"row 7: the hidden states in cmpl-.* cannot be read: .* 128 bytes, expected 192",
        ),
        ("unwritten", StageError, r"could not write the hidden states of row 7: .*Non-finite producer tensor"),
    ],
)
def test_what_is_not_as_it_was_described_is_an_error_and_is_removed(
    server: StatesServer, store: type[FakeStore], master: str, trouble: str, kind: type[RunError], message: str
) -> None:
    server.trouble = {10: trouble}
    with pytest.raises(kind, match=message):
        use(server.url, master, row)
    assert trouble == "version" or store.objects == {}


def test_an_object_for_which_the_store_had_no_room_any_more_says_what_gives_it_room(
    server: StatesServer, store: type[FakeStore], master: str
) -> None:
    async def late(client: Client) -> None:
        states = await client.hidden_states(PROMPT, item="row 7")
        store.objects.clear()
        states.load()

    with pytest.raises(StageError, match=r"row 7: .* status -704") as raised:
        use(server.url, master, late)
    assert "serve.mooncake.segment_gib" in raised.value.hint


def test_states_that_nobody_asked_for_are_removed_too(
    server: StatesServer, store: type[FakeStore], master: str
) -> None:
    async def ask(client: Client) -> None:
        server.trouble = {11: "unwritten"}
        for prompt in (PROMPT, [11, 1]):
            await client.complete(prompt, item="row 7", max_tokens=1)

    use(server.url, master, ask)
    assert (server.asked, store.objects) == ([PROMPT, [11, 1]], {})


def test_a_recipe_that_speaks_of_no_store_leaves_alone_what_lies_there_and_cannot_have_it(
    server: StatesServer, store: type[FakeStore]
) -> None:
    use(server.url, None, lambda client: client.complete(PROMPT, item="row 7", max_tokens=1))
    with pytest.raises(ServiceError, match=r"answered row 7 without hidden states") as raised:
        use(server.url, None, row)
    assert "extract.connector=mooncake" in raised.value.hint
    assert store.connections == 0


def test_a_master_that_is_not_there_is_named_at_once(server: StatesServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ServiceError, match=rf"store at {nowhere} cannot be used: Connection refused") as raised:
        use(server.url, nowhere, row)
    assert time.monotonic() - began < 5
    assert "serve.mooncake.master=HOST:PORT" in raised.value.hint


@pytest.mark.parametrize("status", [-1, -900])
def test_a_store_that_answers_with_a_status_is_an_error_of_the_store(
    server: StatesServer, store: type[FakeStore], master: str, status: int
) -> None:
    store.status = status
    with pytest.raises(ServiceError, match=rf"the Mooncake store at {master} cannot be used: .*status {status}"):
        use(server.url, master, row)


@pytest.mark.parametrize("trouble", ["never", "hangs"])
def test_what_never_appears_and_a_store_that_hangs_are_waited_for_as_long_as_a_request_may_take(
    server: StatesServer, store: type[FakeStore], master: str, trouble: str
) -> None:
    async def limited(client: Client) -> None:
        server.trouble = {10: "never"}
        if trouble == "hangs":
            store.answers.clear()
        try:
            await row(client)
        finally:
            store.answers.set()

    with pytest.raises(ServiceError, match=r"row 7 did not appear in the Mooncake store .* within 0.2 s") as raised:
        use(server.url, master, limited, timeout=0.2)
    assert "serve.mooncake.segment_gib" in raised.value.hint


def test_a_client_that_cannot_be_loaded_says_what_to_install(
    server: StatesServer, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ServiceError, match=r"Mooncake's client cannot be loaded: .*mooncake") as raised:
        use(server.url, master, row)
    assert install_command("mooncake") in raised.value.hint


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture
def real_master(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, str]]:
    """The master, where it is, and where it says how it is."""
    port, metrics = free_port(), free_port()
    argv = [sys.executable, "-m", "mooncake.cli", "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    argv += ["--metrics_host=127.0.0.1", f"--metrics_port={metrics}"]
    with (tmp_path / "master.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            for _ in range(200):
                try:
                    httpx.get(f"http://127.0.0.1:{metrics}/metrics", trust_env=False)
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield process, f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics"
        finally:
            process.kill()


@pytest.mark.skipif(not importlib.util.find_spec("mooncake"), reason="the extra `mooncake` is not installed")
@pytest.mark.parametrize("writer", ["by hand", "hs-connectors"])
def test_a_real_store_hands_over_what_another_process_has_put(
    tmp_path: Path, real_master: tuple[subprocess.Popen[bytes], str, str], writer: str
) -> None:
    if writer == "hs-connectors":
        pytest.importorskip("hs_connectors", reason="the package hs-connectors is not installed here")
    process, master, metrics = real_master
    prompts = [list(range(length)) for length in (1, 7, 640, 20_000)]

    async def draw(client: Client) -> None:
        for prompt in prompts:
            ids, states = await row(client, prompt)
            assert (ids.tolist(), ids.dtype) == (prompt, torch.int64)
            assert torch.equal(states, states_of(prompt))
        with pytest.raises(StageError, match=r"hidden states of row 7: .*Non-finite producer tensor"):
            await row(client, [99, 1])
        await client.complete(prompts[1], item="row 8", max_tokens=1)
        assert re.search(r"^master_key_count 0$", httpx.get(metrics, trust_env=False).text, re.MULTILINE)
        process.kill()
        process.wait()
        with pytest.raises(ServiceError, match=rf"the Mooncake store at {master} cannot be used: status -9"):
            await row(client)

    argv = [sys.executable, "-m", "tests.engine.mooncake_server", master, writer]
    with (
        (tmp_path / "server.log").open("wb") as log,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        assert server.stdout is not None
        try:
            use(server.stdout.readline().decode().strip(), master, draw, timeout=60.0)
        finally:
            server.kill()
