"""An extraction by two workers: real processes of an executor, against servers of played states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pytest

from speculators.config import compose
from speculators.config.schema import Config
from speculators.job import Endpoint, Request
from speculators.runner import executors
from speculators.runner.execution import execute
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from speculators.stages import extract
from tests.conftest import publish, write_header
from tests.runner.bare import BareExecutor
from tests.runner.fake_server import engine
from tests.stages import states_server
from tests.stages.states_server import WIDTH, StatesServer

ROWS = [[row + 10, *range(2, 12)] for row in range(30)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatesServer]:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    (tmp_path / "states").mkdir()
    server = StatesServer(tmp_path / "states")
    yield server
    server.stop()


def extracting(tmp_path: Path, served: Sequence[str], until: str = "extract") -> Config:
    """The demo's extraction from a target of four layers, which is there already, by two workers."""
    checkpoint = tmp_path / "target"
    checkpoint.mkdir(exist_ok=True)
    facts = {"num_hidden_layers": 4, "hidden_size": WIDTH, "vocab_size": 64}
    (checkpoint / "config.json").write_text(json.dumps(facts))
    write_header(checkpoint / "model.safetensors", vocab=64, hidden=WIDTH)
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    own = ["num_hidden_layers", "hidden_size", "vocab_size"]
    return compose.compose([
        "recipe=smollm2_eagle3", "pipeline=offline", f"target.source={checkpoint}", "target.min_greedy_agreement=0",
        "target.dtype=bfloat16", *[f"target.{name}=null" for name in own], "vocab.size=null",
        "speculator.target_layer_ids=[2]",
        "extract.shard_tokens=60", "extract.workers=2", *served, f"until={until}",
    ])  # fmt: skip


def by(server: StatesServer) -> list[str]:
    """A server of somebody else's."""
    return [f"serve.url={server.url}", f"serve.hidden_states_dir={server.directory}"]


def made_beforehand(config: Config, store: Store) -> None:
    """Everything up to the tokens."""
    planner, digests = Planner(config, store), dict[str, str]()
    for name, node in planner.graph.items():
        if name == "tokenize":
            step = planner.step(name, digests)
            rows = [
                {"input_ids": ids, "loss_mask": [1] * 11, "seq_len": 11, "id": f"c{i}"} for i, ids in enumerate(ROWS)
            ]
            work = store.work(node.kind, step.key)
            datasets.Dataset.from_list(rows).save_to_disk(work / "data")
            made = {"preimage": step.preimage, "record": {"tokens": 330}, "provenance": {"run": "earlier"}}
            digests[name] = store.publish(node.kind, step.key, **made, digest=None).digest
        elif name == "target":
            digests[name] = planner.step(name, {}).digest
        elif not name.startswith("extract"):
            digests[name] = publish(store, planner, name, digests)


def run(config: Config, store: Store, directory: Path) -> tuple[Path, list[str]]:
    """Where the extraction lies, and what was started for it."""
    seen: list[str] = []
    (directory / "logs").mkdir(parents=True)
    events = Events(directory / "events.jsonl", [lambda e: seen.append(f"{e['event']} {e.get('node', '')}")])
    try:
        steps = Execution(planner=Planner(config, store), directory=directory, events=events, argv=["test"]).run()
    finally:
        events.close()
    path = steps[config.until].path
    assert path is not None
    return path, [line.removeprefix("stage.started ") for line in seen if line.startswith("stage.started")]


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def one_workers(tmp_path: Path, requests: Path, server: StatesServer) -> Path:
    """What one worker makes, of the same rows and here."""
    job = Request.read(requests / "extract-0.json").job()
    job.inputs = {name: path for name, path in job.inputs.items() if not name.startswith("part.")}
    log, states = tmp_path / "log", server.directory
    endpoint = Endpoint(url=server.url, model="m", api_key="", mode="extract", directory=states, log=log)
    job.services, job.work = {"target": endpoint}, tmp_path / "one"
    job.output.mkdir(parents=True)
    extract.main(job)
    return job.output


def test_two_workers_make_what_one_makes_in_processes_of_their_own(tmp_path: Path, server: StatesServer) -> None:
    config, store = extracting(tmp_path, by(server)), Store(tmp_path / "store")
    made_beforehand(config, store)
    path, started = run(config, store, tmp_path / "run")
    assert sorted(started) == ["extract", "extract.1", "extract.2"]
    assert len(list(store.artifacts("extract"))) == 1
    assert len(server.asked) == 30
    joined, alone = files(path), files(one_workers(tmp_path, tmp_path / "run/requests", server))
    assert joined == alone
    assert len(joined) == 7, "five shards, the index and the picks"


def test_workers_may_be_runs_of_their_own_each_on_its_machine(tmp_path: Path, server: StatesServer) -> None:
    config, store = extracting(tmp_path, by(server)), Store(tmp_path / "store")
    made_beforehand(config, store)
    for part, asked in (("extract.2", 18), ("extract.1", 30)):
        _, started = run(extracting(tmp_path, by(server), until=part), store, tmp_path / part)
        assert (started, len(server.asked)) == ([part], asked)
    path, started = run(config, store, tmp_path / "whole")
    assert (started, len(server.asked)) == (["extract"], 30)
    assert len(list(path.glob("shard-*"))) == 5
    assert len(list(store.artifacts("extract"))) == 1


def test_workers_on_other_machines_have_a_server_each_and_make_the_same(
    tmp_path: Path, server: StatesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "is_remote", lambda config, kind: kind == "extract")
    monkeypatch.setattr(execute, "executor_of", lambda config, kind: BareExecutor())
    played = f"serve.python={engine(tmp_path, program=states_server.__file__)}"
    config, store = extracting(tmp_path, [played]), Store(tmp_path / "store")
    made_beforehand(config, store)
    path, started = run(config, store, tmp_path / "run")
    assert sorted(started) == ["extract", "extract.1", "extract.2"]
    requests = [json.loads((tmp_path / f"run/requests/extract.{n}-0.json").read_text()) for n in (1, 2)]
    assert len({request["services"]["target"]["url"] for request in requests}) == 2
    assert server.asked == [], "none of them is ours"
    assert files(path) == files(one_workers(tmp_path, tmp_path / "run/requests", server))
    assert not list((store.root / "services").iterdir())
