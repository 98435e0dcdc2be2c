"""Decides which stages run at the same time (devices, memory, slots), and each stage's time limit and retries.

A stage that trains, or that needs a server of this run, has its devices to itself; on a machine without accelerators
all cores together are one device. Light stages (fetch, tokenize, count) run at the same time while memory and a slot
are free. A stage acquires all its resources at once when it starts and releases them when it ends, so no two stages
can wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from speculators.config.schema import Config
from speculators.errors import RecipeError, closest
from speculators.runner import executors
from speculators.runner.execution.device_locks import DeviceLocks
from speculators.runner.execution.events import Events
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node
from speculators.runner.servers import vllm

GIB = 2**30
BASE_MEMORY_BYTES = GIB
"""Estimated memory of a worker besides weights and caches: imported modules, rows in flight."""
MAX_SERVER_SHARE = 0.6
"""Share of a GPU's memory that a server may use when training runs on the same GPU."""
CGROUP = Path("/sys/fs/cgroup/memory.max")

Devices = tuple[int, ...]
"""Device numbers, ascending; empty for a light stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Resources that a stage holds while it runs."""

    devices: int = 0
    memory: int = BASE_MEMORY_BYTES
    """Bytes, estimated."""
    exclusive: bool = False
    """No other stage may run at the same time."""
    on_this_machine: bool = True
    """False: it runs elsewhere, holds nothing here and starts at once; a cluster may queue it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a server and the training that streams hidden states from it divide a machine."""

    unit: str
    """`cores` or `GPUs`."""
    server: int
    training: int
    shared: bool
    """There are too few for both: they use the same ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Retries and time limit of one stage."""

    retries: float
    retry_wait: float
    """Seconds before the second attempt; twice as many before each further one."""
    time_limit: float
    """Seconds; 0: none."""


class ResourcePool:
    """Resources of this run, and the stages that hold them. `locks` keep other runs off the same devices.

    `on_wait` is called once with the name of each stage that waits for another run's devices.
    """

    def __init__(self, *, devices: int, memory: int, slots: int, locks: DeviceLocks, on_wait: Callable[[str], None]):
        self.devices = devices
        self.memory = memory
        self.slots = slots
        self._locks = locks
        self._on_wait = on_wait
        self._waiting: set[str] = set()
        self._running: dict[str, tuple[Need, Devices]] = {}

    def is_running(self, name: str) -> bool:
        """Whether this stage has acquired its resources and not released them."""
        return name in self._running

    def acquire(
        self, name: str, need: Need, *, prefer: Collection[int] = (), avoid: Collection[int] = ()
    ) -> Devices | None:
        """Acquire a stage's resources; return its devices, or None while something is missing.

        A stage that needs more than the machine has gets all of it, once nothing else runs.
        """
        if not need.on_this_machine:
            self._running[name] = need, ()
            return ()
        running = [(other, devices) for other, devices in self._running.values() if other.on_this_machine]
        if running and (
            need.exclusive
            or any(other.exclusive for other, _ in running)
            or len(running) >= self.slots
            or sum(other.memory for other, _ in running) + need.memory > self.memory
        ):
            return None
        busy = {device for _, devices in running for device in devices}
        free = [device for device in range(self.devices) if device not in busy]
        count = min(need.devices, self.devices)
        if len(free) < count:
            return None
        chosen = sorted(free, key=lambda d: (d not in prefer, d in avoid, d))
        if count:
            chosen = self._locks.acquire(chosen, count, exclusive=need.exclusive)
        if len(chosen) < count:
            if name not in self._waiting:
                self._waiting.add(name)
                self._on_wait(name)
            return None
        devices = tuple(sorted(chosen[:count]))
        self._running[name] = need, devices
        return devices

    def release(self, name: str, servers: Collection[int] = ()) -> None:
        """Release the resources of a stage that has ended, except the devices on which `servers` still run."""
        self._running.pop(name, None)
        self._locks.release_except({*servers, *(device for _, devices in self._running.values() for device in devices)})

    def close(self) -> None:
        """Release all device locks at the end of the run."""
        self._locks.release_except(())


def resource_pool(config: Config, locks: Path, events: Events) -> ResourcePool:
    """The resources that the recipe allows and the machine has; `locks` is the directory shared with other runs."""
    reason = "another run with this store has its devices"
    return ResourcePool(
        devices=max(1, config.hardware.gpus),
        memory=int(config.run.memory_gib * GIB) or _machine_memory(),
        slots=config.run.parallel or max(2, os.cpu_count() or 1),
        locks=DeviceLocks(locks, _device_names(config) or ["cpu"]),
        on_wait=lambda name: events.emit("stage.waiting", node=name, reason=reason),
    )


