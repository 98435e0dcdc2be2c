"""What may run beside what, how long, and how often: devices, memory and places; time limits and attempts.

A stage that trains, or for which we start a server, has a device to itself, and on a machine without accelerators all
cores together are that one device. Light stages (fetching, reading, counting) run beside it as long as there is memory
and a place.
Everything is taken at once when a stage starts and given back when it ends, so nobody waits for another in a circle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from speculators.config.schema import Config
from speculators.errors import RecipeError, closest
from speculators.runner import executors
from speculators.runner.execution.device_locks import Tokens
from speculators.runner.execution.events import Events
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node
from speculators.runner.servers import vllm

GIB = 2**30
LIGHT = GIB
"""Memory that a process of ours is counted with besides weights and caches, in bytes: imports, rows in flight."""
LARGEST_SHARE = 0.6
"""Of a GPU's memory that a server may take where training has to live beside it."""
CGROUP = Path("/sys/fs/cgroup/memory.max")

Devices = tuple[int, ...]
"""Numbers of devices, ascending; none for a light stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a stage takes while it runs."""

    devices: int = 0
    memory: int = LIGHT
    """Bytes, estimated."""
    alone: bool = False
    """Nothing may run beside it."""
    here: bool = True
    """It runs on this machine; elsewhere there is always room, or somebody else's queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a server and the training that draws from it divide a machine among themselves."""

    unit: str
    """`cores` or `GPUs`."""
    server: int
    training: int
    shared: bool
    """There are not enough for both: they use the same ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How often and how long a stage may try."""

    retries: float
    retry_wait: float
    """Seconds before the second attempt; twice as many before each further one."""
    time_limit: float
    """Seconds; 0: as long as it takes."""


class Room:
    """What this run has, and who has taken what of it. `tokens` are asked whether other runs have it.

    `told` hears, once, of each stage that waits for another run.
    """

    def __init__(self, *, devices: int, memory: int, places: int, tokens: Tokens, told: Callable[[str], None]) -> None:
        self.devices = devices
        self.memory = memory
        self.places = places
        self._tokens = tokens
        self._told = told
        self._waiting: set[str] = set()
        self._held: dict[str, tuple[Need, Devices]] = {}

    def holds(self, name: str) -> bool:
        """Whether this stage has started and not ended."""
        return name in self._held

    def take(
        self, name: str, need: Need, *, prefer: Collection[int] = (), avoid: Collection[int] = ()
    ) -> Devices | None:
        """The devices that the stage may use from now on, or None while there is no room for it.

        A stage that needs more than there is gets all of it, once nothing else runs.
        """
        if not need.here:
            self._held[name] = need, ()
            return ()
        held = [(other, devices) for other, devices in self._held.values() if other.here]
        if held and (
            need.alone
            or any(other.alone for other, _ in held)
            or len(held) >= self.places
            or sum(other.memory for other, _ in held) + need.memory > self.memory
        ):
            return None
        busy = {device for _, devices in held for device in devices}
        free = [device for device in range(self.devices) if device not in busy]
        wanted = min(need.devices, self.devices)
        if len(free) < wanted:
            return None
        chosen = sorted(free, key=lambda d: (d not in prefer, d in avoid, d))
        if wanted:
            chosen = self._tokens.take(chosen, wanted, alone=need.alone)
        if len(chosen) < wanted:
            if name not in self._waiting:
                self._waiting.add(name)
                self._told(name)
            return None
        devices = tuple(sorted(chosen[:wanted]))
        self._held[name] = need, devices
        return devices

    def give_back(self, name: str, servers: Collection[int] = ()) -> None:
        """The stage has ended; on the devices of `servers` there are some that are kept, or not gone yet."""
        self._held.pop(name, None)
        self._tokens.keep({*servers, *(device for _, devices in self._held.values() for device in devices)})

    def close(self) -> None:
        """Nothing runs any more."""
        self._tokens.keep(())


def room(config: Config, locks: Path, events: Events) -> Room:
    """What the recipe and the machine offer, other runs that lock in the same directory considered."""
    reason = "another run with this store has its devices"
    return Room(
        devices=max(1, config.hardware.gpus),
        memory=int(config.run.memory_gib * GIB) or _memory(),
        places=config.run.parallel or max(2, os.cpu_count() or 1),
        tokens=Tokens(locks, _names(config) or ["cpu"]),
        told=lambda name: events.emit("stage.waiting", node=name, reason=reason),
    )


