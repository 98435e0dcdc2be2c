"""Versions of installed distributions.

importlib.metadata is imported inside the functions, because its import takes as long as the rest of `--help`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


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
