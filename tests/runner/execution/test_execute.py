"""The execution: what runs beside what, what is tried again, and what is said when it fails.

Workers and servers are played here: a worker is a line of `World.script`, and ends when it has been looked at as
often as that says. Real processes are in tests/crash.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speculators.config.algorithms import Eagle3
from speculators.config.choices import DataFormat, Device, Dtype
from speculators.config.execution import StageLimits
from speculators.config.schema import Config, Dataset
from speculators.errors import ContractError, RecipeError, RunError, ServiceError, StageError, StoreError
from speculators.job import ReusableRows
from speculators.runner import executors
from speculators.runner.execution import execute
from speculators.runner.execution.device_locks import DeviceLocks
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.execution.signals import Interrupted
from speculators.runner.hardware import GIB
from speculators.runner.planning import estimate, graph, plan
from speculators.runner.planning.graph import Kind
from speculators.runner.planning.plan import Planner
from speculators.runner.planning.reuse import Reuse
from speculators.runner.planning.sizes import Sizes
from speculators.runner.servers import vllm
from speculators.runner.servers.server import ServerSpec
from speculators.runner.store import upkeep
from speculators.runner.store.artifacts import Store
from tests.conftest import write_header
from tests.runner.machines import machine, pretend

KINDS = {
    "seed": Kind(version=1, gives=("grain",), target=False),
    "grind": Kind(version=1, gives=("flour",), takes={"grain": "grain"}, target=False),
    "mix": Kind(version=1, gives=("dough",), takes={"one": "flour", "other": "flour"}, target=False),
    "ask": Kind(version=1, gives=("grain",), serve="generate"),
    "press": Kind(version=1, gives=("oil",), takes={"grain": "grain"}, target=False, trains=True),
    "weigh": Kind(version=1, gives=("note",), takes={"grain": "grain"}, target=False, trains=True, measures=True),
    "brew": Kind(version=1, gives=("beer",), takes={"tokens": "grain", "oil": "oil"}, drawn="oil", trains=True),
}
TWO_BRANCHES = {
    "seed": {},
    "left": {"uses": "grind", "grain": "seed"},
    "right": {"uses": "grind", "grain": "seed2"},
    "seed2": {"uses": "seed"},
    "mix": {"one": "left", "other": "right"},
}


class World:
    """One recipe with played workers and servers, and what happened in it."""

    def __init__(
        self, tmp_path: Path, checkpoint: Path, pipeline: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.config = Config(recipe="mill", pipeline=pipeline)
        self.config.target.source = str(checkpoint)
        self.config.vocab.size = None
        self.config.hardware.device = Device.cpu
        self.monkeypatch = monkeypatch
        self.config.run.retry_wait = 0.01
        self.config.run.parallel = 4
        self.store = Store(tmp_path / "store")
        self.directory = tmp_path / "run"
        self.script: dict[str, list[Any]] = {}
        """Node -> how its workers end, one after the other: an exit code, or an error; without one, well."""
        self.lasts: dict[str, int] = {}
        """Node -> how often its worker is looked at before it ends."""
        self.seen: list[dict[str, Any]] = []
        self.env: dict[str, dict[str, str]] = {}
        self.workers: list[str] = []
        """Nodes whose worker runs."""
        self.servers: list[PlayedServer] = []
        self.when: dict[tuple[str, int], Callable[[], None]] = {}
        """(node, look) -> what happens at that look at its worker."""

    def has_gpus(self, count: int, gib: float = 80.0) -> None:
        """Let it be on a machine with so many GPUs."""
        pretend(self.monkeypatch, machine(count, gib))
        self.config.hardware.device, self.config.train.batch_tokens = Device.cuda, 8192

    def visible(self, node: str) -> set[str]:
        """The GPUs that a node's worker sees."""
        return set(filter(None, self.env[node].get("CUDA_VISIBLE_DEVICES", "").split(",")))

    def run(self, *words: str) -> Execution:
        """Carry it out once more."""
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        planner = Planner(self.config, self.store)
        events = Events(self.directory / "events.jsonl", [self.seen.append])
        execution = Execution(planner=planner, directory=self.directory, events=events, argv=["recipe=mill", *words])
        self.seen.clear()
        try:
            execution.run()
        finally:
            events.close()
        return execution

    def of(self, *kinds: str) -> list[str]:
        """`kind node` of the events of these kinds, in order."""
        return [
            f"{e['event'].partition('.')[2]} {e.get('node') or e['mode']}" for e in self.seen if e["event"] in kinds
        ]

    def together(self) -> int:
        """How many workers ran at the same time, at most."""
        most = now = 0
        for event in self.seen:
            now += {"stage.started": 1, "stage.finished": -1, "stage.failed": -1, "stage.retried": -1}.get(
                event["event"], 0
            )
            most = max(most, now)
        return most


