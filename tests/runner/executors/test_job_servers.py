"""Servers beside a worker: started in its job, known to it alone, and gone with it, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from speculators.config.algorithms import Eagle3
from speculators.config.choices import Device
from speculators.config.execution import ExecutorOptions
from speculators.config.fields import to_builtins
from speculators.config.schema import Config
from speculators.errors import ServiceError
from speculators.runner import executors
from speculators.runner.execution import execute
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.executors import Handle
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Kind
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import guard, vllm
from speculators.runner.store.artifacts import Store
from tests.runner.bare import BareExecutor
from tests.runner.executors.test_executors import REMOTE, SUBMITIT, _ray_ends_here, far_end, slurm, submit
from tests.runner.fake_server import engine
from tests.test_worker import artifact, ended, request, until, until_holding, work, world

__all__ = ["_ray_ends_here", "slurm", "world"]

ALL = ["bare", *REMOTE]
CRASH = Path(__file__).parents[2] / "crash"


def start(name: str, world: Path, path: Path) -> Handle:
    return BareExecutor().submit(path, world / "log", {}) if name == "bare" else submit(name, world, path)


def served(world: Path, *options: str, **told: Any) -> Path:
    """A request whose worker is served by a fake server with these options, which leaves a process behind."""
    path = request(world, **told)
    config = Config()
    config.hardware.device = Device.cpu
    config.serve.python = engine(world, "--detach", f"{world}/orphan", *options)
    order = vllm.ServerOrder(
        config=config, mode="generate", dtype="float32", target=str(world / "model"), max_model_len=64,
        directories=str(world / "store/services"), logs=str(world / "logs"),
    )  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), "orders": {"target": to_builtins(order)}}))
    return path


def until_served(world: Path) -> list[int]:
    """Pids of the server's guard, its own and those below it, as soon as it has left its process behind."""
    until(lambda: (world / "orphan").exists() and (world / "orphan").read_text() != "", "the server is started")
    orphan = int((world / "orphan").read_text())

    def recorded() -> bool:
        return any(f'"pid": {orphan},' in file.read_text() for file in world.glob("store/services/*/pids.json"))

    until(recorded, "its guard knows all of it")
    [file] = world.glob("store/services/*/pids.json")
    note = json.loads(file.read_text())
    return [note["guard"]["pid"], *(process["pid"] for process in note["processes"])]


def nothing_left(world: Path, pids: list[int]) -> None:
    assert len(pids) > 2
    until(lambda: not any(guard.start_time(pid) for pid in pids), "nothing of the server is left")
    until(lambda: not list((world / "store/services").iterdir()), "its directory is removed")


