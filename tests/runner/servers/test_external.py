"""A running server has the fingerprint of one that would be started, if it is the same vLLM with the same model."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from speculators.config import compose
from speculators.config.schema import Config
from speculators.errors import RecipeError, ServiceError
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import external, vllm
from speculators.runner.servers.server import free_port
from speculators.runner.store.artifacts import Store
from tests.loopback import reporting


class Start:
    """Servers that report what they are told to; gives their URLs."""

    def __init__(self) -> None:
        self.servers: list[ThreadingHTTPServer] = []

    def __call__(self, **reports: Any) -> str:
        self.servers.append(reporting(**reports))
        return f"http://127.0.0.1:{self.servers[-1].server_port}"


@pytest.fixture
def start() -> Iterator[Start]:
    made = Start()
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()


HUB = "hub:Qwen/Qwen3-8B@" + "a" * 40
ENGINES = [
    (HUB, {"model": "Qwen/Qwen3-8B"}, {"engine": "1.2.3"}),
    (HUB, {"version": "1.2.3+cpu", "model": "n", "root": "/models/Qwen3-8B"}, {"engine": "1.2.3"}),
    (HUB, {"model": "Qwen/Qwen3-4B"}, {"engine": "1.2.3", "model": "Qwen/Qwen3-4B"}),
    ("./mine", {"model": "n", "root": "{checkpoint}"}, {"engine": "1.2.3"}),
    ("./mine", {"model": "n", "root": "/elsewhere/other"}, {"engine": "1.2.3", "model": "/elsewhere/other"}),
    ("/a/best", {"model": "best", "root": "/b/best"}, {"engine": "1.2.3", "model": "/b/best"}),
]


@pytest.mark.parametrize(("source", "reports", "expected"), ENGINES)
def test_the_version_is_the_fingerprint_where_the_model_is_the_target(
    start: Start, tmp_path: Path, source: str, reports: dict[str, str], expected: dict[str, str]
) -> None:
    config = Config()
    config.target.source = source
    url = start(**{name: text.format(checkpoint=tmp_path) for name, text in reports.items()})
    assert external.fingerprint(config, {"serve.url": url}, tmp_path) == expected


def test_what_cannot_be_used_is_one_error_with_its_option(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    config, good = Config(), start(model="a/b")
    config.target.source = "hub:a/b@main"
    wrong = {
        f"http://127.0.0.1:{free_port()}": ("no vLLM server answers", "start it; or remove serve.url"),
        start(status=404): ("/version answers 404", "start it"),
        start(status=401): ("refuses the API key", "serve.api_key_env"),
        start(version=None): ("does not report a version", "vllm serve"),
    }
    for url, (message, hint) in wrong.items():
        with pytest.raises(ServiceError, match=message) as raised:
            external.fingerprint(config, {"serve.url": url}, None)
        assert f"serve.url={url}" in raised.value.message
        assert hint in raised.value.hint
    both = {"serve.baseline_url": good, "serve.speculative_url": start(version="1.3.0", model="a/b")}
    with pytest.raises(ServiceError, match=r"serves with vLLM 1\.3\.0, the server of serve\.baseline_url with"):
        external.fingerprint(config, both, None)
    config.serve.api_key_env = "NO_SUCH_KEY"
    with pytest.raises(ServiceError, match="NO_SUCH_KEY, which is not set"):
        external.fingerprint(config, {"serve.url": good}, None)


def keys_of(planner: Planner) -> dict[str, str]:
    names = {name: name for name in planner.graph}
    return {name: planner.step(name, names).key for name in planner.graph}


@pytest.mark.parametrize("pipeline", ["fused", "offline", "online"])
def test_keys_are_those_of_started_servers(
    start: Start, store: Store, monkeypatch: pytest.MonkeyPatch, pipeline: str
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    words = ["recipe=smollm2_eagle3", f"pipeline={pipeline}"]
    served = [f"serve.url={start(root='/elsewhere/SmolLM2-135M-Instruct.Q4_1.gguf')}", "serve.hidden_states_dir=/s"]
    own = Planner(compose.compose(words), store)
    assert keys_of(Planner(compose.compose([*words, *served]), store)) == keys_of(own)


def node(config: Config, kind: str) -> Node:
    return next(node for node in graph.build(config).values() if node.kind == kind)


def test_evaluate_starts_its_servers_unless_both_of_them_are_named(
    start: Start, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    words = ["recipe=smollm2_eagle3", f"serve.url={start()}", "serve.hidden_states_dir=/states"]
    config = compose.compose(words)
    assert not graph.starts_servers(node(config, "regenerate"), config)
    assert graph.starts_servers(node(config, "evaluate"), config)
    pair = [f"serve.baseline_url={start(model='target-a')}", f"serve.speculative_url={start(model='target-a')}/"]
    config = compose.compose([*words, *pair])
    assert not graph.starts_servers(node(config, "evaluate"), config)
    monkeypatch.setattr(vllm, "engine_version", lambda python: None)
    planner = Planner(config, store)
    image = planner.known("evaluate", {})
    assert image["service"] == {"engine": "1.2.3", "model": "target-a", "draft": "external"}
    config = compose.compose([*words, *pair, "target.dtype=bfloat16"])
    timed, compared = graph.phases(node(config, "evaluate"), config)
    assert [serving.url for serving in timed] == [pair[0].partition("=")[2], pair[1].partition("=")[2].rstrip("/")]
    assert [serving.url for serving in compared] == ["", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve.baseline_url=http://a:1"], "serve.speculative_url is empty"),
        (["serve.speculative_url=http://a:1"], "serve.baseline_url is empty"),
        (["serve.baseline_url=http://a:1", "serve.speculative_url=http://a:1/"], "compared to itself"),
        (
            [
                "serve.baseline_url=http://a:1",
                "serve.speculative_url=http://b:1",
                "evaluate.num_speculative_tokens=[2,3]",
            ],
            "proposes one number",
        ),
        (["serve.baseline_url=http://me:planted@a", "serve.speculative_url=http://b"], "contains a secret"),
    ],
)
def test_one_server_is_never_both_sides(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose.compose(["recipe=smollm2_eagle3", *words])
