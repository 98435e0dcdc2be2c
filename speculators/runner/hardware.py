"""Finds the GPUs, cores and memory of this machine without importing torch, or takes them from the recipe.

GPUs are those that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves visible. A recipe may describe GPUs of a given
memory (`conf/hardware/h100x8.yaml`): plans are then made for these, on any machine, and a run needs a machine that has
them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from speculators.config.execution import Hardware
from speculators.timeouts import NVIDIA_SMI_SECONDS

GIB = 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"
QUERY = ("--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
CGROUP = Path("/sys/fs/cgroup/memory.max")
SAME_MEMORY = 0.95
"""Share of the described memory from which a GPU counts as the described one: drivers reserve different amounts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU that this process can use."""

    name: str
    """Its product name, `NVIDIA H100 80GB HBM3`."""
    memory: int
    """Bytes; 0 if unknown."""
    id: str
    """Its entry in CUDA_VISIBLE_DEVICES: an index in the order of the PCI bus, or the UUID of a MIG device."""
    uuid: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a run can use of a machine."""

    gpus: tuple[Gpu, ...] = ()
    cores: int
    memory: int
    """Bytes."""
    described: bool = False
    """The recipe describes its GPUs, and this machine does not have them."""

    @property
    def gpu_memory(self) -> int:
        """Bytes of the smallest GPU; 0 if one is unknown, or if there is none."""
        return min((gpu.memory for gpu in self.gpus), default=0)

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU, {self.cores} cores, {self.memory / GIB:.0f} GiB of memory"
        names = sorted({gpu.name for gpu in self.gpus})
        size = f" ({self.gpu_memory / GIB:.0f} GiB)" if self.gpu_memory else ""
        return f"{len(self.gpus)} x {', '.join(names)}{size}"


def find_machine(*, look_for_gpus: bool = True) -> Machine:
    """What this process can use of this machine; finding GPUs may take a second."""
    gpus = visible_gpus(_all_gpus(), os.environ.get(VISIBLE)) if look_for_gpus else ()
    return Machine(gpus=gpus, cores=len(usable_cores()), memory=_memory())


def machine_of(options: Hardware) -> Machine:
    """The machine that a recipe is planned for: this one with at most `hardware.gpus` GPUs, or the described one."""
    here = find_machine()
    if options.gpu_memory_gib is None:
        return replace(here, gpus=here.gpus[: options.gpus])
    count, memory = options.gpus or 1, int(options.gpu_memory_gib * GIB)
    if len(here.gpus) >= count and all(gpu.memory >= SAME_MEMORY * memory for gpu in here.gpus[:count]):
        return replace(here, gpus=here.gpus[:count])
    gpus = tuple(Gpu(name=options.gpu_name or "GPU", memory=memory, id=str(n)) for n in range(count))
    return replace(here, gpus=gpus, described=True)


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs that `visible`, the value of CUDA_VISIBLE_DEVICES, leaves, in its order; None: all.

    As in CUDA, an entry is an index or the beginning of a UUID, and the first one that fits no GPU ends the list. A
    UUID becomes an index, since vLLM does not read the beginning of one. The memory of a MIG device is unknown here.
    """
    if visible is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in map(str.strip, visible.split(",")):
        if entry.startswith("MIG-"):
            chosen.append(Gpu(name="MIG device", memory=0, id=entry))
            continue
        matching = [gpu for gpu in gpus if entry and (gpu.id == entry or gpu.uuid.startswith(entry))]
        if len(matching) != 1:
            break
        chosen.append(matching[0])
    return tuple(chosen)


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _all_gpus() -> list[Gpu]:
    """NVIDIA GPUs by nvidia-smi; if that is missing or fails, by the device files, with unknown memory."""
    if (program := shutil.which("nvidia-smi")) is not None:
        try:
            done = subprocess.run(
                [program, *QUERY], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            rows = [[cell.strip() for cell in line.split(",", 3)] for line in done.stdout.splitlines()]
            return [
                Gpu(name=name, memory=int(mib) * 2**20 if mib.isdigit() else 0, id=index, uuid=uuid)
                for index, uuid, mib, name in (row for row in rows if len(row) == 4)
            ]
    numbers = sorted(int(file.name.removeprefix("nvidia")) for file in Path("/dev").glob("nvidia[0-9]*"))
    return [Gpu(name="NVIDIA GPU", memory=0, id=str(number)) for number in numbers]


def _memory() -> int:
    """Memory in bytes of this machine, or of this process's control group if that allows less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return total