def need(node: Node, config: Config, target: Path | None) -> Need:
    """What one stage takes; `target` is the checkpoint's directory, if it is at hand.

    Weights are counted as they are stored, once a server; the memory that counts is the machine's, not the device's.
    """
    if executors.elsewhere(config, node.kind):
        return Need(here=False)
    servers = 0 if config.serve.url else max(len(phase) for phase in graph.phases(node, config))
    if not node.spec.trains and not servers:
        return Need()
    on_cpu = vllm.device(config) == "cpu"
    weights = sum(file.stat().st_size for file in target.glob("*.safetensors")) if target else 0
    cache = int(config.serve.kv_cache_gib * GIB) if on_cpu and servers else 0
    divided = split(node, config)
    beside = divided.training if divided is not None and divided.unit == "GPUs" and not divided.shared else 0
    drawn = int(config.train.states_memory_gib * GIB) + (weights if servers else 0) if node.draws else 0
    return Need(
        devices=(vllm.ranks(config) if servers else 1 if on_cpu else config.train.num_processes) + beside,
        memory=LIGHT + max(1, servers) * (weights + cache) + drawn,
        alone=on_cpu and node.spec.measures,
    )


def split(node: Node, config: Config) -> Split | None:
    """How a stage that draws from a server shares the machine with it; None for any other, and for a server elsewhere.

    Raises:
        RecipeError: the server would leave it no memory.
    """
    if not node.draws or config.serve.url:
        return None
    if vllm.device(config) == "cpu":
        cores = len(vllm.usable_cores())
        training = max(1, min(config.hardware.train_cores or cores // 2, cores - 1))
        return Split(unit="cores", server=max(1, cores - training), training=training, shared=cores == 1)
    ranks, share = vllm.ranks(config), config.serve.gpu_memory_utilization
    shared = max(1, config.hardware.gpus) <= ranks
    if shared and share > LARGEST_SHARE:
        raise RecipeError(
            f"{node.name} draws from a server on the same GPUs, and serve.gpu_memory_utilization={share:g} leaves it "
            "too little memory",
            f"give training its own GPU, hardware.gpus={ranks + 1} or more; or set serve.gpu_memory_utilization=0.5",
        )
    return Split(unit="GPUs", server=ranks, training=config.train.num_processes, shared=shared)


def parts(node: Node, config: Config, devices: Devices, prefer: Collection[int] = ()) -> tuple[Devices, Devices]:
    """Of a stage's devices those of its servers, rather the preferred ones, and those of its worker."""
    divided = split(node, config)
    if divided is None or divided.shared or divided.unit == "cores" or len(devices) <= divided.server:
        return devices, devices
    ordered = sorted(devices, key=lambda device: (device not in prefer, device))
    return tuple(sorted(ordered[: divided.server])), tuple(sorted(ordered[divided.server :]))


def threads(node: Node, config: Config) -> Mapping[str, str]:
    """Variables that keep a stage's worker to the cores that its server leaves it."""
    divided = split(node, config)
    return {"OMP_NUM_THREADS": str(divided.training)} if divided is not None and divided.unit == "cores" else {}


def environment(config: Config, devices: Devices) -> Mapping[str, str]:
    """Variables that keep a process to these devices; of those that the user has chosen, if there is a choice."""
    names = _names(config)
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices)} if devices and names else {}


def _names(config: Config) -> list[str]:
    """What the recipe's GPUs are called: as the user has chosen them, if there is a choice."""
    chosen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = config.hardware.gpus
    return chosen[:count] if len(chosen) >= count else [str(n) for n in range(count)]


def limits(config: Config, name: str) -> Limits:
    """What `run` says for all stages, and `run.stages` for this one, or for the one that it is a part of."""
    run = config.run
    plain = {"retries": run.retries, "retry_wait": run.retry_wait, "time_limit": run.time_limit}
    return Limits(**{**plain, **run.stages.get(name, run.stages.get(name.rpartition(".")[0], {}))})


def check(config: Config) -> None:
    """Raises RecipeError where the options of this module do not fit the recipe."""
    known = [f.name for f in fields(Limits)]
    for name, own in config.run.stages.items():
        if name not in config.pipeline:
            raise RecipeError(f"run.stages: the recipe has no stage `{name}`", closest(name, config.pipeline))
        for option in own.keys() - known:
            raise RecipeError(f"run.stages.{name}: there is no option `{option}`", closest(option, known))
        for option, value in own.items():
            if not value >= 0:
                hint = f"leave run.stages.{name}.{option} out for the default"
                raise RecipeError(f"run.stages.{name}.{option}={value}: must not be negative", hint)


def _memory() -> int:
    """Bytes of this machine, or of the control group that we are in."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return whole
