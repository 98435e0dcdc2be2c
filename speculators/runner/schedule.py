"""What may run beside what, how long, and how often: devices, memory and places; time limits and attempts.

A stage that trains, or for which we start a server, has a device to itself, and on a machine without accelerators all
cores together are that one device. Light stages (fetching, reading, counting) run beside it as long as there is memory
and a place.
Everything is taken at once when a stage starts and given back when it ends, so nobody waits for another in a circle.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from speculators.config import Config
from speculators.errors import RecipeError, closest
from speculators.runner import graph, vllm
from speculators.runner.graph import Node

GIB = 2**30
LIGHT = GIB
"""Memory that a process of ours is counted with besides weights and caches, in bytes: imports, rows in flight."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How often and how long a stage may try."""

    retries: float
    retry_wait: float
    """Seconds before the second attempt; twice as many before each further one."""
    time_limit: float
    """Seconds; 0: as long as it takes."""


class Room:
    """What this run has, and who has taken what of it."""

    def __init__(self, *, devices: int, memory: int, places: int) -> None:
        self.devices = devices
        self.memory = memory
        self.places = places
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
        held = self._held.values()
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
        chosen = tuple(sorted(sorted(free, key=lambda d: (d not in prefer, d in avoid, d))[:wanted]))
        self._held[name] = need, chosen
        return chosen

    def give_back(self, name: str) -> None:
        """The stage has ended."""
        self._held.pop(name, None)


def room(config: Config) -> Room:
    """What the recipe and the machine offer."""
    return Room(
        devices=max(1, config.hardware.gpus),
        memory=int(config.run.memory_gib * GIB) or _memory(),
        places=config.run.parallel or max(2, os.cpu_count() or 1),
    )


def need(node: Node, config: Config, target: Path | None) -> Need:
    """What one stage takes; `target` is the checkpoint's directory, if it is at hand.

    Weights are counted as they are stored, once a server; the memory that counts is the machine's, not the device's.
    """
    servers = max(len(phase) for phase in graph.phases(node, config))
    if not node.spec.trains and (not servers or config.serve.url):
        return Need()
    on_cpu = vllm.device(config) == "cpu"
    weights = sum(file.stat().st_size for file in target.glob("*.safetensors")) if target else 0
    cache = int(config.serve.kv_cache_gib * GIB) if on_cpu and servers else 0
    return Need(
        devices=config.serve.tensor_parallel if servers else 1,
        memory=LIGHT + max(1, servers) * (weights + cache),
        alone=on_cpu and node.spec.measures,
    )


def environment(config: Config, devices: Devices) -> Mapping[str, str]:
    """Variables that keep a process to these devices; of those that the user has chosen, if there is a choice."""
    if not devices or config.hardware.gpus < 1:
        return {}
    chosen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = chosen if len(chosen) >= config.hardware.gpus else [str(n) for n in range(config.hardware.gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices)}


def limits(config: Config, name: str) -> Limits:
    """What `run` says for all stages, and `run.stages` for this one."""
    run = config.run
    plain = {"retries": run.retries, "retry_wait": run.retry_wait, "time_limit": run.time_limit}
    return Limits(**{**plain, **run.stages.get(name, {})})


def check(config: Config) -> None:
    """Raises RecipeError where the options of this module do not fit the recipe."""
    known = [f.name for f in fields(Limits)]
    for name, own in config.run.stages.items():
        if name not in config.pipeline:
            raise RecipeError(f"run.stages: the recipe has no stage `{name}`", closest(name, config.pipeline))
        for option in own.keys() - known:
            raise RecipeError(f"run.stages.{name}: there is no option `{option}`", closest(option, known))
    values = {f"run.{option}": getattr(config.run, option) for option in (*known, "parallel", "memory_gib")}
    values |= {f"run.stages.{name}.{k}": v for name, own in config.run.stages.items() for k, v in own.items()}
    for option, value in values.items():
        if value < 0:
            raise RecipeError(f"{option} must not be negative", "leave it out for the default")


def _memory() -> int:
    """Bytes of this machine, or of the control group that we are in."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return whole
