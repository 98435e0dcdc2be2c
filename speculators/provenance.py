"""Who made an artifact, where and with what: in no key, but the answer to "why does this differ?".

Of the environment only the *names* of variables are kept: a value may be a secret. Nothing is loaded to be written
down, and nothing waits for git: it is asked when the stage starts and heard when the stage has ended.
"""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

GIT_SECONDS = 5.0
"""How long git may still take when the stage is done."""


class Provenance:
    """The surroundings of one attempt; made when it starts, and closed when it ends, however it does."""

    def __init__(self) -> None:
        package, directory = _checkout(Path(__file__).resolve().parent), _checkout(Path.cwd().resolve())
        places = {"package": package, "directory": directory if directory != package else None}
        self._git = {name: _asked(root) for name, root in places.items() if root}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End what was asked and not heard."""
        for process in filter(None, self._git.values()):
            process.kill()
            process.communicate()

    def facts(self) -> dict[str, Any]:
        """Everything, as plain values; called once, when what the stage needed is imported."""
        return {
            "user": _user(),
            "host": os.uname().nodename,
            "directory": str(Path.cwd()),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _gpus(),
            "versions": _versions(),
            "environment": sorted(os.environ),
            "git": {name: state for name, process in self._git.items() if (state := _heard(process))},
        }


def _checkout(path: Path) -> Path | None:
    """The git checkout that a directory lies in."""
    return next((root for root in (path, *path.parents) if (root / ".git").exists()), None)


def _asked(root: Path) -> subprocess.Popen[str] | None:
    # Neither a lock nor a daemon of git's may come of a question.
    words = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "--no-optional-locks"]
    words += ["status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None  # there is no git


def _heard(process: subprocess.Popen[str] | None) -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; empty if git did not say. No remote: its URL may hold a key."""
    if process is None:
        return {}
    try:
        lines = process.communicate(timeout=GIT_SECONDS)[0].splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {}
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid")), None)
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)} if commit else {}


def _versions() -> dict[str, str]:
    """Of every package that is imported by now and says its version."""
    found = {}
    for name, module in list(sys.modules.items()):
        # By `vars`, because asking a lazy module for an attribute may load it.
        version = vars(module).get("__version__") if "." not in name and module is not None else None
        if isinstance(version, str) and name not in sys.stdlib_module_names:
            found[name] = str(version)  # torch's is a class of its own
    return dict(sorted(found.items()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container the user may have no name
        return str(os.getuid())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    """NVIDIA's, by their driver."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found += [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("Model")]
    return found
