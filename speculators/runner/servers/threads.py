"""Which OpenMP the processes of this machine compute with, how its threads wait, and where their memory comes from.

libgomp's threads spin at a barrier, and on a machine whose cores are all in use they starve whatever else needs one.
Intel's library sleeps after a given time and wakes faster: on two cores an engine's step over one to four tokens
takes half as long with it (docs/log.md). Its wheel comes along with vLLM for CPUs and puts it into `lib`, from where
it has to be preloaded; a library that a user preloads stays the one.

A training step allocates and frees the same tens of megabytes over and over. glibc hands such pieces back to the
kernel, which has to find and clear their pages the next time; told to keep them, in large pages, a step takes a tenth
less (docs/log.md). Other libraries do not know the variable.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK_MS = "5"
"""How long a thread of Intel's library spins before it sleeps."""
SPINS = "1000"
"""How often a thread of libgomp looks before it sleeps."""
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x40000000:glibc.malloc.trim_threshold=0x100000000"
"""Pieces below 1 GiB come out of a heap that is not given back below 4 GiB."""


def env(interpreter: Path) -> dict[str, str]:
    """Variables for a process of `interpreter`, a path whose links are not resolved."""
    variables = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
    library = interpreter.parent.parent / "lib" / "libiomp5.so"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library.exists() and not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        preloaded = ":".join(filter(None, [preloaded, str(library)]))
        variables["LD_PRELOAD"] = preloaded
    if "libiomp" in preloaded:
        variables["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", BLOCK_MS)
    return variables


def memory() -> dict[str, str]:
    """Variables for a process that computes with large tensors all the time; what a user has set stays."""
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC)}