def variable(pid: int, name: str) -> str:
    variables = (guard.PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return next(v.decode().partition("=")[2] for v in variables if v.startswith(f"{name}=".encode()))


@pytest.mark.parametrize("name", ALL)
def test_a_worker_knows_its_server_whose_key_is_in_no_file_and_which_ends_with_it(name: str, world: Path) -> None:
    path = served(world, count=4, hold=2)
    handle = start(name, world, path)
    until_holding(path)
    pids, told = until_served(world), json.loads(path.read_text())["services"]["target"]
    key = variable(handle.pid, told["api_key_env"])
    assert len(key) >= 32
    headers = {"Authorization": f"Bearer {key}"}
    with urlopen(Request(f"{told['url']}/v1/models", headers=headers), timeout=10) as answer:
        assert json.loads(answer.read())["data"] == [{"id": told["model"]}]
    assert Path(told["directory"]).is_dir()
    assert [p for p in world.rglob("*") if p.is_file() and key.encode() in p.read_bytes()] == []
    assert {variable(pid, "PYTHONPATH").partition(os.pathsep)[0] for pid in pids[1:2]} == {
        str(Path(told["directory"]).parent / "packages")
    }
    (work(path) / "holding").unlink()
    assert ended(handle, 60) == 0
    assert artifact(path) is not None
    nothing_left(world, pids)
    assert Path(told["log"]).parent == world / "logs"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_asked_to_end_it_ends_with_its_server(name: str, how: str, world: Path) -> None:
    path = served(world, *(["--stubborn"] if how == "kill" else []), hold=2)
    handle = start(name, world, path)
    until_holding(path)
    pids = until_served(world)
    getattr(handle, how)()
    assert ended(handle, 30) == {"terminate": 143, "kill": -signal.SIGKILL}[how]
    nothing_left(world, pids)
    assert (work(path) / "data/lines").read_text() == "xx"


def test_asked_to_stop_while_its_server_starts_the_worker_does_not_begin(world: Path) -> None:
    path = served(world, "--late", "600")
    handle = start("bare", world, path)
    pids = until_served(world)
    assert handle.poll() is None
    handle.terminate()
    assert ended(handle, 30) == 143
    nothing_left(world, pids)
    assert not work(path).exists()


RUNNER = (
    "import sys, time\nfrom pathlib import Path\nfrom tests.runner.executors.test_job_servers import start\n"
    "handle = start(sys.argv[1], *map(Path, sys.argv[2:]))\ntime.sleep(600)"
)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("late", ["0", "600"], ids=["in use", "starting"])
def test_when_the_runner_is_killed_nothing_of_the_server_is_left(name: str, late: str, world: Path) -> None:
    path = served(world, "--late", late, hold=2)
    argv = [sys.executable, "-c", RUNNER, name, str(world), str(path)]
    with subprocess.Popen(argv) as runner:
        pids = until_served(world)
        if late == "0":
            until_holding(path)
        runner.kill()
    nothing_left(world, pids)
    assert work(path).exists() == (late == "0")


def test_when_the_far_end_is_killed_nothing_of_the_server_is_left(world: Path) -> None:
    path = served(world, hold=2)
    handle = start("bare", world, path)
    until_holding(path)
    pids = until_served(world)
    os.kill(far_end(handle), signal.SIGKILL)
    assert ended(handle, 30) == -signal.SIGKILL
    until(lambda: not any(guard.start_time(pid) for pid in pids), "nothing of the server is left")


@SUBMITIT
def test_a_server_in_a_job_of_slurm_sees_the_gpus_that_the_job_was_given(slurm: Path) -> None:
    path = served(slurm, hold=2)
    handle = executors.executor("slurm", ExecutorOptions()).submit(path, slurm / "log", {})
    until_holding(path)
    pids = until_served(slurm)
    assert {variable(pid, "CUDA_VISIBLE_DEVICES") for pid in pids} == {"7"}
    handle.terminate()
    assert ended(handle, 30) == 143
    nothing_left(slurm, pids)


@SUBMITIT
def test_a_job_that_has_to_go_ends_its_server_and_has_another_when_it_is_queued_again(world: Path) -> None:
    path = served(world, count=5, hold=3)
    handle = start("submitit", world, path)
    until_holding(path)
    first, pids = json.loads(path.read_text())["services"]["target"]["model"], until_served(world)
    os.kill(far_end(handle), signal.SIGUSR2)
    assert ended(handle, 60) == 0
    assert not any(guard.start_time(pid) for pid in pids)
    assert json.loads(path.read_text())["services"]["target"]["model"] != first
    made = artifact(path)
    assert made is not None
    assert made.record["attempts"] == 2


def said(path: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((work(path) / "failure.json").read_text())
    return plain


@pytest.mark.parametrize("name", ALL)
def test_a_server_that_dies_in_use_stops_the_worker_and_may_be_tried_again(name: str, world: Path) -> None:
    path = served(world, "--die", f"{world}/die", "--say", "RuntimeError:lost-the-device", hold=2)
    handle = start(name, world, path)
    until_holding(path)
    pids = until_served(world)
    (world / "die").touch()
    assert ended(handle, 30) == 1
    assert said(path)["message"] == (
        "the server ended with exit code 1 while it was in use: RuntimeError:lost-the-device"
    )
    assert (said(path)["kind"], said(path)["transient"]) == ("ServiceError", True)
    assert (work(path) / "data/lines").read_text() == "xx"
    nothing_left(world, pids)


def test_a_server_that_does_not_start_is_said_and_final(world: Path) -> None:
    (world / "die").touch()
    path = served(world, "--late", "600", "--die", f"{world}/die", "--say", "ValueError:no-such-layer")
    assert ended(start("bare", world, path), 60) == 1
    assert "before it was ready: ValueError:no-such-layer" in said(path)["message"]
    assert str(world / "logs/vllm-generate-float32-") in said(path)["hint"]
    assert said(path)["transient"] is False
    assert not (work(path) / "data").exists()


def test_where_no_directory_can_be_made_for_a_server_the_error_says_so(world: Path) -> None:
    path = served(world)
    (world / "store").mkdir()
    (world / "store/services").touch()
    assert ended(start("bare", world, path), 60) == 1
    assert said(path)["message"].startswith(f"cannot write into {world}/store/services/")


class Run:
    """A run of one stage that asks a server for every line, by jobs that are taken to be elsewhere."""

    def __init__(self, world: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
        self.world, self.events = world, list[dict[str, Any]]()
        kind = Kind(version=1, gives=("lines",), serve="generate")
        monkeypatch.setitem(graph.KINDS, "query", kind)
        monkeypatch.setattr(executors, "is_remote", lambda config, kind: kind == "query")
        monkeypatch.setattr(execute, "executor_of", lambda config, kind: BareExecutor())
        path = os.pathsep.join([str(CRASH / "site"), str(CRASH.parents[1])])
        for name, value in {"PYTHONPATH": path, "CRASH_WORLD": str(world), "CRASH_PACE": "0.3"}.items():
            monkeypatch.setenv(name, value)
        self.config = Config(recipe="asking", speculator=Eagle3(), pipeline={"serve": {}, "query": {"target": "serve"}})
        self.config.target.source, self.config.vocab.size = str(world / "checkpoint"), None
        self.config.serve.python = engine(world, *options)
        self.config.run.retry_wait = 0.1

    def heard(self, event: dict[str, Any]) -> None:
        """The server dies in the middle of the first attempt."""
        self.events.append(event)
        if event["event"] == "stage.progress" and not self.of("stage.retried"):
            (self.world / "die").touch()
        if event["event"] == "stage.retried":
            (self.world / "die").unlink()

    def go(self) -> Path:
        """The lines that it makes."""
        directory = self.world / "run"
        (directory / "logs").mkdir(parents=True)
        events = Events(directory / "events.jsonl", [self.heard])
        planner = Planner(self.config, Store(self.world / "store"))
        try:
            steps = Execution(planner=planner, directory=directory, events=events, argv=["test"]).run()
        finally:
            events.close()
        path = steps["query"].path
        assert path is not None
        return path / "lines"

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def test_a_run_hears_why_a_server_elsewhere_died_tries_again_and_goes_on(
    world: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(world, monkeypatch, "--die", f"{world}/die", "--say", "RuntimeError:lost-the-device")
    lines = run.go().read_text().splitlines()
    assert [line.split()[1] for line in lines] == [str(n) for n in range(6)], "and none twice"
    [retried] = run.of("stage.retried")
    assert retried["message"] == (
        "query: the server ended with exit code 1 while it was in use: RuntimeError:lost-the-device"
    )
    assert len(list((world / "run/logs").glob("vllm-generate-*.log"))) == 2
    assert run.of("service.starting") == [], "none here"
    assert not list((world / "store/services").iterdir())


def test_a_run_says_why_a_server_elsewhere_never_started(
    world: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "die").touch()
    run = Run(world, monkeypatch, "--die", f"{world}/die", "--late", "600", "--say", "CUDA-out-of-memory")
    with pytest.raises(ServiceError, match="before it was ready: CUDA-out-of-memory") as raised:
        run.go()
    assert "only=query" in raised.value.hint
    assert run.of("stage.retried") == []