class PlayedWorker:
    """See `executors.Handle`. A worker that ends well publishes the name of its node."""

    def __init__(self, world: World, request: Path, log: Path) -> None:
        self.world, self.log = world, log
        self.plain = json.loads(request.read_text())
        self.node = self.plain["node"]
        outcomes = world.script.get(self.node, [])
        self.outcome = outcomes.pop(0) if outcomes else 0
        self.left = world.lasts.get(self.node, 2)
        self.looks = 0
        self.asked: list[str] = []

    pid = 0

    def poll(self) -> int | None:
        code = self.look()
        if code is not None and self.node in self.world.workers:
            self.world.workers.remove(self.node)
        return code

    def look(self) -> int | None:
        self.looks += 1
        self.world.when.get((self.node, self.looks), lambda: None)()
        if "kill" in self.asked or ("terminate" in self.asked and self.outcome != "stubborn"):
            return -9 if "kill" in self.asked else 143
        if self.left > 0 or self.outcome == "stubborn":
            self.left -= 1
            return None
        if isinstance(self.outcome, RunError):
            return self.say(self.outcome)
        if self.outcome == 0:
            self.publish()
        return int(self.outcome)

    def terminate(self) -> None:
        self.asked.append("terminate")

    def kill(self) -> None:
        self.asked.append("kill")

    def say(self, error: RunError) -> int:
        work = Path(self.plain["work"])
        work.mkdir(parents=True, exist_ok=True)
        plain = {"message": error.message, "hint": error.hint, "kind": type(error).__name__}
        (work / "failure.json").write_text(json.dumps(plain))
        return 1

    def publish(self) -> None:
        self.outcome, stage, key = None, self.plain["stage"], self.plain["key"]
        self.left = 0
        if self.plain["forced"] or self.world.store.find(stage, key) is None:
            data = Path(self.plain["work"]) / "data"
            data.mkdir(parents=True, exist_ok=True)
            facts: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 8, "vocab_size": 32}
            facts["architectures"] = ["Eagle3"]
            (data / "config.json").write_text(json.dumps(facts))  # of target and draft; nobody looks into the others
            (data / "chat_template.jinja").write_text("{{ messages }}")
            write_header(data / "model.safetensors", facts["vocab_size"], facts["hidden_size"])
            described = {name: self.plain[name] for name in ("preimage", "provenance", "digest")}
            with self.world.store.claim(stage, key, lambda who: None):
                self.world.store.publish(stage, key, record={}, **described, replace=self.plain["forced"])
        self.outcome = 0


OWNERS: dict[str, PlayedServer] = {}
"""The servers that are up, or not yet gone."""


class PlayedServer:
    """See `server.Server`: ready at the second look."""

    transient = True

    def __init__(self, spec: ServerSpec, directory: Path) -> None:
        self.spec, self.name, self.mode = spec, spec.name, spec.mode
        self.state, self.looks = "starting", 0

    def start(self) -> None:
        OWNERS[self.name] = self

    def poll(self) -> str:
        self.looks += 1
        if self.state == "starting" and self.looks > 1:
            self.state = "ready"
        return self.state

    def failure(self) -> ServiceError:
        return ServiceError("the server was killed by SIGKILL", "its log")

    def request_entry(self) -> dict[str, Any]:
        return {"mode": self.mode}

    def worker_env(self) -> dict[str, str]:
        return {"KEY": self.name}

    def close(self) -> None:
        self.state = "dead"

    def gone(self) -> bool:
        OWNERS.pop(self.name, None)
        return True

    def kill(self) -> None: ...


