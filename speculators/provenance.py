"""Provenance of an artifact: user, machine, versions and git state, which enter no key but help to explain differences.

Only the *names* of environment variables are recorded, because values may be secrets. No package is imported for its
version, and git runs in the background while the stage runs.
"""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from speculators.machine import describe_machine
from speculators.timeouts import GIT_SECONDS


class Provenance:
    """Collects the provenance of an attempt; a context manager around it."""

    def __init__(self) -> None:
        package, directory = _checkout(Path(__file__).resolve().parent), _checkout(Path.cwd().resolve())
        checkouts = {"package": package, "directory": directory if directory != package else None}
        self._git = {name: _start_git(root) for name, root in checkouts.items() if root}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill git processes that still run."""
        for process in filter(None, self._git.values()):
            process.kill()
            process.communicate()

    def facts(self) -> dict[str, Any]:
        """All values, as JSON types; call it once, after the stage has imported its packages."""
        return {
            "user": _user(),
            "host": os.uname().nodename,
            "directory": str(Path.cwd()),
            "python": platform.python_version(),
            "platform": platform.platform(),
            **describe_machine(),
            "versions": _versions(),
            "environment": sorted(os.environ),
            "git": {name: state for name, process in self._git.items() if (state := _read_git(process))},
        }


def _checkout(path: Path) -> Path | None:
    """Root of the git checkout that contains a directory."""
    return next((root for root in (path, *path.parents) if (root / ".git").exists()), None)


def _start_git(root: Path) -> subprocess.Popen[str] | None:
    # git must neither lock the repository nor start a daemon.
    argv = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "--no-optional-locks"]
    argv += ["status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None  # git is not installed


def _read_git(process: subprocess.Popen[str] | None) -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; empty if git failed. No remote: its URL may hold a key."""
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
    """Versions of the imported packages that have a `__version__`."""
    versions = {}
    for name, module in list(sys.modules.items()):
        # `vars`, because getting an attribute of a lazy module may import more.
        version = vars(module).get("__version__") if "." not in name and module is not None else None
        if isinstance(version, str) and name not in sys.stdlib_module_names:
            versions[name] = str(version)  # torch's is a subclass of str
    return dict(sorted(versions.items()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container the user may have no name
        return str(os.getuid())
