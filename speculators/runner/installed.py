"""What is installed, by the names of its directories.

importlib.metadata knows the same and more, and costs tens of milliseconds to import: a tenth of a run in which
everything is cached.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

_DIRECTORY = re.compile(r"(.+?)-([^-]+)(?:-[^-]+)*\.(?:dist|egg)-info")


def installed(places: Iterable[str] | None = None) -> dict[str, str]:
    """Versions of the distributions in `places`, or where this interpreter looks; the first place that has one counts.

    Names are in lower case with `-` between their words (`hydra-core`); versions keep their local part.
    """
    found: dict[str, str] = {}
    for place in sys.path if places is None else places:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        for match in filter(None, map(_DIRECTORY.fullmatch, names)):
            found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found