@pytest.fixture
def mill(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    made: list[World] = []
    OWNERS.clear()
    for name, kind in KINDS.items():
        monkeypatch.setitem(graph.KINDS, name, kind)

    def make(pipeline: dict[str, dict[str, str]]) -> World:
        made.append(World(tmp_path, checkpoint, pipeline, monkeypatch))
        return made[0]

    class PlayedExecutor:
        def submit(self, request: Path, log: Path, env: dict[str, str]) -> PlayedWorker:
            worker = PlayedWorker(made[0], request, log)
            made[0].env[worker.node] = env
            made[0].workers.append(worker.node)
            return worker

    def served(spec: ServerSpec, home: Path) -> PlayedServer:
        made[0].servers.append(PlayedServer(spec, home))
        return made[0].servers[-1]

    monkeypatch.setattr(execute, "executor_of", lambda *_: PlayedExecutor())
    monkeypatch.setattr(execute, "MAX_POLL_SECONDS", 0.002)
    monkeypatch.setattr(vllm, "Server", served)
    monkeypatch.setattr("speculators.runner.servers.vllm.engine_version", lambda python: "1.2.3")
    return make


def test_branches_run_beside_each_other_and_what_joins_them_after_both(mill: Callable[..., World]) -> None:
    world = mill(TWO_BRANCHES)
    steps = world.run().steps
    assert list(steps) == list(Planner(world.config, world.store).graph), "in data-flow order"
    assert world.together() == 2
    assert world.of("stage.started")[-1] == "started mix"
    assert {s.state.name for s in steps.values()} == {"cached"}
    world.run()
    assert world.of("stage.started") == []


def test_places_and_memory_bound_what_runs_at_once(mill: Callable[..., World]) -> None:
    world = mill(TWO_BRANCHES)
    world.config.run.parallel = 1
    world.run()
    assert world.together() == 1
    world.config.run.parallel, world.config.run.memory_gib, world.config.force = 4, 1.5, list(TWO_BRANCHES)
    world.run()
    assert world.together() == 1


def test_one_stage_a_device_and_light_ones_beside_it(mill: Callable[..., World]) -> None:
    branches = {"seed": {}, "other": {"uses": "grind", "grain": "seed"}}
    world = mill({**branches, "a": {"uses": "press", "grain": "seed"}, "b": {"uses": "weigh", "grain": "seed"}})
    world.lasts = {"a": 20, "b": 20, "other": 5}
    world.has_gpus(2)
    world.config.train.num_processes = 1
    world.run()
    assert world.together() == 3
    assert {world.env[n]["CUDA_VISIBLE_DEVICES"] for n in "ab"} == {"0", "1"}
    world.config.hardware.gpus, world.config.force = 1, ["a", "b"]
    world.run()
    assert world.together() == 1


def test_a_stage_waits_while_another_run_has_its_device(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}, "left": {"uses": "grind", "grain": "seed"}, "press": {"grain": "seed"}})
    others = DeviceLocks(world.store.root / "locks", ["cpu"])
    assert others.acquire([0], 1) == [0]
    world.lasts["left"] = 20
    world.when["left", 4] = lambda: others.release_except(())
    world.run()
    assert world.of("stage.waiting", "stage.finished") == [
        "finished seed", "waiting press", "finished press", "finished left",
    ]  # fmt: skip
    assert others.acquire([0], 1, exclusive=True) == [0]


def test_speed_is_measured_alone_where_all_share_the_cores(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}, "b": {"uses": "weigh", "grain": "seed"}, "c": {"uses": "grind", "grain": "seed"}})
    world.lasts = {"b": 10, "c": 10}
    world.run()
    assert world.together() == 1


