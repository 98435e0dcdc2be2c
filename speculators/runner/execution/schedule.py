"""Decides which stages run at the same time (devices, memory, slots), and each stage's time limit and retries.

What a stage needs of a machine is its placement (`placement`).

A stage that trains, or that needs a server of this run, has its devices to itself; on a machine without accelerators
all cores together are one device. Light stages (fetch, tokenize, count) run at the same time while memory and a slot
are free. A stage acquires all its resources at once when it starts and releases them when it ends, so no two stages
can wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from speculators.config.execution import StageLimits
from speculators.config.schema import Config
from speculators.errors import RecipeError, closest
from speculators.runner.execution.device_locks import DeviceLocks
from speculators.runner.execution.events import Events
from speculators.runner.execution.placement import Devices, Placement, device_names
from speculators.runner.hardware import GIB, Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Retries and time limit of one stage."""

    retries: int
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
        self._running: dict[str, tuple[Placement, Devices]] = {}

    def is_running(self, name: str) -> bool:
        """Whether this stage has acquired its resources and not released them."""
        return name in self._running

    def acquire(
        self, name: str, need: Placement, *, prefer: Collection[int] = (), avoid: Collection[int] = ()
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


def resource_pool(config: Config, machine: Machine, locks: Path, events: Events) -> ResourcePool:
    """The resources that the recipe allows and the machine has; `locks` is the directory shared with other runs."""
    reason = "another run with this store has its devices"
    names = device_names(config, machine)
    return ResourcePool(
        devices=len(names),
        memory=int(config.run.memory_gib * GIB) or machine.memory,
        slots=config.run.parallel or max(2, os.cpu_count() or 1),
        locks=DeviceLocks(locks, names),
        on_wait=lambda name: events.emit("stage.waiting", node=name, reason=reason),
    )


def limits(config: Config, name: str) -> Limits:
    """A stage's limits: those of `run.stages` for it, or for the stage that it is a part of; else those of `run`."""
    run = config.run
    stage_limits = run.stages.get(name) or run.stages.get(name.rpartition(".")[0]) or StageLimits()

    def limit(option: str) -> Any:
        value = getattr(stage_limits, option)
        return getattr(run, option) if value is None else value

    return Limits(**{f.name: limit(f.name) for f in fields(Limits)})


def check_limits(config: Config) -> None:
    """Raise RecipeError if `run.stages` names an unknown stage."""
    for name in config.run.stages:
        if name not in config.pipeline:
            raise RecipeError(f"run.stages: the recipe has no stage `{name}`", closest(name, config.pipeline))
