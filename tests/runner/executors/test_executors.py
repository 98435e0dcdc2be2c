"""Executors: whatever starts a worker, the same artifact comes out, and nothing outlives the run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.choices import ExecutorName
from speculators.config.execution import ExecutorOptions
from speculators.errors import RecipeError, StageError
from speculators.packages import install_command
from speculators.runner import executors
from speculators.runner.execution import lease
from speculators.runner.executors import Handle
from speculators.runner.executors.local import worker_environment
from speculators.runner.planning.graph import build
from speculators.runner.servers import guard
from speculators.runner.store.artifacts import Store
from tests.test_worker import artifact, ended, request, until, until_holding, work, world

__all__ = ["world"]

SUBMITIT = pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="the extra `slurm` is not installed")
RAY = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra `ray` is not installed")
REMOTE = [pytest.param("submitit", marks=SUBMITIT), pytest.param("ray", marks=RAY)]
ALL = ["local", *REMOTE]
FOUR_LINES = "ddcec1bf44d862dcb4b0ac5db63a372a18f30475b87cb5d08811a99610b038c5"
"""The digest of `lines` with `xxxx` in it, whoever started what wrote it."""
DEMO = "recipe=smollm2_eagle3"


@pytest.fixture(scope="module", autouse=True)
def _ray_ends_here() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def submit(name: str, world: Path, path: Path, **env: str) -> Handle:
    # sitecustomize of the world is found in every worker, as the package of a user would be.
    return executors.executor(name, ExecutorOptions()).submit(path, world / "log", env)


def far_end(handle: Handle) -> int:
    """The process that started the worker."""
    until(lambda: handle.pid > 0, "the worker is started")
    return int((guard.PROC / str(handle.pid) / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("name", ALL)
def test_every_executor_leaves_the_same_artifact_and_nothing_else(name: str, world: Path) -> None:
    path = request(world, count=4)
    assert ended(submit(name, world, path), 60) == 0
    made = artifact(path)
    assert made is not None
    assert made.digest == FOUR_LINES
    assert sorted(p.name for p in world.glob("request-0*")) == ["request-0.json"]
    assert not work(path).exists()


@pytest.mark.parametrize("name", ALL)
def test_variables_reach_the_stage_and_its_words_the_log(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("OF_THE_RUNNER", "inherited")
    monkeypatch.setenv("WORLD_SIZE", "2")  # of whatever the runner is a part of
    path = request(world, tells=["OF_THE_RUNNER", "OF_THE_REQUEST", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE"])
    assert ended(submit(name, world, path, OF_THE_REQUEST="secret-4711"), 60) == 0
    assert (world / "log").read_text().splitlines()[-1] == "inherited secret-4711 5 None"
    assert "OF_THE_REQUEST" not in os.environ


@pytest.mark.parametrize("name", ALL)
def test_what_a_worker_says_of_its_failure_is_its_exit_code_and_its_log(name: str, world: Path) -> None:
    assert ended(submit(name, world, request(world, raises="RunError")), 60) == 1
    assert (world / "log").read_text() == "error: the rows do not fit\n\nhint: take others\n"


@pytest.mark.parametrize("name", ALL)
def test_asked_to_stop_a_worker_keeps_its_work(name: str, world: Path) -> None:
    path = request(world, hold=2)
    handle = submit(name, world, path)
    until_holding(path)
    handle.terminate()
    assert ended(handle, 20) == 143
    assert (work(path) / "data/lines").read_text() == "xx"


def test_a_local_worker_leads_a_session_of_its_own(world: Path) -> None:
    path = request(world, hold=2)
    handle = submit("local", world, path)
    until_holding(path)
    assert far_end(handle) == os.getpid()
    assert os.getpgid(handle.pid) == os.getsid(handle.pid) == handle.pid
    handle.kill()
    assert ended(handle, 20) == -signal.SIGKILL


@pytest.mark.parametrize("name", REMOTE)
def test_asked_to_stop_before_it_began_it_does_not_begin(name: str, world: Path) -> None:
    path = request(world, hold=2)
    handle = submit(name, world, path)
    handle.terminate()
    assert ended(handle, 20) == 143
    assert not work(path).exists()


@pytest.mark.parametrize("name", ALL)
def test_killed_it_ends_with_its_children(name: str, world: Path) -> None:
    path = request(world, hold=2, child="613")
    handle = submit(name, world, path)
    until_holding(path)
    # What the worker asks of git may still be on its way.
    until(lambda: len(guard.descendants({handle.pid})) == 1, "its child is the only one")
    group = [handle.pid, *guard.descendants({handle.pid})]
    handle.kill()
    assert ended(handle, 20) == -signal.SIGKILL
    until(lambda: not any(guard.start_time(pid) for pid in group), "nothing of it is left")


@pytest.mark.parametrize("name", REMOTE)
def test_when_the_far_end_is_killed_the_worker_keeps_its_work_and_the_log_says_how_it_ended(
    name: str, world: Path
) -> None:
    path = request(world, hold=2)
    handle = submit(name, world, path)
    until_holding(path)
    pid = handle.pid
    os.kill(far_end(handle), signal.SIGKILL)
    assert ended(handle, 30) == -signal.SIGKILL
    assert guard.start_time(pid) is None
    assert (work(path) / "data/lines").read_text() == "xx"
    assert f"\n{name}: " in (world / "log").read_text()


@pytest.mark.parametrize("name", ALL)
def test_it_ends_when_the_runner_is_killed(name: str, world: Path) -> None:
    path = request(world, hold=2)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom speculators.runner.executors import executor\n"
        "handle = executor(sys.argv[1]).submit(Path(sys.argv[2]), Path(sys.argv[3]), {})\n"
        "while not handle.pid: time.sleep(0.01)\nprint(handle.pid, flush=True)\ntime.sleep(600)"
    )
    argv = [sys.executable, "-c", code, name, str(path), str(world / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        pid = int(runner.stdout.readline())
        until_holding(path)
        runner.kill()
    until(lambda: guard.start_time(pid) is None, "the worker ended with its runner")
    assert (work(path) / "data/lines").read_text() == "xx"


@SUBMITIT
def test_a_job_that_has_to_go_is_queued_again_and_resumes(world: Path) -> None:
    path = request(world, count=5, hold=3)
    handle = submit("submitit", world, path)
    until_holding(path)
    first = handle.pid
    os.kill(far_end(handle), signal.SIGUSR2)
    until(lambda: handle.pid not in (0, first), "it is started again")
    assert ended(handle, 60) == 0
    made = artifact(path)
    assert made is not None
    assert (made.data / "lines").read_text() == "xxxxx"
    assert made.record["attempts"] == 2


@SUBMITIT
def test_no_file_holds_what_the_environment_holds(world: Path) -> None:
    path = request(world, hold=2)
    handle = submit("submitit", world, path, A_KEY="secret-4711")
    until_holding(path)
    files = [p for p in world.rglob("*") if p.is_file()]
    assert any(p.suffix == ".pkl" for p in files)
    assert [p for p in files if b"secret-4711" in p.read_bytes()] == []
    handle.kill()
    ended(handle, 20)


SBATCH = """#!/bin/sh
cp "$1" {world}/batch.sh
SLURM_JOB_ID=4242 SLURM_JOB_NODELIST=here SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 \\
SLURM_LOCALID=0 CUDA_VISIBLE_DEVICES=7 setsid sh "$1" > {world}/sbatch.log 2>&1 &
echo "Submitted batch job 4242"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
  case "$1" in --output|--error|-o|-e) shift;; esac
  shift