@pytest.mark.parametrize(("new", "prefilled", "servers"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_a_server_is_started_for_what_earlier_artifacts_lack_alone(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new: int, prefilled: int, servers: int
) -> None:
    monkeypatch.setitem(
        graph.KINDS, "reask", dataclasses.replace(KINDS["ask"], takes={"grain": "grain"}, reuses="answers")
    )
    rows = ReusableRows(conversations=tmp_path / "rows/conversations.jsonl")
    reuse = Reuse(sources=(rows,), artifacts=(), rows=3, new=new, prefilled=prefilled)
    monkeypatch.setattr(plan, "find_answers", lambda *_: reuse)
    world = mill({"serve": {}, "seed": {}, "reask": {"grain": "seed", "target": "serve"}})
    world.run()
    assert len(world.servers) == servers
    assert json.loads((world.directory / "requests/reask-0.json").read_text())["reuse"] == [rows.as_json()]


@pytest.fixture
def shared_out(mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> World:
    """An extraction by two workers, on two GPUs."""
    served = Kind(version=1, gives=("features",), takes={"tokens": "grain"}, serve="extract", derived=("layer_ids",))
    monkeypatch.setitem(graph.KINDS, "extract", served)
    world = mill({"serve": {}, "seed": {}, "extract": {"tokens": "seed", "target": "serve"}})
    world.config.extract.workers = 2
    world.has_gpus(2)
    world.lasts = {"extract.1": 10, "extract.2": 10}
    return world


def test_workers_of_one_stage_run_beside_each_other_each_with_a_server_and_are_joined(shared_out: World) -> None:
    steps = shared_out.run().steps
    assert shared_out.together() == 2
    assert len(shared_out.servers) == 2
    assert {server.spec.env["CUDA_VISIBLE_DEVICES"] for server in shared_out.servers} == {"0", "1"}
    assert {shared_out.env[f"extract.{i}"]["CUDA_VISIBLE_DEVICES"] for i in (1, 2)} == {""}, "it computes nothing"
    assert shared_out.of("stage.started")[-1] == "started extract"
    assert sorted(steps) == ["extract", "seed", "target"], "the parts are in the whole now"
    assert [a.key for a in shared_out.store.artifacts("extract")] == [steps["extract"].key]
    request = json.loads((shared_out.directory / "requests/extract-0.json").read_text())
    assert sorted(request["inputs"]) == ["part.00000", "part.00001", "target", "tokens"]
    assert sorted(request["provenance"]["inputs"]) == ["target", "tokens"]
    assert json.loads((shared_out.directory / "requests/extract.2-0.json").read_text())["derived"]["part"] == [1, 2]
    shared_out.run()
    shared_out.config.extract.workers = 1
    assert {s.state.name for s in shared_out.run().steps.values()} == {"cached"}
    assert shared_out.of("stage.started") == []


def test_a_worker_that_fails_costs_the_others_nothing(shared_out: World) -> None:
    shared_out.script["extract.2"] = [StageError("row 9 is bad", "mend it")]
    shared_out.lasts["extract.1"] = 40
    with pytest.raises(StageError, match=r"extract\.2: row 9 is bad") as raised:
        shared_out.run()
    assert "only=extract.2" in raised.value.hint
    assert shared_out.of("stage.finished") == ["finished seed", "finished extract.1"]
    assert [s.reason for s in Planner(shared_out.config, shared_out.store).plan()][2:] == [
        "made by run", "new", "new",
    ]  # fmt: skip
    shared_out.run()
    assert shared_out.of("stage.started") == ["started extract.2", "started extract"]


def test_workers_that_share_a_device_share_its_server_one_after_the_other(shared_out: World) -> None:
    shared_out.config.hardware.gpus = 1
    shared_out.config.run.stages = {"extract": StageLimits(retries=1)}
    shared_out.script["extract.1"] = [-9]
    shared_out.run()
    assert shared_out.together() == 1
    assert len(shared_out.servers) == 1
    assert shared_out.of("stage.retried") == ["retried extract.1"]


def test_workers_elsewhere_order_their_servers_there_and_take_nothing_here(
    shared_out: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "is_remote", lambda config, kind: kind == "extract")
    shared_out.config.hardware.gpus, shared_out.config.serve.port = 1, 8000
    shared_out.run()
    assert shared_out.together() == 2
    assert shared_out.servers == []
    for part in ("extract.1", "extract.2"):
        request = json.loads((shared_out.directory / f"requests/{part}-0.json").read_text())
        assert request["services"] == {}
        assert request["orders"]["target"]["mode"] == "extract"
        assert request["orders"]["target"]["config"]["serve"]["port"] == 0, "another job may be there"
        assert shared_out.env[part] == {}
    assert json.loads((shared_out.directory / "requests/extract-0.json").read_text())["orders"] == {}


def test_a_server_here_is_not_made_for_those_elsewhere(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Kind(version=1, gives=("features",), takes={"tokens": "grain"}, serve="extract")
    monkeypatch.setitem(graph.KINDS, "extract", served)
    pipeline = {"serve": {}, "ask": {"target": "serve"}, "extract": {"tokens": "ask", "target": "serve"}}
    world = mill(pipeline)
    monkeypatch.setattr(executors, "is_remote", lambda config, kind: kind == "extract")
    world.run()
    happened = world.of("service.starting", "service.stopped", "stage.started")
    assert happened == ["starting generate", "started ask", "stopped generate", "started extract"]


def test_each_phase_elsewhere_has_servers_of_its_own(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind(version=1, gives=("evaluation",), takes={"speculator": "grain"}, measures=True)
    monkeypatch.setitem(graph.KINDS, "evaluate", kind)
    monkeypatch.setattr(executors, "is_remote", lambda config, kind: kind == "evaluate")
    world = mill({"seed": {}, "evaluate": {"speculator": "seed"}})
    world.config.target.dtype = Dtype.bfloat16
    world.run()
    ordered = [json.loads((world.directory / f"requests/evaluate-{n}.json").read_text())["orders"] for n in (0, 1)]
    assert [sorted(orders) for orders in ordered] == [
        ["baseline", "speculative"],
        ["baseline_float32", "speculative_float32"],
    ]
    assert [orders[name]["dtype"] for orders in ordered for name in sorted(orders)] == ["bfloat16"] * 2 + [
        "float32"
    ] * 2
    assert ordered[1]["speculative_float32"]["draft"].endswith("/best")


def test_a_given_draft_is_fetched_and_measured_with_each_number_of_tokens(mill: Callable[..., World]) -> None:
    """Its config.json says how it is served, and a dataset may have the name that the hub gives it."""
    world = mill({"evaluate": {"speculator": "draft"}})
    commit = "0" * 40
    world.config.evaluate.draft, world.config.speculator = f"hub:org/draft@{commit}", Eagle3()
    rows = Dataset(source=f"hub:acme/lines@{commit}/rows.jsonl", format=DataFormat.prompts)
    world.config.evaluate.datasets = {"acme/lines": rows}
    world.config.evaluate.num_speculative_tokens, world.config.target.dtype = [2, 5], Dtype.float32
    world.run()
    assert world.of("stage.started").count("started evaluate") == 2
    assert [(s.mode, s.spec.num_speculative_tokens) for s in world.servers] == [
        ("baseline", 0), ("speculative", 2), ("speculative", 5),
    ]  # fmt: skip


def test_a_failure_starts_nothing_more_lets_the_others_end_and_is_raised(mill: Callable[..., World]) -> None:
    world = mill(TWO_BRANCHES)
    world.script["seed"] = [ContractError("the rows do not fit", "take others")]
    world.lasts = {"seed2": 30}
    with pytest.raises(ContractError, match=r"^seed: the rows do not fit$") as raised:
        world.run("until=mix", "train.lr=1e-3")
    assert world.of("stage.finished", "stage.failed") == ["failed seed", "finished seed2"]
    assert world.of("stage.started") == ["started seed", "started seed2"]
    log = world.directory / "logs/seed.log"
    assert raised.value.hint == (
        f"take others\n\nlog:    {log}\nagain:  speculators-run recipe=mill train.lr=1e-3 only=seed"
    )


def test_what_was_killed_is_tried_again_with_a_number_and_a_growing_pause(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}})
    world.script["seed"] = [-9, 137, 0]
    artifact = world.run().steps["seed"].artifact
    assert artifact is not None
    assert artifact.provenance["attempt"] == 3
    retried = [e for e in world.seen if e["event"] == "stage.retried"]
    assert [(e["attempt"], e["seconds"]) for e in retried] == [(1, 0.01), (2, 0.02)]
    assert retried[0]["message"] == "seed was killed by SIGKILL: probably out of memory"
    assert [e["attempt"] for e in world.seen if e["event"] == "stage.started"] == [1, 2, 3]
    heads = (world.directory / "logs/seed.log").read_text().splitlines()
    assert [line.partition(",")[0] for line in heads] == [f"--- seed: attempt {n}" for n in (1, 2, 3)]


def test_the_attempts_end_and_the_last_words_of_the_log_are_shown(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}})
    world.config.run.stages = {"seed": StageLimits(retries=1)}
    world.script["seed"] = [-11, -11]
    (world.directory / "logs").mkdir(parents=True)
    (world.directory / "logs/seed.log").write_text("".join(f"line {n}\n" for n in range(60)))
    with pytest.raises(StageError) as raised:
        world.run()
    first, blank, *shown = raised.value.message.split("\n")
    assert first == "seed was killed by SIGSEGV: a native library crashed"
    assert blank == ""
    assert len(shown) == 40
    assert "line 59" in shown
    assert shown[-1].startswith("--- seed: attempt 2, ")
    assert "only=seed" in raised.value.hint


@pytest.mark.parametrize("outcome", [RecipeError("no", "yes"), ContractError("no", "yes"), 2, 1, 255])
def test_what_a_stage_says_itself_is_final(mill: Callable[..., World], outcome: Any) -> None:
    world = mill({"seed": {}})
    world.script["seed"] = [outcome]
    with pytest.raises(RunError):
        world.run()
    assert world.of("stage.started") == ["started seed"]


def test_a_stage_that_takes_too_long_is_stopped_and_tried_again(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "WORKER_GRACE_SECONDS", 0.05)
    world = mill({"seed": {}})
    world.config.run.stages = {"seed": StageLimits(time_limit=0.05, retries=1)}
    world.script["seed"] = ["stubborn", 0]
    world.run()
    assert world.of("stage.started", "stage.retried") == ["started seed", "retried seed", "started seed"]
    world.script["seed"], world.config.force = ["stubborn", "stubborn"], ["seed"]
    with pytest.raises(StageError, match=r"seed was stopped after 0\.05 s, its run\.time_limit"):
        world.run()


@pytest.mark.parametrize("full", ["free_bytes", "held"])
def test_a_store_that_runs_full_stops_the_stage_while_it_can_still_write_where_it_was(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    world = mill({"seed": {}})
    world.config.run.quota_gib, world.lasts["seed"] = 1.0, 10**6
    room = {"free_bytes": 2**40, "held": 0}
    monkeypatch.setattr(estimate, "free_bytes", lambda root: room["free_bytes"])
    monkeypatch.setattr(upkeep, "store_bytes", lambda store: room["held"])
    monkeypatch.setattr(estimate, "DISK_CHECK_SECONDS", 0.0)
    world.when["seed", 3] = lambda: room.update({full: {"free_bytes": 2**20, "held": 2**31}[full]})
    said = {"free_bytes": "almost full: 1 MiB are free", "held": r"now holds 2\.0 GiB, run\.quota_gib allows 1\.0 GiB"}
    with pytest.raises(StoreError, match=said[full]) as raised:
        world.run()
    assert "free space" in raised.value.hint
    assert world.of("stage.started", "stage.retried", "stage.failed") == ["started seed", "failed seed"]


def test_a_small_disk_is_used_to_its_end(mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda root: 2**20)
    monkeypatch.setattr(estimate, "DISK_CHECK_SECONDS", 0.0)
    assert mill({"seed": {}}).run().steps["seed"].artifact is not None


def test_limits_of_no_stage_are_refused_before_anything_runs(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}})
    world.config.run.stages = {"sead": StageLimits()}
    with pytest.raises(RecipeError, match="no stage `sead`"):
        world.run()


