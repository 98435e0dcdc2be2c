"""Environment variables that choose a process's OpenMP library, how its threads wait, and its allocator's settings.

libgomp's threads spin at a barrier and starve other processes when all cores are busy. Intel's library sleeps after
a set time and wakes faster: on two cores an engine's step over one to four tokens takes half as long with it
(docs/log.md). The wheel of vLLM for CPUs installs it in `lib`, from where it has to be preloaded. A library that the
user preloads takes precedence.

A training step allocates and frees the same tens of megabytes again and again. By default glibc returns such blocks
to the kernel, which has to clear their pages the next time; kept, in large pages, they make a step a tenth faster
(docs/log.md). Other C libraries ignore the variable.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK_MS = "5"
"""Milliseconds that a thread of Intel's library spins before it sleeps."""
SPINS = "1000"
"""Iterations that a thread of libgomp spins before it sleeps."""
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x40000000:glibc.malloc.trim_threshold=0x100000000"
"""Blocks below 1 GiB come from the heap, which returns memory to the kernel only above 4 GiB."""


def openmp_environment(interpreter: Path) -> dict[str, str]:
    """OpenMP variables for a process of `interpreter`, a path with unresolved links."""
    variables = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS)}
    library = interpreter.parent.parent / "lib" / "libiomp5.so"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if library.exists() and not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        preloaded = ":".join(filter(None, [preloaded, str(library)]))
        variables["LD_PRELOAD"] = preloaded
    if "libiomp" in preloaded:
        variables["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", BLOCK_MS)
    return variables


def allocator_environment() -> dict[str, str]:
    """The allocator's variable for a process that computes with large tensors; the user's value takes precedence."""
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC)}
