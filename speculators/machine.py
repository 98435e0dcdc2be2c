"""This machine as artifacts record it: its processor, cores, memory and GPUs. Nothing is imported for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPEED = ("cpu", "cores", "gpus")
"""What two machines must have in common so that durations of one hold for the other."""


def describe_machine() -> dict[str, Any]:
    """The machine of this process, as JSON values."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def equally_fast(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two descriptions have the same processor, number of cores and GPUs."""
    return all(first.get(name) == second.get(name) for name in SPEED)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    """Names of NVIDIA GPUs, from the driver."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("Model")]
    return names