done
exec "$@"
"""


@pytest.fixture
def slurm(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster as far as submitit sees it: one machine, no queue."""
    place = world / "slurm"
    place.mkdir()
    tools = {
        "sbatch": SBATCH.replace("{world}", str(world)),
        "srun": SRUN,
        "sacct": "#!/bin/sh\n",
        "scancel": "#!/bin/sh\n",
    }
    for name, text in tools.items():
        (place / name).write_text(text)
        (place / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return world


@SUBMITIT
def test_a_job_of_slurm_asks_for_what_the_recipe_says_and_sees_the_gpus_it_was_given(slurm: Path) -> None:
    options = ExecutorOptions(partition="long", time_limit=90, gpus=2, cpus=3)
    path = request(slurm, tells=["CUDA_VISIBLE_DEVICES"])
    handle = executors.executor("submitit", options).submit(path, slurm / "log", {})
    assert ended(handle, 60) == 0
    assert (slurm / "log").read_text() == "7\n"
    asked = (slurm / "batch.sh").read_text()
    for line in ("--partition=long", "--time=90", "--gpus-per-node=2", "--cpus-per-task=3"):
        assert f"#SBATCH {line}\n" in asked


@SUBMITIT
def test_without_slurm_the_error_says_so(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(world))
    with pytest.raises(StageError, match="srun") as caught:
        executors.executor("slurm", ExecutorOptions()).submit(request(world), world / "log", {})
    assert "executor=submitit" in caught.value.hint


def test_a_stage_may_have_an_executor_of_its_own() -> None:
    config = compose.compose([DEMO, "executor=slurm", "evaluate.executor=local", "executor.partition=long"])
    assert executors.executor_name(config, "train") == "slurm"
    assert executors.executor_name(config, "evaluate") == "local"
    assert executors.executor_name(config, "fetch") == "slurm"
    assert config.executor.name is ExecutorName.slurm


def test_an_executor_that_is_not_installed_is_refused_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = compose.compose([DEMO, "train.executor=ray"])
    with pytest.raises(RecipeError, match=r"train\.executor=ray: needs `ray`, which is not installed") as caught:
        executors.check_executors(config, build(config))
    assert caught.value.hint == install_command("ray")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    config = compose.compose([DEMO, "train.trackers=[tensorboard,wandb]"])
    with pytest.raises(
        RecipeError, match=r"train\.trackers=\[wandb\]: needs `wandb`, which is not installed"
    ) as caught:
        executors.check_executors(config, build(config))
    assert caught.value.hint == install_command("wandb")


def test_only_a_stage_that_would_share_its_job_with_its_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for words in (["executor=slurm"], ["pipeline=offline", "executor=slurm", "extract.workers=2"],
                  ["pipeline=online", "executor=slurm", "train.executor=local"],
                  ["pipeline=online", "executor=slurm", "serve.url=http://gpu-7:8000"]):  # fmt: skip
        config = compose.compose([DEMO, *words])
        executors.check_executors(config, build(config))
    config = compose.compose([DEMO, "pipeline=online", "executor=slurm"])
    with pytest.raises(RecipeError, match=r"executor=slurm: `train` streams hidden states") as no:
        executors.check_executors(config, build(config))
    assert "train.executor=local; or serve.url=URL" in no.value.hint


def test_what_runs_elsewhere_is_served_there_unless_a_server_is_named() -> None:
    config = compose.compose([DEMO, "executor=slurm", "evaluate.executor=local"])
    assert executors.has_remote_servers(config, "regenerate")
    assert not executors.has_remote_servers(config, "evaluate")
    config.serve.url = "http://gpu-7:8000"
    assert not executors.has_remote_servers(config, "regenerate")


def test_a_holder_on_this_machine_lives_as_long_as_its_process(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    note = {
        "machine": guard.machine(),
        "pid": child.pid,
        "start": guard.start_time(child.pid),
        "request": "",
        "heartbeat": 1,
    }
    lease.write_note(tmp_path / "held", note)
    holder = lease.LeaseReader(tmp_path / "held")
    assert holder.holder_lives
    assert holder.request == ""
    child.kill()
    child.wait()
    assert holder.holder_lives is False
    assert holder.request == "terminate"


def test_a_holder_elsewhere_is_believed_at_its_second_beat_and_dead_when_they_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    note = {"machine": "another", "pid": 1, "start": 1, "request": ""}
    lease.write_note(tmp_path / "held", {**note, "heartbeat": 7})
    holder = lease.LeaseReader(tmp_path / "held")
    assert holder.holder_lives is None
    lease.write_note(tmp_path / "held", {**note, "heartbeat": 8})
    assert holder.holder_lives
    clock[0] = lease.LEASE_SECONDS - 1
    assert holder.holder_lives
    clock[0] = lease.LEASE_SECONDS + 1
    assert holder.holder_lives is False


def test_the_far_end_hears_a_wish_at_once_and_signs_of_life_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    held = lease.Lease(tmp_path / "held")
    beat = lease.read_note(tmp_path / "held")["heartbeat"]
    until(lambda: lease.read_note(tmp_path / "held").get("heartbeat", 0) > beat, "it beats")
    held.request("kill")
    assert lease.LeaseReader(tmp_path / "held").request == "kill"
    held.release()


def test_a_signal_in_the_middle_of_a_beat_may_wish_to_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = lease.Lease(tmp_path / "held")
    held.release()
    write, nested = lease.write_note, []

    def interrupted(path: Path, note: dict[str, object]) -> None:
        if not nested:
            nested.append(note)
            held.request("kill")  # as the handler does, in the same thread
        write(path, note)

    monkeypatch.setattr(lease, "write_note", interrupted)
    held.request("terminate")
    assert lease.LeaseReader(tmp_path / "held").request == "kill"


def test_half_a_note_is_no_news(tmp_path: Path) -> None:
    (tmp_path / "held").write_text('{"machine": "an')
    assert lease.read_note(tmp_path / "held") == {}
    assert lease.read_note(tmp_path / "none") == {}
    lease.write_note(tmp_path / "held", {"heartbeat": 1})
    assert json.loads((tmp_path / "held").read_text()) == {"heartbeat": 1}


@pytest.mark.parametrize("name", REMOTE)
def test_a_recipe_has_the_same_keys_and_bytes_through_every_executor(name: str, world: Path) -> None:
    rows = [{"id": f"r{i}", "conversations": [{"from": "human", "value": f"Count to {i}, please."}]} for i in range(20)]
    (world / "rows.json").write_text(json.dumps(rows))
    made = {}
    for chosen in ("local", name):
        words = [DEMO, "until=prompts", "data.sharegpt.source=rows.json", f"run.store={world / chosen}"]
        argv = [sys.executable, "-m", "speculators.cli", *words, f"executor={chosen}"]
        done = subprocess.run(argv, cwd=world, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        [found] = Store(world / chosen).artifacts("prompts")
        made[chosen] = (found.key, found.digest)
    assert made["local"] == made[name]


def test_a_worker_keeps_the_memory_that_it_frees_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "trim_threshold" in worker_environment({})["GLIBC_TUNABLES"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    assert worker_environment({})["GLIBC_TUNABLES"] == "glibc.malloc.check=3"
