"""Versions of installed distributions, and how the extras of this one are installed.

importlib.metadata is imported inside the functions, because its import takes as long as the rest of `--help`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE_TREE = Path(__file__).parent.parent
"""The checkout that this package runs from; without a pyproject.toml, it was installed from a wheel."""


def installed_version(name: str, path: Sequence[str] | None = None) -> str | None:
    """Return the version of a distribution, or None if it is not installed.

    Args:
        name: the distribution's name (`hydra-core`), in any spelling of `-`, `_`, `.` and case.
        path: directories to search, another interpreter's site-packages for one; None for `sys.path`.
    """
    from importlib.metadata import distributions

    distribution = next(iter(distributions(name=name, path=list(sys.path if path is None else path))), None)
    return None if distribution is None else distribution.version


def public_version(version: str) -> str:
    """Return a version without its local part: torch reports `2.13.0+cpu` where its wheel may be `2.13.0`."""
    return version.partition("+")[0]


def is_installed(prefix: str, path: Sequence[str] | None = None) -> bool:
    """Return whether any distribution is installed whose name begins with `prefix`; `path` as above."""
    from importlib.metadata import distributions

    installed = distributions(path=list(sys.path if path is None else path))
    return any(distribution.name.lower().replace("_", "-").startswith(prefix) for distribution in installed)


def pip() -> str:
    """Return the command that runs this interpreter's pip, whether or not its environment is activated."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "pip"
    python = Path(sys.executable)
    return f"{os.path.relpath(python) if python.is_relative_to(Path.cwd()) else python} -m pip"


def install_command(*extras: str) -> str:
    """Return the command that installs extras of this package, which is on no index.

    From a checkout it installs the checkout with the extras, else the distributions that the extras list.
    """
    if (SOURCE_TREE / "pyproject.toml").is_file():
        names = ",".join(extras)
        tree = "." if Path.cwd() == SOURCE_TREE else SOURCE_TREE
        return f"{pip()} install -e {shlex.quote(f'{tree}[{names}]')}"
    from importlib.metadata import requires

    listed = [line.partition(";") for line in requires("speculators-run") or ()]
    chosen = [
        name.strip() for name, _, when in listed if set(re.findall(r"extra == ['\"](.+?)['\"]", when)) & {*extras}
    ]
    return f"{pip()} install {shlex.join(chosen)}"
