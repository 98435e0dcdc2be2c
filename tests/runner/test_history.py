"""Runs are read from what they left, whatever ended them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner import history
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import guard
from speculators.runner.store.artifacts import Store
from tests.conftest import publish_all
from tests.runner.pasts import past

A, B = "20260101-100000-tiny", "20260101-110000-tiny"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in (A, B):
        past(tmp_path / "runs", name)
    return tmp_path / "runs"


def test_a_run_is_found_by_name_prefix_path_and_as_the_last(runs: Path) -> None:
    for word in (A, "20260101-10", str(runs / A)):
        assert history.find(runs, word).name == A
    assert history.find(runs, "last").name == B, "both were made within a millisecond"
    (runs / "notes").mkdir()
    assert [run.name for run in history.list_runs(runs)] == [A, B]


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("20260101", "2 runs begin with `20260101`", "give more"),
        ("20260101-100000-tniy", "there is no run", f"did you mean `{A}`"),
    ],
)
def test_a_word_that_means_no_run_or_several_is_refused(runs: Path, word: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        history.find(runs, word)
    assert hint in raised.value.hint


def test_where_there_is_no_run_the_directory_is_named(tmp_path: Path) -> None:
    for word in ("last", A):
        with pytest.raises(RecipeError, match="there is no run"):
            history.find(tmp_path / "nowhere", word)
    assert history.list_runs(tmp_path / "nowhere") == []


def test_stages_tell_their_state_reason_seconds_attempts_and_log(runs: Path) -> None:
    run = history.find(runs, A)
    assert (run.status, run.seconds, run.recipe) == ("done", 65.0, "tiny")
    assert {name: stage.state for name, stage in run.stages.items()} == {
        "tokenize": "cached",
        "train": "done",
        "evaluate": "done",
    }
    train = run.stages["train"]
    assert (train.reason, train.seconds, train.attempts) == ("changed: train.lr 1 -> 2", 61.0, 2)
    assert train.log == str(runs / A / "logs/train.log")


def test_metrics_are_results_and_not_every_number_of_a_record(runs: Path) -> None:
    assert history.find(runs, A).metrics == {
        "train.validation.acceptance_length": 1.5,
        "train.validation.loss": 9.0,
        "evaluate.acceptance_length.human_eval": 2.0,
        "evaluate.acceptance_length.sharegpt": 3.0,
        "evaluate.speed_up.human_eval": 1.5,
        "evaluate.speed_up.sharegpt": 1.0,
    }


def test_a_second_node_of_a_kind_has_metrics_of_its_own(tmp_path: Path) -> None:
    wiring = {"evaluate": {"uses": "tokenize"}, "train": {"uses": "evaluate"}}
    run = history.read_run(past(tmp_path, A, config={"pipeline": wiring}, status=""))
    assert run is not None
    assert run.metrics == {}


def test_a_cached_stage_has_the_metrics_of_its_artifact(tmp_path: Path, store: Store, config: Config) -> None:
    planner = Planner(config, store)
    publish_all(store, planner)
    step = {s.node.name: s for s in planner.plan()}["evaluate"]
    assert step.artifact is not None
    described = json.loads((step.artifact.path / "artifact.json").read_text())
    described["record"] = {"speed_up": {"human_eval": 1.25}}
    (step.artifact.path / "artifact.json").write_text(json.dumps(described))
    path = past(tmp_path / "runs", A, status="")
    steps = {
        "evaluate": {"stage": "evaluate", "state": "cached", "reason": "", "key": step.key, "path": str(step.path)}
    }
    (path / "run.json").write_text(json.dumps({"status": "done", "seconds": 1.0, "steps": steps}))
    run = history.read_run(path)
    assert run is not None
    assert run.metrics["evaluate.speed_up.human_eval"] == 1.25
    steps["evaluate"]["path"] = str(tmp_path / "gone" / "data")
    (path / "run.json").write_text(json.dumps({"status": "done", "seconds": 1.0, "steps": steps}))
    gone = history.read_run(path)
    assert gone is not None
    assert "evaluate.speed_up.human_eval" not in gone.metrics


def test_a_killed_run_is_told_from_one_that_is_at_work(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = {"pid": other.pid, "start": guard.start_time(other.pid), "machine": guard.machine()}
        path = past(tmp_path, A, status="", process=process)
        alive = history.read_run(path)
    dead = history.read_run(path)
    assert alive is not None
    assert dead is not None
    assert (alive.status, alive.stages["evaluate"].state) == ("running", "running")
    assert (dead.status, dead.stages["evaluate"].state) == ("killed", "stopped")
    assert alive.seconds > dead.seconds, "that of a run at work goes on"


def test_a_process_of_another_machine_is_not_ours(tmp_path: Path) -> None:
    process = {"pid": os.getpid(), "start": guard.start_time(os.getpid()), "machine": "another"}
    run = history.read_run(past(tmp_path, A, status="", process=process))
    assert run is not None
    assert run.status == "killed"


def test_a_line_that_was_cut_off_and_a_damaged_file_are_passed_over(tmp_path: Path) -> None:
    path = past(tmp_path, A, status="")
    with (path / "events.jsonl").open("a") as file:
        file.write('{"event": "stage.fini')
    (path / "config.json").write_text("{")
    run = history.read_run(path)
    assert run is not None
    assert run.recipe == "tiny"
    assert run.stages["train"].state == "done"


def test_options_that_differ_are_named_and_where_a_run_lies_is_none(tmp_path: Path) -> None:
    one = history.read_run(past(tmp_path / "a", A, config={"train": {"lr": 1e-3, "epochs": 2}, "only": ""}))
    two = history.read_run(past(tmp_path / "b", A, config={"train": {"lr": 3e-3, "epochs": 2}, "only": "train"}))
    assert one is not None
    assert two is not None
    assert history.differing_options([one, two]) == {"train.lr": [1e-3, 3e-3]}


def test_metrics_that_only_one_run_has_leave_a_gap(tmp_path: Path) -> None:
    found = [history.read_run(past(tmp_path, A)), history.read_run(past(tmp_path, B, status="failed"))]
    table = history.metrics_by_run([run for run in found if run])
    assert table["evaluate.speed_up.human_eval"] == [1.5, None]
    assert table["train.validation.loss"] == [9.0, 9.0]
