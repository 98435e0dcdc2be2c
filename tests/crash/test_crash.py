"""Something is killed, at a named point or at any time; then nothing half-made is seen, nothing of ours is left, and
the next run ends with the bytes of one that nobody disturbed.

Runners are real, stages trivial (`stages/`), servers the fake one. What is killed where is said by `site/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speculators.runner.servers import guard
from speculators.runner.servers.server import reap_left_overs
from speculators.runner.store.artifact import damage
from speculators.runner.store.artifacts import Store
from tests.conftest import write_header

HERE = Path(__file__).parent
LEFT_SECONDS = 5.0
"""So long after a death something of the dead run may still be there."""
STAGES = ("seed", "tally", "query")
pytestmark = pytest.mark.skipif(not guard.HAS_PROC, reason="without /proc nobody can say what is left")


class World:
    """A directory with a store in which runs are started and killed."""

    def __init__(self, root: Path, recipe: str) -> None:
        self.root, self.recipe = root, recipe
        root.mkdir(exist_ok=True)
        checkpoint = root / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text('{"num_hidden_layers": 4, "hidden_size": 8, "vocab_size": 32}')
        write_header(checkpoint / "model.safetensors", vocab=32, hidden=8)
        (checkpoint / "tokenizer.json").write_text("{}")
        self._count = 0

    def start(self, **env: str) -> subprocess.Popen[str]:
        """Start a run; all its processes carry its number in their environment."""
        self._count += 1
        path = os.pathsep.join([str(HERE / "site"), str(HERE.parents[1])])
        return subprocess.Popen(
            [sys.executable, str(HERE / "crash_runner.py"), str(self.root), self.recipe],
            env={**os.environ, "PYTHONPATH": path, "CRASH_WORLD": str(self.root), "CRASH_RUN": self.mark(), **env},
            stderr=subprocess.PIPE,
            text=True,
        )

    def mark(self) -> str:
        return f"{self.root}#{self._count}"

    def run(self, **env: str) -> tuple[int, str]:
        """A run to its end: exit code and what it said."""
        with self.start(**env) as process:
            said = process.communicate(timeout=120)[1]
        return process.returncode, said

    def processes(self, mark: str) -> list[int]:
        """What is alive of one run."""
        wanted, found = f"CRASH_RUN={mark}".encode(), []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0") and guard.start_time(int(name)):
                    found.append(int(name))
            except OSError:
                continue
        return found

    def nothing_half_made(self) -> None:
        """Whatever has an artifact's name is whole, bytes included."""
        store = Store(self.root / "store")
        for path in (self.root / "store/artifacts").glob("*/[!.]*/[!.]*"):
            made = store.find(path.parents[1].name, path.name)
            assert made is not None, f"{path} is not whole"
            assert damage(made) == ""

    def nothing_left(self, mark: str, died: float) -> None:
        while (alive := self.processes(mark)) and time.monotonic() < died + LEFT_SECONDS:
            time.sleep(0.02)
        assert [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in alive] == []

    def wait_until_recorded(self, victim: int) -> None:
        """If `victim` is a guard, wait until it has recorded the detached process, which nothing can find otherwise."""
        deadline = time.monotonic() + LEFT_SECONDS
        with contextlib.suppress(OSError):
            while b"guard.py" in Path(f"/proc/{victim}/cmdline").read_bytes() and time.monotonic() < deadline:
                orphan = self.root / "orphan"
                records = "".join(path.read_text() for path in self.root.glob("store/services/*/pids.json"))
                if orphan.exists() and f'"pid": {orphan.read_text() or None},' in records:
                    return
                time.sleep(0.01)

    def bytes(self) -> dict[str, str]:
        """Digest of the manifest by stage and key."""
        store = Store(self.root / "store")
        return {
            f"{a.stage} {a.key}": (a.path / "manifest.jsonl").read_text() for s in STAGES for a in store.artifacts(s)
        }

    def recovers(self, undisturbed: dict[str, str], mark: str, died: float) -> None:
        """Everything that is promised after a crash."""
        self.nothing_half_made()
        code, said = self.run()
        assert code == 0, said
        self.nothing_left(mark, died)
        self.nothing_left(self.mark(), time.monotonic())
        assert self.bytes() == undisturbed
        assert not (self.root / "two-writers").exists()
        assert not list((self.root / "store").glob("work/*/*"))
        # The next run reaps what a guard that outlived this one has left, once the guard has gone for good.
        while (left := list(self.root.glob("store/services/*"))) and time.monotonic() < died + 2 * LEFT_SECONDS:
            reap_left_overs(self.root / "store/services/next")
            time.sleep(0.02)
        assert left == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The bytes of runs that nobody disturbed, by recipe."""
    found = {}
    for recipe in ("plain", "served"):
        world = World(tmp_path_factory.mktemp(recipe) / "world", recipe)
        assert world.run()[0] == 0
        found[recipe] = world.bytes()
    return found


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Any]:
    """Worlds of which nothing outlives the test, whatever it found."""
    made: list[World] = []

    def make(recipe: str) -> World:
        made.append(World(tmp_path / f"world{len(made)}", recipe))
        return made[-1]

    yield make
    for world in made:
        for number in range(1, world._count + 1):
            for pid in world.processes(f"{world.root}#{number}"):
                os.kill(pid, signal.SIGKILL)


def point(role: str, call: str, when: str, victim: str, **more: Any) -> str:
    return json.dumps({"role": role, "call": call, "when": when, "victim": victim, **more})


STORE = "speculators.runner.store.artifacts:"
IN_WORKER = {
    "before it looks for what was taken back": (f"{STORE}Store._restore_work", "before", {}),
    "before its directories are made": (f"{STORE}Store.quarantine", "after", {}),
    "in the middle of its work": ("speculators.job:Job.progress", "before", {"nth": 3}),
    "after its last line": ("speculators.job:Job.progress", "after", {"nth": 6}),
    "before it hashes what it made": (f"{STORE}Store.publish", "before", {}),
    "before anything of it is on the disk": ("os:fsync", "before", {}),
    "before its data is moved to be published": ("pathlib:Path.rename", "before", {"nth": 1}),
    "after its data was moved to be published": ("pathlib:Path.rename", "after", {"nth": 1}),
    "before it is published": ("pathlib:Path.rename", "before", {"nth": 2}),
    "after it is published": ("pathlib:Path.rename", "after", {"nth": 2}),
    "after its work is removed": (f"{STORE}Store.discard_work", "after", {}),
}
EXECUTE, EVENT = (
    "speculators.runner.execution.execute:Execution.",
    ("speculators.runner.execution.events:Events.emit", "after"),
)
IN_RUNNER = {
    "before a request is written": (f"{EXECUTE}_request", "before", {}),
    "before a worker is started": ("speculators.runner.executors.local:LocalExecutor.submit", "before", {"nth": 2}),
    "after a worker was started": ("speculators.runner.executors.local:LocalExecutor.submit", "after", {"nth": 2}),
    "after a stage was decided": (*EVENT, {"said": "stage.decided", "nth": 2}),
    "after a stage has ended": (*EVENT, {"said": "stage.finished"}),
}
SERVICE, IN_USE = (
    "speculators.runner.servers.server:Server.",
    ("worker asked", "speculators.job:Job.progress", "before"),
)
WITH_SERVER = {
    "the runner before a server is started": ("runner", f"{SERVICE}start", "before", "self", {}),
    "the runner after a server was started": ("runner", f"{SERVICE}start", "after", "self", {}),
    "the runner when a server is ready": ("runner", *EVENT, "self", {"said": "service.ready"}),
    "the runner while a server is used": (*IN_USE, "runner", {"nth": 3}),
    "the server while it is used": (*IN_USE, "server", {"nth": 3}),
    "the server's guard while it is used": (*IN_USE, "guard", {"nth": 3}),
    "the worker while it uses a server": (*IN_USE, "self", {"nth": 3}),
    "the runner before a server is stopped": ("runner", f"{SERVICE}close", "before", "self", {}),
    "the runner after a server is told to stop": ("runner", f"{SERVICE}close", "after", "self", {}),
}


POINTS = [(where, "self") for where in IN_WORKER] + [(where, "runner") for where in list(IN_WORKER)[2::3]]


@pytest.mark.parametrize(("where", "victim"), POINTS)
def test_killed_while_a_worker_is(where: str, victim: str, worlds: Any, undisturbed: dict[str, Any]) -> None:
    world = worlds("plain")
    call, when, more = IN_WORKER[where]
    code, said = world.run(CRASH_POINT=point("worker left", call, when, victim, **more), CRASH_RETRIES="0")
    mark, died = world.mark(), time.monotonic()
    assert (world.root / "struck").exists(), f"the point was never reached: {said}"
    assert code == (1 if victim == "self" else -signal.SIGKILL), said
    assert victim == "runner" or "left was killed by SIGKILL: probably out of memory" in said
    world.recovers(undisturbed["plain"], mark, died)


@pytest.mark.parametrize("where", IN_RUNNER)
def test_the_runner_killed(where: str, worlds: Any, undisturbed: dict[str, Any]) -> None:
    world = worlds("plain")
    call, when, more = IN_RUNNER[where]
    assert world.run(CRASH_POINT=point("runner", call, when, "self", **more))[0] == -signal.SIGKILL
    world.recovers(undisturbed["plain"], world.mark(), time.monotonic())


@pytest.mark.parametrize("where", WITH_SERVER)
def test_killed(where: str, worlds: Any, undisturbed: dict[str, Any]) -> None:
    """A runner that lives brings the stage to its end itself: another server, another attempt."""
    world = worlds("served")
    role, call, when, victim, more = WITH_SERVER[where]
    server = f"--detach {world.root}/orphan --late 0.1"
    code, said = world.run(CRASH_POINT=point(role, call, when, victim, **more), CRASH_SERVER=server)
    mark, died = world.mark(), time.monotonic()
    assert (world.root / "struck").exists(), f"the point was never reached: {said}"
    assert code == (-signal.SIGKILL if "the runner" in where else 0), said
    world.recovers(undisturbed["served"], mark, died)


SERVERS = (
    {},
    {"CRASH_SERVER": "--late 0.5"},
    {"CRASH_SERVER": "--ill 0.5"},
    {"CRASH_SERVER": "--stubborn --detach {world}/orphan"},
    {"CRASH_SERVER": "--die {world}/die --detach {world}/orphan"},
    {"CRASH_STRANGER": "target-of-somebody-else"},
)
"""Ways in which a server is or becomes what it should not be; `die` is made some time before something is killed."""


def test_killed_at_any_time(round_seed: int, worlds: Any, undisturbed: dict[str, Any]) -> None:
    """Any process of the run, any moment, any server; several rounds in one world until one of them gets through."""
    chance = random.Random(round_seed)
    world = worlds("served")
    for _ in range(2):
        server = {name: words.format(world=world.root) for name, words in chance.choice(SERVERS).items()}
        with world.start(CRASH_PACE="0.05", **server) as runner:
            time.sleep(chance.uniform(0.0, 0.75))
            (world.root / "die").touch()
            time.sleep(chance.uniform(0.05, 0.75))
            alive = world.processes(world.mark())
            if alive:
                victim = chance.choice([runner.pid, *alive])
                if "--detach" in str(server):
                    world.wait_until_recorded(victim)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            # What a guard owned that only it could find is reaped by the runner, or, if both were killed, by the next.
            if runner.poll() is None and "--detach" not in str(server) and chance.random() < 0.5:
                runner.kill()
            runner.communicate(timeout=120)
        died = time.monotonic()
        world.nothing_half_made()
        world.nothing_left(world.mark(), died)
    world.recovers(undisturbed["served"], world.mark(), time.monotonic())


def test_sixteen_runners_at_once_make_everything_once(worlds: Any, undisturbed: dict[str, Any]) -> None:
    world = worlds("plain")
    runners = [world.start() for _ in range(16)]
    said = [runner.communicate(timeout=120)[1] for runner in runners]
    assert [runner.returncode for runner in runners] == [0] * 16, said
    bodies = Counter((world.root / "bodies").read_text().split())
    assert bodies == {"seed": 1, "left": 1}
    assert world.bytes() == undisturbed["plain"]


def test_a_signal_leaves_nothing_behind_and_the_next_run_goes_on(worlds: Any, undisturbed: dict[str, Any]) -> None:
    world = worlds("served")
    with world.start(CRASH_PACE="0.2") as runner:
        deadline = time.monotonic() + 60
        bodies = world.root / "bodies"
        while not (bodies.exists() and "asked" in bodies.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        runner.send_signal(signal.SIGTERM)
        runner.communicate(timeout=60)
    assert runner.returncode == 128 + signal.SIGTERM
    assert world.processes(world.mark()) == []
    world.recovers(undisturbed["served"], world.mark(), time.monotonic())