SERVED = {
    "serve": {},
    "ask": {"target": "serve"},
    "ask2": {"uses": "ask", "target": "serve"},
    "press": {"grain": "ask"},
}


def test_a_server_is_shared_and_given_back_before_its_device_is_needed(mill: Callable[..., World]) -> None:
    world = mill(SERVED)
    world.config.force = ["ask", "ask2"]
    world.run()
    order = world.of("service.starting", "service.stopped", "stage.started", "stage.finished")
    assert order[:5] == ["starting generate", "started ask", "finished ask", "started ask2", "finished ask2"], (
        "the stage whose server is up goes before the one that would have it stopped"
    )
    assert order[5:] == ["stopped generate", "started press", "finished press"]
    assert "KEY" in world.env["ask"]


KNOWN = Sizes(parameters=8_000_000_000, heads=32, key_value_heads=8, cache_values=200_000_000, trained=400_000_000)


@pytest.mark.parametrize(("gpus", "gib"), [(1, 80), (2, 80), (2, 24), (3, 80), (8, 80), (8, 24)])
def test_no_gpu_is_overfull_at_any_time_of_a_run_whatever_the_machine(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch, gpus: int, gib: float
) -> None:
    measuring = Kind(version=1, gives=("note",), takes={"speculator": "beer"}, measures=True)
    monkeypatch.setitem(graph.KINDS, "evaluate", measuring)
    monkeypatch.setattr(Planner, "_sizes", lambda self: KNOWN)
    world = mill({**DRAWING, "press": {"grain": "ask"}, "evaluate": {"speculator": "brew"}})
    world.has_gpus(gpus, gib)
    world.lasts = dict.fromkeys(world.config.pipeline, 6)
    workers: dict[str, set[str]] = {}

    def look() -> None:
        load = dict.fromkeys(map(str, range(gpus)), 0.0)
        for server in OWNERS.values():
            share = float(server.spec.argv[server.spec.argv.index("--gpu-memory-utilization") + 1])
            load |= {device: load[device] + share for device in server.spec.env["CUDA_VISIBLE_DEVICES"].split(",")}
        for node in world.workers:
            training = KNOWN.training_bytes(world.config, max(1, len(world.visible(node))), fsdp=False) / (gib * GIB)
            load |= {device: load[device] + training for device in world.visible(node)}
            workers[node] = world.visible(node)
        assert max(load.values()) <= 1, (load, world.workers)

    world.when |= {(node, number): look for node in world.config.pipeline for number in (1, 3, 5)}
    world.run()
    sizes = {server.mode: server.spec.argv for server in world.servers}
    parallel = {mode: [a for a in argv if a.endswith("-parallel-size")] for mode, argv in sizes.items()}
    assert parallel["baseline"] == parallel["speculative"]
    assert "--enable-prefix-caching" in sizes["generate"]
    assert not any("--enforce-eager" in argv for argv in sizes.values())
    assert workers["ask"] == workers["evaluate"] == set()
    assert workers["brew"]
    assert workers["press"]
    starts = world.of("service.starting")
    assert len(starts) == len(set(map(id, world.servers)))
    assert starts[:2] == ["starting generate", "starting extract"]
    in_turn = ["starting speculative", "starting baseline"]
    assert [s for s in starts[2:] if s in in_turn][:2] == (in_turn if gpus == 1 else in_turn[::-1])


