"""The worker: one attempt, whole or resumable, whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speculators.runner.executors import Handle, executor
from speculators.runner.planning import key as keys
from speculators.runner.servers import guard
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store
from tests.requests import make_request

STAGE = '''
"""A stage that counts to `config.prompts.seed` in steps it never repeats."""
import os, time
from speculators.errors import ContractError

def main(job):
    told = job.derived
    (job.scratch / "attempts").open("a").write("x")
    if told.get("tells"):
        print(*(os.environ.get(name) for name in told["tells"]))
    if told.get("imports"):
        __import__(told["imports"])
    if told.get("raises") == "RunError":
        raise ContractError("the rows do not fit", "take others")
    if told.get("raises"):
        raise KeyError(told["raises"])
    if told.get("empty"):
        return
    with (job.output / "lines").open("a") as lines:
        for number in range(len((job.output / "lines").read_text()), told.get("count", 3)):
            lines.write("x")
            lines.flush()
            if number + 1 == told.get("hold"):
                if told.get("child"):
                    if os.fork() == 0:
                        os.execvp("sleep", ["sleep", told["child"]])
                (job.work / "holding").touch()
                while (job.work / "holding").exists():
                    time.sleep(0.01)
    job.record["attempts"] = len((job.scratch / "attempts").read_text())
'''


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `speculators.stages` with one more stage in it, as the worker will see it."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/count.py").write_text(STAGE)
    (tmp_path / "site").mkdir()
    # Joined to the real package when the interpreter starts, so that nothing in the product knows of tests.
    (tmp_path / "site/sitecustomize.py").write_text(
        f"import speculators.stages\nspeculators.stages.__path__.append({str(tmp_path / 'more')!r})\n"
    )
    root = Path(keys.__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(root)]))
    return tmp_path


def request(
    world: Path, phase: int = 0, phases: int = 1, digest: str | None = None, forced: bool = False, **derived: Any
) -> Path:
    path = world / f"request-{phase}.json"
    fields = {"derived": derived, "digest": digest, "forced": forced, "phase": phase, "phases": phases}
    make_request("count", world / "store", config=derived, **fields).write(path)
    return path


def submit(world: Path, path: Path) -> Handle:
    return executor("local").submit(path, world / "log", {})


def ended(handle: Handle, seconds: float = 15.0) -> int:
    deadline = time.monotonic() + seconds
    while (code := handle.poll()) is None:
        assert time.monotonic() < deadline, "the worker did not end"
        time.sleep(0.02)
    return code


def work(path: Path) -> Path:
    return Path(json.loads(path.read_text())["work"])


def artifact(path: Path) -> Artifact | None:
    plain = json.loads(path.read_text())
    return Store(Path(plain["store"])).find("count", plain["key"])


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, f"not so in time: {what}"
        time.sleep(0.01)


def until_holding(path: Path) -> None:
    until((work(path) / "holding").exists, "the stage is in its middle")


@pytest.mark.parametrize(
    ("name", "code", "message", "hint"),
    [
        ("torch", "raise OSError('libcudnn.so.9: cannot open')", "`torch` cannot be imported: libcudnn.so.9", "torch"),
        ("outer", "import inner_part", "`inner_part` cannot be imported: operator", "make clean setup"),
        ("outer", "import wanting", "`wanting` cannot be imported: No module named", "make clean setup"),
    ],
)
def test_a_package_that_does_not_load_is_one_error_with_the_doctors_hint(
    world: Path, name: str, code: str | None, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = world / "site"
    if code:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(code)
        (site / name / "version.py").write_text("__version__ = '2.0'\ncuda = None\n")
    (site / "inner_part.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the doctor asks where there is a torch; the answer is not the question
    path = request(world, imports=name)
    assert ended(submit(world, path), 60) == 1
    failure = json.loads((work(path) / "failure.json").read_text())
    assert failure["message"].startswith(message)
    assert hint in failure["hint"]
    assert "Traceback" not in (world / "log").read_text()


def test_it_publishes_what_the_stage_made_with_its_provenance(world: Path) -> None:
    path = request(world, digest="hub:abc")
    assert ended(submit(world, path)) == 0
    made = artifact(path)
    assert made is not None
    assert (made.data / "lines").read_text() == "xxx"
    assert made.digest == "hub:abc"
    assert made.record["attempts"] == 1
    assert made.record["seconds"] >= 0
    assert {"run", "started", "finished", "host", "python", "platform", "cpu"} <= made.provenance.keys()
    assert "torch" not in made.provenance
    assert not work(path).exists()


def test_what_is_there_already_is_not_made_again(world: Path) -> None:
    path = request(world)
    ended(submit(world, path))
    before = artifact(path)
    assert ended(submit(world, path)) == 0
    assert artifact(path) == before
    assert not work(path).exists()


def test_forced_it_is_made_again_and_equal_bytes_change_nothing(world: Path) -> None:
    ended(submit(world, request(world)))
    path = request(world, forced=True)
    before = artifact(path)
    assert ended(submit(world, path)) == 0
    assert artifact(path) == before
    assert not (world / "store/quarantine").exists()


def test_a_killed_worker_leaves_no_artifact_and_the_next_one_goes_on(world: Path) -> None:
    path = request(world, count=5, hold=3, child="612")
    first = submit(world, path)
    until_holding(path)
    group = [pid for pid in guard.descendants({first.pid}) if pid != first.pid]
    assert group, "the stage has a child"
    os.kill(first.pid, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    until(lambda: not any(guard.start_time(pid) for pid in group), "nothing of it is left")
    assert artifact(path) is None
    (work(path) / "holding").unlink()
    assert ended(submit(world, path)) == 0
    made = artifact(path)
    assert made is not None
    assert (made.data / "lines").read_text() == "xxxxx"
    assert made.record["attempts"] == 2


def test_asked_to_stop_it_ends_with_143_and_keeps_its_work(world: Path) -> None:
    path = request(world, hold=2)
    handle = submit(world, path)
    until_holding(path)
    assert json.loads((work(path) / "heartbeat.json").read_text())["pid"] == handle.pid
    handle.terminate()
    assert ended(handle) == 143
    assert (work(path) / "data/lines").read_text() == "xx"
    assert not (work(path) / "failure.json").exists()


def test_run_by_hand_it_needs_nobody_to_hold_it(world: Path) -> None:
    path = request(world)
    argv = [sys.executable, "-m", "speculators.worker", str(path)]
    assert subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode == 0
    assert artifact(path) is not None


def test_an_error_that_a_person_can_mend_is_said_in_two_lines(world: Path) -> None:
    path = request(world, raises="RunError")
    assert ended(submit(world, path)) == 1
    assert (world / "log").read_text() == "error: the rows do not fit\n\nhint: take others\n"
    failure = json.loads((work(path) / "failure.json").read_text())
    assert failure == {"message": "the rows do not fit", "hint": "take others", "kind": "ContractError"}
    assert artifact(path) is None


def test_a_defect_has_a_traceback_and_an_exit_code_of_its_own(world: Path) -> None:
    path = request(world, raises="column")
    assert ended(submit(world, path)) == 2
    assert "Traceback" in (world / "log").read_text()
    assert json.loads((work(path) / "failure.json").read_text())["message"] == "KeyError: 'column'"


def test_a_stage_that_makes_nothing_fails(world: Path) -> None:
    assert ended(submit(world, request(world, empty=True))) == 1
    assert "wrote no file" in (world / "log").read_text()


def test_only_the_last_phase_publishes_and_a_finished_phase_is_not_repeated(world: Path) -> None:
    first = request(world, phase=0, phases=2)
    for _ in range(2):
        assert ended(submit(world, first)) == 0
    assert artifact(first) is None
    report = work(first) / "scratch/phase-0.done"
    report.write_text(json.dumps({**json.loads(report.read_text()), "seconds": 100.0}))
    report.rename(report.with_name("phase-0-baseline.done"))  # the servers of a phase are its own
    assert (work(first) / "scratch/attempts").read_text() == "x"
    assert ended(submit(world, request(world, phase=1, phases=2))) == 0
    made = artifact(first)
    assert made is not None
    assert made.record["attempts"] == 2
    assert made.record["seconds"] >= 100.0 > made.provenance["import_seconds"] >= 0.0


def test_two_workers_of_one_key_make_it_once_and_the_loser_says_for_whom_it_waits(world: Path) -> None:
    path = request(world, hold=2)
    first = submit(world, path)
    until_holding(path)
    second = executor("local").submit(path, world / "log-2", {})
    until(lambda: f"waiting: pid {first.pid} " in (world / "log-2").read_text(), "the second one says who works")
    (work(path) / "holding").unlink()
    assert [ended(first), ended(second)] == [0, 0]
    made = artifact(path)
    assert made is not None
    assert made.record["attempts"] == 1


def test_an_artifact_that_is_not_whole_is_set_aside_and_made_again(world: Path) -> None:
    path = request(world)
    ended(submit(world, path))
    made = artifact(path)
    assert made is not None
    (made.data / "lines").unlink()
    assert ended(submit(world, path)) == 0
    assert artifact(path) is not None
    assert "moved to quarantine" in (world / "log").read_text()
    assert len(list((world / "store/quarantine").iterdir())) == 1


def test_a_file_in_the_users_directory_is_not_imported_in_place_of_a_module(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "tokenize.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(world)
    assert ended(submit(world, request(world))) == 0


def test_a_process_that_torchrun_started_beside_the_first_runs_the_stage_and_publishes_nothing(world: Path) -> None:
    path = request(world, count=2)
    for name in ("data", "scratch"):
        (work(path) / name).mkdir(parents=True)
    handle = executor("local").submit(path, world / "log", {"RANK": "1", "WORLD_SIZE": "2"})
    assert ended(handle) == 0
    assert (work(path) / "data/lines").read_text() == "xx"
    assert artifact(path) is None
    failing = request(world, raises="RunError")
    (work(failing) / "scratch").mkdir(parents=True)
    assert ended(executor("local").submit(failing, world / "log", {"RANK": "1", "WORLD_SIZE": "2"})) == 1
    assert not (work(failing) / "failure.json").exists()


def test_a_process_that_torchrun_started_does_nothing_where_the_artifact_is_there_unless_it_is_made_anew(
    world: Path,
) -> None:
    path = request(world, count=2)
    assert ended(submit(world, path)) == 0
    assert ended(executor("local").submit(path, world / "log", {"RANK": "1", "WORLD_SIZE": "2"})) == 0
    assert not work(path).exists()
    forced = request(world, count=2, forced=True)
    for name in ("data", "scratch"):
        (work(forced) / name).mkdir(parents=True)
    assert ended(executor("local").submit(forced, world / "log", {"RANK": "1", "WORLD_SIZE": "2"})) == 0
    assert (work(forced) / "data/lines").read_text() == "xx"
