"""An extraction by two workers on one machine: real processes of the executor, against one server of played states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from speculators import recipe
from speculators.config import Config
from speculators.job import read_request
from speculators.runner import vllm
from speculators.runner.events import Events
from speculators.runner.execute import Execution
from speculators.runner.plan import Planner
from speculators.runner.store import Store
from speculators.stages import extract
from tests.conftest import publish
from tests.stages.states_server import WIDTH, StatesServer

ROWS = [[row + 10, *range(2, 12)] for row in range(30)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatesServer]:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    (tmp_path / "states").mkdir()
    server = StatesServer(tmp_path / "states")
    yield server
    server.stop()


def extracting(tmp_path: Path, server: StatesServer, workers: int, until: str = "extract") -> Config:
    """The demo's extraction from a target of four layers, which is there already, by a server of somebody else's."""
    checkpoint = tmp_path / "target"
    checkpoint.mkdir(exist_ok=True)
    facts = {"num_hidden_layers": 4, "hidden_size": WIDTH, "vocab_size": 64}
    (checkpoint / "config.json").write_text(json.dumps(facts))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "tokenizer.json").write_text("{}")
    own = ["num_hidden_layers", "hidden_size", "vocab_size"]
    return recipe.compose([
        "recipe=smollm2_eagle3", "pipeline=offline", f"target.source={checkpoint}", "target.fidelity=0",
        "target.dtype=bfloat16", *[f"target.{name}=null" for name in own], "vocab.size=null",
        "speculator.layer_ids=[2]",
        "extract.shard_tokens=60", f"extract.workers={workers}", f"serve.url={server.url}",
        f"serve.states={server.directory}", f"until={until}",
    ])  # fmt: skip


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
        steps = Execution(planner=Planner(config, store), directory=directory, events=events, words=["test"]).run()
    finally:
        events.close()
    path = steps[config.until].path
    assert path is not None
    return path, [line.removeprefix("stage.started ") for line in seen if line.startswith("stage.started")]


def one_workers(tmp_path: Path, requests: Path) -> Path:
    """What one worker makes, of the same rows and here."""
    job = read_request(requests / "extract-0.json")
    job.inputs = {name: path for name, path in job.inputs.items() if not name.startswith("part.")}
    job.services = read_request(requests / "extract.1-0.json").services
    job.work = tmp_path / "one"
    job.output.mkdir(parents=True)
    extract.main(job)
    return job.output


def test_two_workers_make_what_one_makes_in_processes_of_their_own(tmp_path: Path, server: StatesServer) -> None:
    config, store = extracting(tmp_path, server, 2), Store(tmp_path / "store")
    made_beforehand(config, store)
    path, started = run(config, store, tmp_path / "run")
    assert sorted(started) == ["extract", "extract.1", "extract.2"]
    assert len(list(store.artifacts("extract"))) == 1
    assert len(server.asked) == 30
    made = (path, one_workers(tmp_path, tmp_path / "run/requests"))
    joined, alone = ({file.name: file.read_bytes() for file in directory.iterdir()} for directory in made)
    assert joined == alone
    assert len(joined) == 7, "five shards, the index and the picks"


def test_workers_may_be_runs_of_their_own_each_on_its_machine(tmp_path: Path, server: StatesServer) -> None:
    config, store = extracting(tmp_path, server, 2), Store(tmp_path / "store")
    made_beforehand(config, store)
    for part, asked in (("extract.2", 18), ("extract.1", 30)):
        _, started = run(extracting(tmp_path, server, 2, until=part), store, tmp_path / part)
        assert (started, len(server.asked)) == ([part], asked)
    path, started = run(config, store, tmp_path / "whole")
    assert (started, len(server.asked)) == (["extract"], 30)
    assert len(list(path.glob("shard-*"))) == 5
    assert len(list(store.artifacts("extract"))) == 1
