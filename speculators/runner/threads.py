"""Which OpenMP the processes of this machine compute with, and how its threads wait.

libgomp's threads spin at a barrier, and on a machine whose cores are all in use they starve whatever else needs one.
Intel's library sleeps after a given time and wakes faster: on two cores an engine's step over one to four tokens
takes half as long with it (docs/log.md). Its wheel comes along with vLLM for CPUs and puts it into `lib`, from where
it has to be preloaded; a library that a user preloads stays the one.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK_MS = "5"
"""How long a thread of Intel's library spins before it sleeps."""
SPINS = "1000"
"""How often a thread of libgomp looks before it sleeps."""


def env(interpreter: Path) -> dict[str, str]:
    """Variables for a process of `interpreter`, a path whose links are not resolved."""
    variables = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
    library = interpreter.parent.parent / "lib" / "libiomp5.so"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library.exists() and not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        variables["LD_PRELOAD"] = ":".join(filter(None, [preloaded, str(library)]))
        variables["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", BLOCK_MS)
    return variables
