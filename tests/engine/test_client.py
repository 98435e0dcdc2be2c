"""The client against a real HTTP server that misbehaves on purpose: what is retried and said, what stays bounded."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from speculators import timeouts
from speculators.engine import pool
from speculators.engine.client import TOKENS_PER_TIMEOUT, Client
from speculators.engine.pool import summarize_log
from speculators.engine.transfer import FileTransfer
from speculators.errors import ServiceError, StageError
from speculators.features.encoding import dequantize, quantize
from speculators.job import Endpoint
from tests.loopback import JsonHandler, serving

ANSWER = {
    "choices": [
        {"text": "yes", "prompt_token_ids": [1, 2], "token_ids": [7], "finish_reason": "stop", "logprobs": None}
    ]
}


class Server:
    """Answers requests with the (status, body) pairs of `script`, the last one for ever; status 0 hangs up."""

    def __init__(self, script: list[tuple[int, Any]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.script = script
        self.delay = 0.0
        self.health = 200
        self.probes = 0
        self.probed = threading.Condition()
        outer = self

        class Handler(JsonHandler):
            def get(self) -> None:
                with outer.probed:
                    outer.probes += 1
                    outer.probed.notify_all()
                self.reply(outer.health)

            def post(self, body: dict[str, Any]) -> None:
                outer.requests.append({"authorization": self.headers["Authorization"], **body})
                status, answer = outer.script[min(len(outer.requests), len(outer.script)) - 1]
                time.sleep(outer.delay)
                if status == 0:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.reply(status, answer)

        self.http = serving(Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def await_probes(self, count: int) -> None:
        """Until /health was asked so many times more."""
        with self.probed:
            wanted = self.probes + count
            assert self.probed.wait_for(lambda: self.probes >= wanted, timeout=20)

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[tuple[int, Any]]], Server]]:
    monkeypatch.setattr(timeouts, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(timeouts, "MAX_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(pool, "FIRST_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(pool, "MAX_PROBE_SECONDS", 0.1)
    servers: list[Server] = []

    def start(script: list[tuple[int, Any]]) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def endpoint(url: str, directory: Path, *also: str) -> Endpoint:
    log = directory / "server.log"
    return Endpoint(url=url, model="m", api_key="k", mode="extract", directory=directory, log=log, also=list(also))


def use(url: str | list[str], directory: Path, work: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        urls = [url] if isinstance(url, str) else url
        async with Client(
            endpoint(urls[0], directory, *urls[1:]), **{"concurrency": 4, "retries": 2, "timeout": 5.0, **options}
        ) as client:
            return await work(client), client

    return asyncio.run(run())


def ask(client: Client) -> Awaitable[Any]:
    return client.complete([1, 2], item="row 12", max_tokens=1)


def test_a_server_that_wants_no_key_gets_none(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, ANSWER)])

    async def run() -> Any:
        open_to_all = dataclasses.replace(endpoint(server.url, tmp_path), api_key="")
        async with Client(open_to_all, concurrency=1, retries=0, timeout=5.0) as client:
            return await ask(client)

    assert asyncio.run(run()).token_ids
    assert server.requests[0]["authorization"] is None


def refused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_an_answer_carries_the_ids_and_the_request_carries_the_key(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, ANSWER)])
    answer, _ = use(server.url, tmp_path, ask)
    assert (answer.prompt_ids, answer.token_ids, answer.text, answer.finish_reason) == ([1, 2], [7], "yes", "stop")
    assert server.requests[0]["authorization"] == "Bearer k"
    assert server.requests[0]["prompt"] == [1, 2]
    assert server.requests[0]["max_tokens"] == 1


def test_a_chat_answer_is_read_with_its_logprobs_by_token_id(serve: Any, tmp_path: Path) -> None:
    top = [{"token": "token_id:7", "logprob": -0.25}, {"token": "token_id:9", "logprob": -2.0}]
    choice = {
        "message": {"role": "assistant", "content": "Paris"},
        "token_ids": [7],
        "finish_reason": "length",
        "logprobs": {"content": [{"token": "token_id:7", "logprob": -0.25, "top_logprobs": top}]},
    }
    server = serve([(200, {"choices": [choice], "prompt_token_ids": [1, 2, 3]})])
    messages = [{"role": "user", "content": "Where?"}]
    answer, _ = use(server.url, tmp_path, lambda client: client.chat(messages, item="c1", max_tokens=1, logprobs=2))
    assert (answer.prompt_ids, answer.token_ids, answer.text) == ([1, 2, 3], [7], "Paris")
    assert answer.logprobs == [{7: -0.25, 9: -2.0}]
    assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 2)
    assert server.requests[0]["messages"] == messages


def test_a_server_that_gives_no_token_ids_is_recognised(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, {"choices": [{"text": "yes", "finish_reason": "stop"}]})])
    with pytest.raises(ServiceError, match="does not return token ids"):
        use(server.url, tmp_path, ask)


@pytest.mark.parametrize("trouble", [(500, {}), (503, {}), (429, {}), (0, None)])
def test_what_may_pass_is_tried_again(serve: Any, tmp_path: Path, trouble: tuple[int, Any]) -> None:
    server = serve([trouble, trouble, (200, ANSWER)])
    answer, client = use(server.url, tmp_path, ask)
    assert answer.text == "yes"
    assert len(server.requests) == 3
    assert client.retried == 2


def test_a_request_that_keeps_failing_is_named_after_the_last_attempt(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("the log's last line\n")
    server = serve([(500, {"error": {"message": "EngineCore encountered an issue"}})])
    with pytest.raises(ServiceError) as error:
        use(server.url, tmp_path, ask)
    assert len(server.requests) == 3
    assert "row 12: the server answered 500 (EngineCore encountered an issue), 3 times in a row" in error.value.message
    assert "the log's last line" in error.value.message


def test_a_refused_request_is_not_tried_again_and_names_the_item(serve: Any, tmp_path: Path) -> None:
    server = serve([(400, {"error": {"message": "too long"}})])
    with pytest.raises(StageError, match="the server refuses row 12: too long"):
        use(server.url, tmp_path, ask)
    assert len(server.requests) == 1


def test_a_wrong_key_blames_the_server_not_the_item(serve: Any, tmp_path: Path) -> None:
    server = serve([(401, {"error": "Unauthorized"})])
    with pytest.raises(ServiceError, match="answered 401: Unauthorized"):
        use(server.url, tmp_path, ask)


def test_a_timeout_is_tried_again(serve: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServiceError, match=r"no answer within 0.1 s, 3 times in a row"):
            use(url, tmp_path, ask, timeout=0.1)


def test_a_server_that_is_gone_is_reported_at_once_with_its_last_lines(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("".join(f"line {i}\n" for i in range(100)))
    start = time.monotonic()
    with pytest.raises(ServiceError) as error:
        use(refused_url(), tmp_path, ask, retries=1000)
    assert time.monotonic() - start < 3
    assert "refuses connections" in error.value.message
    assert "line 99" in error.value.message
    assert "line 79" not in error.value.message


def test_the_cause_is_quoted_though_a_flood_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    flood = "Traceback ...\nEngineDeadError: see above\n" * 50
    log.write_text(f"INFO up\nERROR EngineCore encountered a fatal error.\nERROR RuntimeError: out of blocks\n{flood}")
    assert summarize_log(log).startswith("first error: ERROR RuntimeError: out of blocks\n")
    assert summarize_log(tmp_path / "none.log") == f"there is no log at {tmp_path / 'none.log'}"


def test_hidden_states_are_taken_once_and_their_file_is_gone(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, {**ANSWER, "kv_transfer_params": {"hidden_states_file": "x.safetensors"}})])
    states = torch.randn(2, 3, 4)

    async def work(client: Client) -> Any:
        asking = asyncio.ensure_future(client.hidden_states([1, 2], item="row 12"))
        await asyncio.sleep(0.1)
        assert not asking.done()  # the answer came, the file did not
        save_file({"hidden_states": states, "token_ids": torch.tensor([1, 2])}, tmp_path / "part")
        (tmp_path / "part").rename(tmp_path / "x.safetensors")
        return (await asking).load()

    (token_ids, found), _ = use(server.url, tmp_path, work)
    assert token_ids.tolist() == [1, 2]
    assert torch.equal(found, states)
    assert list(tmp_path.iterdir()) == []
    assert server.requests[0]["kv_transfer_params"] == {"hidden_states": True}
    assert server.requests[0]["max_tokens"] == 1


def test_states_that_left_the_server_in_float8_are_floats_in_the_type_it_computes_in(tmp_path: Path) -> None:
    states = torch.randn(2, 3, 8)
    quantized, scales = quantize(states)
    tensors = {"hidden_states": quantized, "scales": scales.float(), "token_ids": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "x.safetensors")
    _, found = FileTransfer(tmp_path / "x.safetensors").load()
    assert found.dtype is torch.float32
    assert torch.equal(found, dequantize(quantized, scales).float())
    assert list(tmp_path.iterdir()) == []


def test_what_the_connector_could_not_write_reaches_the_caller(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors.error").write_text("OSError: No space left on device")
    server = serve([(200, {**ANSWER, "kv_transfer_params": {"hidden_states_file": "x.safetensors"}})])
    with pytest.raises(StageError, match="hidden states of row 12: OSError: No space left on device"):
        use(server.url, tmp_path, lambda client: client.hidden_states([1, 2], item="row 12"))


def test_a_server_without_our_connector_is_recognised(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, ANSWER)])
    with pytest.raises(ServiceError, match="answered row 12 without hidden states"):
        use(server.url, tmp_path, lambda client: client.hidden_states([1, 2], item="row 12"))


@pytest.mark.parametrize(("method", "begun_at_most"), [("map", 4), ("map_in_order", 8)])
def test_work_is_drawn_only_as_results_are_taken(tmp_path: Path, method: str, begun_at_most: int) -> None:
    begun: list[int] = []

    async def work(item: int) -> int:
        begun.append(item)
        await asyncio.sleep(0.02 if item % 4 == 0 else 0.001)
        return item

    async def run(client: Client) -> list[int]:
        taken = []
        async for result in getattr(client, method)(work, range(40)):
            taken.append(result)
            await asyncio.sleep(0.002)
            assert len(begun) - len(taken) <= begun_at_most
        return taken

    taken, _ = use("http://127.0.0.1:1", tmp_path, run)
    assert sorted(taken) == list(range(40))
    assert (taken == sorted(taken)) == (method == "map_in_order")


@pytest.mark.parametrize("method", ["map", "map_in_order"])
def test_the_first_error_stops_the_rest(tmp_path: Path, method: str) -> None:
    cancelled: list[int] = []

    async def work(item: int) -> int:
        if item == 2:
            raise StageError("row 2 is bad", "mend it")
        try:
            await asyncio.sleep(0.01 if item < 2 else 60)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    async def run(client: Client) -> None:
        async for _ in getattr(client, method)(work, range(100)):
            pass

    with pytest.raises(StageError, match="row 2 is bad"):
        use("http://127.0.0.1:1", tmp_path, run)
    assert len(cancelled) <= 8
    assert 3 in cancelled


def test_a_server_that_fails_all_requests_is_left_alone_until_it_is_healthy(serve: Any, tmp_path: Path) -> None:
    server = serve([(500, {})])
    server.health = 503

    async def work(client: Client) -> None:
        asking = [asyncio.ensure_future(ask(client)) for _ in range(24)]
        await asyncio.to_thread(server.await_probes, 1)
        sent = len(server.requests)
        await asyncio.to_thread(server.await_probes, 3)
        assert len(server.requests) == sent
        assert sent <= pool.MAX_FAILURES + client.concurrency
        server.script, server.health = [(200, ANSWER)], 200
        assert all(answer.text == "yes" for answer in await asyncio.gather(*asking))

    use(server.url, tmp_path, work, concurrency=8, retries=20)


def test_the_first_failure_after_that_is_enough(serve: Any, tmp_path: Path) -> None:
    server = serve([*[(500, {})] * pool.MAX_FAILURES, (500, {}), (200, ANSWER)])
    use(server.url, tmp_path, ask, retries=20)
    assert server.probes == 2  # after FAILURES, and after one more
    assert len(server.requests) == pool.MAX_FAILURES + 2


def test_a_server_that_stays_ill_is_given_up_with_one_error(serve: Any, tmp_path: Path) -> None:
    server = serve([(500, {"error": {"message": "no more blocks"}})])
    server.health = 503

    async def work(client: Client) -> list[BaseException]:
        asking = [asyncio.ensure_future(ask(client)) for _ in range(20)]
        return [e for e in await asyncio.gather(*asking, return_exceptions=True) if isinstance(e, ServiceError)]

    errors, _ = use(server.url, tmp_path, work, retries=20, timeout=1.0)
    assert len(errors) == 20
    said = f"the server at {server.url} has been unhealthy for 1 s (the server answered 500 (no more blocks))"
    assert {e.message.partition(";")[0] for e in errors} == {said}  # type: ignore[attr-defined]


def test_a_request_for_more_tokens_gets_more_time(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, ANSWER)])
    server.delay = 0.4
    with pytest.raises(ServiceError, match=r"no answer within 0.1 s"):
        use(server.url, tmp_path, ask, timeout=0.1, retries=0)

    async def long(client: Client) -> Any:
        return await client.complete([1, 2], item="row 1", max_tokens=40 * TOKENS_PER_TIMEOUT)

    assert use(server.url, tmp_path, long, timeout=0.1, retries=0)[0].text == "yes"


def test_servers_share_the_requests_and_the_faster_one_gets_more(serve: Any, tmp_path: Path) -> None:
    slow, fast = serve([(200, ANSWER)]), serve([(200, ANSWER)])
    slow.delay = 0.2

    async def work(client: Client) -> int:
        return len(await asyncio.gather(*(ask(client) for _ in range(40))))

    assert use([slow.url, fast.url], tmp_path, work)[0] == 40
    assert len(slow.requests) + len(fast.requests) == 40
    assert 0 < len(slow.requests) < len(fast.requests)


def test_a_dead_server_is_left_out_while_another_lives(serve: Any, tmp_path: Path) -> None:
    server = serve([(200, ANSWER)])

    async def work(client: Client) -> int:
        return len(await asyncio.gather(*(ask(client) for _ in range(20))))

    done, client = use([refused_url(), server.url], tmp_path, work, retries=0)
    assert (done, len(server.requests), client.retried) == (20, 20, 0)


def test_a_server_that_is_back_is_used_again(serve: Any, tmp_path: Path) -> None:
    ill, other = serve([(500, {})]), serve([(200, ANSWER)])
    ill.health = 503

    async def work(client: Client) -> None:
        await asyncio.gather(*(ask(client) for _ in range(40)))
        ill.script, ill.health = [(200, ANSWER)], 200
        await asyncio.to_thread(ill.await_probes, 1)
        before = len(ill.requests)
        while len(ill.requests) == before:
            await asyncio.gather(*(ask(client) for _ in range(4)))

    use([ill.url, other.url], tmp_path, work, retries=20)


def test_when_all_servers_are_gone_the_error_names_all(tmp_path: Path) -> None:
    urls = [refused_url(), refused_url()]
    with pytest.raises(ServiceError) as error:
        use(urls, tmp_path, ask)
    assert all(f"the server at {url} refuses connections" in error.value.message for url in urls)


def test_what_begins_alike_goes_to_one_server_until_that_fails(serve: Any, tmp_path: Path) -> None:
    servers = [serve([(200, ANSWER)]), serve([(200, ANSWER)])]

    async def work(client: Client) -> list[str]:
        async def turns(affinity_key: str) -> set[str]:
            return {
                (await client.complete([1], item="c", affinity_key=affinity_key, max_tokens=1)).url for _ in range(6)
            }

        used = await asyncio.gather(*(turns(f"c{i}") for i in range(4)))
        assert [len(urls) for urls in used] == [1] * 4
        assert len(set.union(*used)) == 2
        (home,) = await turns("c0")
        next(server for server in servers if server.url == home).script = [(0, None)]
        return [home, (await client.complete([1], item="c", affinity_key="c0", max_tokens=1)).url]

    (home, elsewhere), _ = use([server.url for server in servers], tmp_path, work, retries=20)
    assert home != elsewhere


@pytest.mark.parametrize("damage", ["truncated", "other names", "empty"])
def test_a_states_file_that_is_damaged_is_an_error_with_its_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"hidden_states": torch.zeros(4, 2, 8), "tokens" if damage == "other names" else "token_ids": torch.zeros(4)},
        path,
    )
    if damage != "other names":
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -8])
    with pytest.raises(StageError, match=r"hidden states in x.safetensors cannot be read"):
        FileTransfer(path).load()
    assert not path.exists()