def need(node: Node, config: Config, target: Path | None) -> Need:
    """The resources of one stage. `target` is the checkpoint's directory; None before it is fetched.

    Memory is that of the machine, not of the devices; weights count once for each server, at their size on disk.
    """
    if executors.is_remote(config, node.kind):
        return Need(on_this_machine=False)
    servers = 0 if config.serve.url else max(len(phase) for phase in graph.phases(node, config))
    if not node.spec.trains and not servers:
        return Need()
    on_cpu = vllm.device(config) == "cpu"
    weights = sum(file.stat().st_size for file in target.glob("*.safetensors")) if target else 0
    cache = int(config.serve.kv_cache_gib * GIB) if on_cpu and servers else 0
    divided = split(node, config)
    extra = divided.training if divided is not None and divided.unit == "GPUs" and not divided.shared else 0
    streamed = int(config.train.states_memory_gib * GIB) + (weights if servers else 0) if node.draws else 0
    return Need(
        devices=(vllm.ranks(config) if servers else 1 if on_cpu else config.train.num_processes) + extra,
        memory=BASE_MEMORY_BYTES + max(1, servers) * (weights + cache) + streamed,
        exclusive=on_cpu and node.spec.measures,
    )


def split(node: Node, config: Config) -> Split | None:
    """How a stage that streams hidden states divides this machine with its server; None without a server here.

    Raises:
        RecipeError: both share a GPU and the server would use too much of its memory.
    """
    if not node.draws or config.serve.url:
        return None
    if vllm.device(config) == "cpu":
        cores = len(vllm.usable_cores())
        training = max(1, min(config.hardware.train_cores or cores // 2, cores - 1))
        return Split(unit="cores", server=max(1, cores - training), training=training, shared=cores == 1)
    ranks, share = vllm.ranks(config), config.serve.gpu_memory_utilization
    shared = max(1, config.hardware.gpus) <= ranks
    if shared and share > MAX_SERVER_SHARE:
        raise RecipeError(
            f"{node.name} trains on the GPUs of the server that it streams from, and "
            f"serve.gpu_memory_utilization={share:g} leaves it too little memory",
            f"give training its own GPU, hardware.gpus={ranks + 1} or more; or set serve.gpu_memory_utilization=0.5",
        )
    return Split(unit="GPUs", server=ranks, training=config.train.num_processes, shared=shared)


def parts(node: Node, config: Config, devices: Devices, prefer: Collection[int] = ()) -> tuple[Devices, Devices]:
    """Split a stage's devices into those of its servers, preferred ones first, and those of its worker."""
    divided = split(node, config)
    if divided is None or divided.shared or divided.unit == "cores" or len(devices) <= divided.server:
        return devices, devices
    ordered = sorted(devices, key=lambda device: (device not in prefer, device))
    return tuple(sorted(ordered[: divided.server])), tuple(sorted(ordered[divided.server :]))


def threads(node: Node, config: Config) -> Mapping[str, str]:
    """Environment variables that limit a stage's worker to the cores that its server does not use."""
    divided = split(node, config)
    return {"OMP_NUM_THREADS": str(divided.training)} if divided is not None and divided.unit == "cores" else {}


def device_environment(config: Config, devices: Devices) -> Mapping[str, str]:
    """Environment variables that limit a process to these devices; {} for a light stage and on a CPU."""
    names = _device_names(config)
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices)} if devices and names else {}


def _device_names(config: Config) -> list[str]:
    """Names of the recipe's GPUs: the first ones of CUDA_VISIBLE_DEVICES if it has enough, else 0, 1, ..."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = config.hardware.gpus
    return visible[:count] if len(visible) >= count else [str(n) for n in range(count)]


def limits(config: Config, name: str) -> Limits:
    """A stage's limits: those of `run.stages` for it, or for the stage that it is a part of; else those of `run`."""
    run = config.run
    defaults = {"retries": run.retries, "retry_wait": run.retry_wait, "time_limit": run.time_limit}
    return Limits(**{**defaults, **run.stages.get(name, run.stages.get(name.rpartition(".")[0], {}))})


def check_limits(config: Config) -> None:
    """Raise RecipeError if `run.stages` names an unknown stage or option, or has a negative value."""
    options = [f.name for f in fields(Limits)]
    for name, limits in config.run.stages.items():
        if name not in config.pipeline:
            raise RecipeError(f"run.stages: the recipe has no stage `{name}`", closest(name, config.pipeline))
        for option in limits.keys() - options:
            raise RecipeError(f"run.stages.{name}: there is no option `{option}`", closest(option, options))
        for option, value in limits.items():
            if not value >= 0:
                hint = f"leave run.stages.{name}.{option} out for the default"
                raise RecipeError(f"run.stages.{name}.{option}={value}: must not be negative", hint)


def _machine_memory() -> int:
    """Memory in bytes of this machine, or of this process's control group if that allows less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return total
