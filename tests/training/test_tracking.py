"""Trackers: what each is told, that several are told the same, and that none of them can stop a training."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from run_train import make_job, write_world

from speculators.config.choices import Tracker
from speculators.errors import RecipeError
from speculators.packages import install_command
from speculators.stages import train
from speculators.training.tracking import RunInfo, Trackers

LINE = {"step": 20, "loss": 1.5, "lr": 1e-3}
VALIDATION = {"step": 20, "epoch": 1, "validation": {"acceptance_length": 1.25}}
Calls = list[tuple[Any, ...]]


def about(directory: Path) -> RunInfo:
    return RunInfo(
        project="p", name="train-01234567", options={"train.lr": 0.1}, directory=directory / "shown", scratch=directory
    )


class Recorder:
    """Stands in for a tracker's module: remembers every call, and fails where it is told to."""

    def __init__(self, calls: Calls, fails: str = "") -> None:
        self.calls, self.fails = calls, fails
        self.info = types.SimpleNamespace(run_id="r1")

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, *args, kwargs))
            if name == self.fails:
                raise ConnectionError("no route")
            return self

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    found: dict[str, Calls] = {name: [] for name in ("wandb", "trackio", "mlflow")}
    for name, its in found.items():
        monkeypatch.setitem(sys.modules, name, Recorder(its))
    return found


def test_each_tracker_is_told_by_its_own_interface(tmp_path: Path, calls: dict[str, Calls]) -> None:
    trackers = Trackers([Tracker.wandb, Tracker.trackio, Tracker.mlflow], about(tmp_path))
    trackers.log(LINE)
    trackers.log(VALIDATION)
    trackers.close()
    trained = {"train/loss": 1.5, "train/lr": 1e-3}
    validated = {"train/epoch": 1.0, "validation/acceptance_length": 1.25}
    begun = {"project": "p", "name": "train-01234567", "resume": "allow", "config": {"train.lr": 0.1}}
    logged = [("log", trained, {"step": 20}), ("log", validated, {"step": 20}), ("finish", {})]
    assert calls["trackio"] == [("init", begun), *logged]
    assert calls["wandb"] == [("init", begun | {"id": "train-01234567", "dir": str(tmp_path / "shown")}), *logged]
    assert calls["mlflow"] == [
        ("set_experiment", "p", {}),
        ("start_run", {"run_name": "train-01234567", "run_id": None}),
        ("log_params", {"train.lr": 0.1}, {}),
        ("log_metrics", trained, {"step": 20}),
        ("log_metrics", validated, {"step": 20}),
        ("end_run", {}),
    ]


def test_a_second_attempt_goes_on_with_the_same_run_of_mlflow(tmp_path: Path, calls: dict[str, Calls]) -> None:
    Trackers([Tracker.mlflow], about(tmp_path)).close()
    calls["mlflow"].clear()
    Trackers([Tracker.mlflow], about(tmp_path)).close()
    assert calls["mlflow"][1:] == [("start_run", {"run_name": "train-01234567", "run_id": "r1"}), ("end_run", {})]


def test_trackers_that_are_not_installed_are_named_with_what_to_install() -> None:
    missing = [kind for kind in Tracker if importlib.util.find_spec(kind.name) is None]
    if not missing:
        pytest.skip("all of them are installed here")
    with pytest.raises(RecipeError, match=r"train.trackers: .* not installed") as caught:
        Trackers(missing)
    assert install_command(*(kind.name for kind in missing)) in caught.value.hint


def test_a_tracker_that_does_not_start_stops_the_training_and_closes_the_others(
    tmp_path: Path, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", Recorder([], fails="init"))
    with pytest.raises(RecipeError, match="trackio does not start: ConnectionError: no route"):
        Trackers([Tracker.wandb, Tracker.trackio], about(tmp_path))
    assert calls["wandb"][-1] == ("finish", {})


def test_a_tracker_that_fails_later_is_left_out_and_that_is_said_once(
    tmp_path: Path, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken: Calls = []
    monkeypatch.setitem(sys.modules, "wandb", Recorder(broken, fails="log"))
    world = write_world(tmp_path / "world")
    job = make_job(
        world, tmp_path / "work", epochs=1, log_every_steps=1, trackers=[Tracker.wandb, Tracker.mlflow],
        tracker_dir=str(tmp_path / "shown"),
    )  # fmt: skip
    train.main(job)
    assert [call[0] for call in broken] == ["init", "log"]
    assert capsys.readouterr().err.count("warning: the tracker wandb failed") == 1
    assert any("wandb failed" in note for note in job.record["notes"])
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    logged = [call for call in calls["mlflow"] if call[0] == "log_metrics"]
    assert [call[-1]["step"] for call in logged] == [line["step"] for line in lines]
    assert logged[0][1]["train/loss"] == lines[0]["loss"]
    assert calls["mlflow"][-1] == ("end_run", {})


def test_tensorboard_reads_what_it_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers([Tracker.tensorboard], about(tmp_path))
    trackers.log(LINE)
    trackers.log(VALIDATION)
    trackers.close()
    read = EventAccumulator(str(tmp_path / "shown" / "train-01234567"))
    read.Reload()
    (point,) = read.Scalars("validation/acceptance_length")
    assert (point.step, point.value) == (20, 1.25)
    assert read.Scalars("train/loss")[0].value == 1.5


TWO_ATTEMPTS = """
import sys
from pathlib import Path
from speculators.config.choices import Tracker
from speculators.training.tracking import RunInfo, Trackers
from speculators.packages import install_command
name, directory = sys.argv[1], Path(sys.argv[2])
options = {"train.lr": 0.1, "train.adamw_betas": [0.9, 0.95], "train.muon_lr": None}
info = RunInfo(project="p", name="train-01234567", options=options, directory=directory / "shown", scratch=directory)
for step in (10, 20):
    trackers = Trackers([Tracker[name]], info)
    trackers.log({"step": step, "loss": 1.5})
    trackers.close()
    assert trackers.failed == [], trackers.failed
"""
LEFT_BEHIND = {
    "tensorboard": "shown/train-01234567/events.out.tfevents.*",
    "wandb": "shown/wandb/offline-run-*/run-train-01234567.wandb",
    "trackio": "trackio/p.db",
    "mlflow": "m.db",
}
STEPS = {"trackio": "SELECT step FROM metrics ORDER BY step", "mlflow": "SELECT step FROM metrics ORDER BY step"}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_two_attempts_with_the_real_package_are_one_run(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {install_command(name)}")
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db", "HOME": str(tmp_path)}
    # A process of its own: these packages start services, and warn.
    command = [sys.executable, "-c", TWO_ATTEMPTS, name, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(LEFT_BEHIND[name]))
    if name in STEPS:
        with contextlib.closing(sqlite3.connect(tmp_path / LEFT_BEHIND[name])) as database:
            assert [step for (step,) in database.execute(STEPS[name])] == [10, 20]
            if name == "mlflow":
                assert database.execute("SELECT COUNT(*) FROM runs").fetchone() == (1,)
