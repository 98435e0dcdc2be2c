"""Sweeps: a run for each value, what is common made once, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from speculators import cli
from speculators.config import checks, compose, shipped
from speculators.errors import RecipeError
from speculators.packages import install_command, installed_version
from speculators.runner.servers import guard
from tests.conftest import USABLE_ROW

DEMO = "recipe=smollm2_eagle3"
STAGE = '''
"""prompts, but trivial: writes down that it ran, and waits or fails if it is told so."""
import os, pathlib, time

def main(job):
    world, count = pathlib.Path(os.environ["WORLD"]), job.config.prompts.num_conversations
    with (world / "ran").open("a") as ran:
        ran.write(f"{count}\\n")
    print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if (world / f"fails-{count}").exists():
        raise RuntimeError("as it was told")
    while (world / f"waits-{count}").exists():
        time.sleep(0.01)
    (job.output / "prompts").write_text(str(count))
'''


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, where the stage `prompts` is a trivial one."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/prompts.py").write_text(STAGE)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        f"import speculators.stages\nspeculators.stages.__path__.insert(0, {str(tmp_path / 'stages')!r})\n"
    )
    (tmp_path / "rows.json").write_text(json.dumps([USABLE_ROW]))
    root = Path(cli.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(root)]))
    monkeypatch.setenv("WORLD", str(tmp_path))
    return tmp_path


def command(*words: str) -> list[str]:
    common = [DEMO, "until=prompts", "data.sharegpt.source=rows.json"]
    return [sys.executable, "-m", "speculators.cli", *words, *common]


def sweep(world: Path, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("-m", *words), cwd=world, capture_output=True, text=True, check=False, timeout=timeout
    )


def jobs(world: Path) -> list[dict[str, Any]]:
    """What the newest sweep wrote down about its jobs."""
    place = max((world / "runs").glob("*-sweep*"))
    return [json.loads(path.read_text()) for path in sorted(place.glob("[0-9]*.json"))]


def ran(world: Path) -> list[str]:
    return (world / "ran").read_text().split()


def until(true: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"not so in time: {what}"
        time.sleep(0.02)


def test_what_jobs_have_in_common_runs_once_and_each_has_a_run_of_its_own(world: Path) -> None:
    done = sweep(world, "prompts.num_conversations=3,4", "train.lr=1e-4,3e-4")
    assert done.returncode == 0, done.stderr
    assert sorted(ran(world)) == ["3", "4"]
    place = max((world / "runs").glob("*-sweep*"))
    reports = [json.loads((place / f"00{i}" / "run.json").read_text()) for i in range(4)]
    assert [r["overrides"][:2] for r in reports] == [
        [f"prompts.num_conversations={c}", f"train.lr={lr}"] for c in (3, 4) for lr in ("0.0001", "0.0003")
    ]
    assert len({(place / f"00{i}").resolve() for i in range(4)}) == 4
    config = json.loads((place / "003/config.json").read_text())
    assert (config["prompts"]["num_conversations"], config["train"]["lr"]) == (4, 3e-4)
    assert {p.name for p in world.iterdir()} == {"stages", "site", "rows.json", "runs", "ran", "store"}
    assert "done     job 1               prompts.num_conversations=3 train.lr=0.0003" in done.stderr
    assert not (place / "held").exists()


def test_one_job_that_fails_is_told_and_the_others_go_on(world: Path) -> None:
    (world / "fails-3").touch()
    done = sweep(world, "prompts.num_conversations=3,4")
    assert done.returncode == 1
    assert [job["status"] for job in jobs(world)] == ["failed", "done"]
    assert "as it was told" in jobs(world)[0]["message"]
    assert done.stderr.index("error: prompts") < done.stderr.index("job      1")
    (world / "fails-3").unlink()
    assert sweep(world, "prompts.num_conversations=3,4").returncode == 0
    assert ran(world) == ["3", "4", "3"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_stops_and_the_same_command_goes_on(world: Path, signum: int) -> None:
    (world / "waits-4").touch()
    process = subprocess.Popen(command("-m", "prompts.num_conversations=3,4,5"), cwd=world, stderr=subprocess.DEVNULL)
    until(lambda: (world / "ran").exists() and ran(world) == ["3", "4"], "the second job runs")
    process.send_signal(signum)
    assert process.wait(60) == (130 if signum == signal.SIGINT else -signum)
    assert ran(world) == ["3", "4"]
    (world / "waits-4").unlink()
    assert sweep(world, "prompts.num_conversations=3,4,5").returncode == 0
    assert ran(world) == ["3", "4", "4", "5"]


LAUNCHERS = [
    pytest.param(
        ["hydra/launcher=joblib"],
        marks=pytest.mark.skipif(
            installed_version("hydra-joblib-launcher") is None, reason="the extra `joblib` is not installed"
        ),
        id="joblib",
    ),
    pytest.param(
        ["hydra/launcher=submitit_local"],
        marks=pytest.mark.skipif(
            installed_version("hydra-submitit-launcher") is None, reason="the extra `sweep-slurm` is not installed"
        ),
        id="submitit",
    ),
    pytest.param(
        ["hydra/launcher=ray"],
        marks=pytest.mark.skipif(
            installed_version("hydra-ray-launcher") is None, reason="the extra `sweep-ray` is not installed"
        ),
        id="ray",
    ),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_side_by_side_make_what_they_share_once_and_one_that_fails_stops_no_other(
    world: Path, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "fails-4").touch()
    (world / "waits-3").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    two = ["hydra.launcher.n_jobs=2"] if "joblib" in launcher[0] else []
    process = subprocess.Popen(
        command("-m", *launcher, *two, "prompts.num_conversations=3,4", "train.lr=1e-4,3e-4"),
        cwd=world,
        stderr=subprocess.PIPE,
        text=True,
    )
    logs = lambda: [log.read_text() for log in (world / "runs").glob("*/logs/prompts.log")]  # noqa: E731
    if "ray" not in launcher[0]:
        until(lambda: any("waiting: " in log for log in logs()), "one job waits for the other's work")
    (world / "waits-3").unlink()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert [job["status"] for job in jobs(world)] == ["done", "done", "failed", "failed"], said
    assert ran(world).count("3") == 1
    assert "ray" in launcher[0] or any("gpus 5" in log for log in logs())
    assert {p.name for p in world.iterdir()} == {"stages", "site", "rows.json", "runs", "ran", "store", "fails-4"}


@pytest.mark.parametrize("launcher", LAUNCHERS[:2])
def test_jobs_side_by_side_end_with_the_sweep_however_it_dies(world: Path, launcher: list[str]) -> None:
    (world / "waits-3").touch()
    process = subprocess.Popen(
        command("-m", *launcher, "prompts.num_conversations=3"),
        cwd=world,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until((world / "ran").exists, "the job runs")
    before = guard.descendants({process.pid})
    process.kill()
    process.wait()
    until(lambda: not any(guard.start_time(pid) for pid in before), "nothing of it is left")
    assert not list((world / "store").glob("artifacts/*/*/*"))


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["train.lrr=1,2"], "there is no option `train.lrr`", "did you mean `train.lr`?"),
        (["train.lr=1e-3,high"], "train.lr: Value 'high'", "type"),
        (["hardware=cpu,gpuu"], "no choice for hardware named `gpuu`", "did you mean"),
        (["recipe=smollm2_eagle3,smollm"], "no recipe named `smollm`", "smollm2_eagle3"),
        (["hydra/launcher=jobli"], "there is no launcher `jobli`", "did you mean `joblib`?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_found_before_the_first_job(
    words: list[str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speculators-run"])
    given = [] if words[0].startswith("recipe=") else [DEMO]
    with pytest.raises(RecipeError) as caught:
        compose.multirun(["-m", *given, *words], tmp_path, lambda job: pytest.fail("a job ran"))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: None)
    with pytest.raises(RecipeError, match="hydra/launcher=joblib needs `hydra-joblib-launcher`") as caught:
        compose.multirun(["-m", DEMO, "hydra/launcher=joblib"], Path(), lambda job: None)
    assert caught.value.hint == install_command("joblib")


def test_launchers_get_settings_for_long_jobs_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    settings = compose._launcher_settings
    assert settings(["hydra/launcher=joblib", "train.lr=1,2"]) == ["hydra.launcher.n_jobs=2"]
    assert settings(["hydra/launcher=submitit_slurm"]) == ["hydra.launcher.timeout_min=1440"]
    assert settings(["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"]) == []
    assert settings(["train.lr=1,2"]) == []


def test_the_jobs_of_a_sweep_are_counted_before_it_starts() -> None:
    assert (
        compose._count(["train.lr=1,2,3", "prompts.seed=range(0,4)", "prompts.num_conversations=5", "--config-dir"])
        == 12
    )


def test_a_recipe_by_path_stays_the_path_in_what_runs_one_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speculators-run"])
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.yaml").write_text((shipped.RECIPES / "smollm2_eagle3.yaml").read_text())
    found = []
    compose.multirun(
        ["recipe=mine.yaml,yours.yaml", "-m"],
        tmp_path / "sweep",
        lambda job: found.append((job.overrides, job.config())),
    )
    assert [words for words, _ in found] == [["recipe=mine.yaml"], ["recipe=yours.yaml"]]
    assert [config.recipe for _, config in found] == ["mine", "yours"]