DRAWING = {"serve": {}, "ask": {"target": "serve"}, "brew": {"tokens": "ask", "target": "serve"}}


def test_a_recipe_made_for_other_gpus_is_planned_anywhere_and_runs_where_they_are(mill: Callable[..., World]) -> None:
    world = mill(SERVED)
    world.has_gpus(1, 80)
    world.config.hardware.gpus, world.config.hardware.gpu_memory_gib = 8, 141.0
    message = r"gpu_memory_gib=141: the recipe is made for 8 x GPU \(141 GiB\), and this machine has 1 x NVIDIA H100"
    with pytest.raises(RecipeError, match=message) as caught:
        world.run()
    assert caught.value.hint == "hardware=auto, to use the GPUs of this machine"
    assert world.servers == []
    world.has_gpus(8, 141)
    world.run()
    assert world.servers


def test_a_training_that_draws_runs_on_a_gpu_beside_its_server(mill: Callable[..., World]) -> None:
    world = mill(DRAWING)
    world.has_gpus(2)
    world.config.serve.data_parallel = 1
    world.run()
    order = ["starting generate", "started ask", "starting extract", "started brew"]
    assert world.of("service.starting", "stage.started") == order, "answers come from a server with prefix caching"
    generating, extracting = world.servers
    assert generating.spec.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert {extracting.spec.env["CUDA_VISIBLE_DEVICES"], world.env["brew"]["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
    assert world.env["brew"]["KEY"] == extracting.name


def test_on_a_cpu_a_training_that_draws_has_a_server_that_leaves_it_cores(
    mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    world = mill(DRAWING)
    world.run()
    order = ["starting generate", "started ask", "stopped generate", "starting extract", "started brew"]
    assert world.of("service.starting", "service.stopped", "stage.started")[:5] == order
    assert [server.spec.env["OMP_NUM_THREADS"] for server in world.servers] == ["3", "2"]
    assert world.env["brew"]["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in world.env["ask"]


def test_what_somebody_made_while_a_stage_waited_for_room_is_not_made_again(mill: Callable[..., World]) -> None:
    world = mill(SERVED)
    world.run()
    assert world.of("stage.started") == ["started ask", "started press"]
    decided = [e["state"] for e in world.seen if e["event"] == "stage.decided" and e["node"] == "ask2"]
    assert decided == ["run", "cached"]


def test_a_server_that_dies_in_use_is_started_again_and_the_stage_goes_on(mill: Callable[..., World]) -> None:
    world = mill({"serve": {}, "ask": {"target": "serve"}})
    world.lasts = {"ask": 6}
    world.when["ask", 3] = lambda: setattr(world.servers[0], "state", "dead")
    world.run()
    assert len(world.servers) == 2
    happened = world.of("service.starting", "service.stopped", "stage.started", "stage.retried", "stage.finished")
    assert happened == [
        "starting generate", "started ask", "retried ask", "stopped generate", "starting generate", "started ask",
        "finished ask", "stopped generate",
    ]  # fmt: skip


def test_a_worker_that_loses_its_server_first_waits_to_see_it_dead(mill: Callable[..., World]) -> None:
    world = mill({"serve": {}, "ask": {"target": "serve"}})
    world.script["ask"] = [ServiceError("the connection broke", "look at its log"), 0]
    world.when["ask", 3] = lambda: setattr(world.servers[0], "state", "dead")
    world.lasts = {"ask": 2}
    world.run()
    assert world.of("stage.retried") == ["retried ask"]


def test_a_server_that_keeps_dying_fails_the_stage(mill: Callable[..., World]) -> None:
    world = mill({"serve": {}, "ask": {"target": "serve"}})
    world.config.run.retries = 1
    world.when["ask", 1] = lambda: setattr(world.servers[-1], "state", "dead")
    with pytest.raises(ServiceError, match="the server was killed by SIGKILL"):
        world.run()
    assert len(world.servers) == 2
    assert world.of("stage.failed") == ["failed ask"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_stages_stop_in_order(mill: Callable[..., World], number: int) -> None:
    world = mill(TWO_BRANCHES)
    world.lasts = {"seed": 10**6, "seed2": 10**6}
    world.when["seed", 3] = lambda: signal.raise_signal(number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop:
        world.run()
    assert stop.value.exit_code == 128 + number
    assert [e["seconds"] for e in world.seen if e["event"] == "run.stopping"] == [execute.WORKER_GRACE_SECONDS]
    assert world.of("stage.started") == ["started seed", "started seed2"]
    assert signal.getsignal(number) is before


def test_a_second_signal_kills_what_does_not_want_to_stop(mill: Callable[..., World]) -> None:
    world = mill({"seed": {}})
    world.script["seed"] = ["stubborn"]
    world.when["seed", 3] = lambda: signal.raise_signal(signal.SIGINT)
    world.when["seed", 20] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted):
        world.run()


def test_equal_bytes_cut_off_what_follows(mill: Callable[..., World]) -> None:
    world = mill(TWO_BRANCHES)
    world.run()
    world.config.force = ["seed"]
    world.run()
    assert world.of("stage.started") == ["started seed"]


@pytest.mark.parametrize("known", [True, False], ids=["facts from the recipe", "facts from the checkpoint"])
def test_a_source_is_fetched_once_for_all_that_read_it(mill: Callable[..., World], known: bool) -> None:
    world = mill({**SERVED, "extra": {"uses": "press", "grain": "ask2"}})
    target = world.config.target
    target.source = "pypi:model==1/model.gguf@sha256:" + "0" * 64
    if known:
        target.num_hidden_layers, target.hidden_size, target.vocab_size = 4, 8, 32
    world.config.force = ["ask", "ask2"]
    world.run()
    assert world.of("stage.started")[:3] == ["started target", "started ask", "started ask2"]
    world.config.force = []
    world.run()
    assert world.of("stage.started") == []


def test_a_source_that_everybody_has_is_not_fetched_unless_it_is_asked_for(mill: Callable[..., World]) -> None:
    world = mill({"serve": {}, "ask": {"target": "serve"}})
    world.config.target.source = "pypi:model==1/model.gguf@sha256:" + "0" * 64
    world.run()
    (found,) = world.store.artifacts("fetch")
    world.store.quarantine("fetch", found.key)
    world.run()
    assert world.of("stage.started") == []
    world.config.until = "target"
    assert world.run().steps["target"].path is not None
    assert world.of("stage.started") == ["started target"]


def test_a_chain_is_walked_without_recursion(mill: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.KINDS, "sift", Kind(version=1, gives=("grain",), takes={"grain": "grain"}, target=False))
    names = ["seed", *(f"s{n}" for n in range(150))]
    world = mill({"seed": {}} | {b: {"uses": "sift", "grain": a} for a, b in itertools.pairwise(names)})
    world.lasts = dict.fromkeys(names, 0)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 130)
    try:
        assert list(world.run().steps) == names
    finally:
        sys.setrecursionlimit(limit)
