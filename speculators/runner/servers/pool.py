"""The servers of one run: one for each mode, dtype, draft and size, started when a stage needs it, shared by stages.

A server is in use while a stage has a lease on it. Afterwards it stays up as long as an upcoming stage needs it and no
other stage needs its devices. A dead server is replaced at the next lease; the stages that used it are retried.

For a stage that runs on another machine nothing starts here: its request contains a `ServerOrder` for each server, and
its job starts them there, for that stage only.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from speculators.runner import executors
from speculators.runner.execution.endings import TransientError
from speculators.runner.execution.events import Events
from speculators.runner.execution.placement import Devices, PlacedServer, device_environment
from speculators.runner.planning.graph import Node
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.planning.serving import cores_of, server_order
from speculators.runner.servers import vllm
from speculators.runner.servers.server import Server, external
from speculators.timeouts import SERVER_STOP_POLL_SECONDS


class Key(NamedTuple):
    """What stages must need alike to share a server."""

    mode: str
    dtype: str
    draft: str
    """Digest of the draft and vLLM's speculative config for it, for `speculative`."""
    cores: int
    """CPU cores; 0: all."""
    sizes: tuple[int, int, int]
    """Tensor, pipeline and data parallel size."""
    utilization: float | None


Phase = Sequence[PlacedServer]


class ServerPool:
    """The running servers, by key and devices. The owner has to call `poll` regularly, and `close` at the end."""

    def __init__(self, planner: Planner, steps: Mapping[str, Step], directory: Path, events: Events) -> None:
        self.planner = planner
        self._directories, self._logs = planner.store.root / "services", directory / "logs"
        self.events = events
        self._steps = steps
        self._running: dict[tuple[Key, Devices], Server] = {}
        self._leases: dict[str, list[Server]] = {}
        self._worker_devices: dict[str, Devices] = {}
        """Devices of a stage that its worker uses, by node."""
        self._orders: dict[str, dict[str, vllm.ServerOrder]] = {}
        """Servers that start in the jobs of workers on other machines, by node."""
        self._stopping: list[tuple[Devices, Server]] = []

    def key(self, placed: PlacedServer, node: Node) -> Key:
        """The key of a server that a stage needs."""
        serving, draft = placed.serving, ""
        if serving.mode == "speculative":
            draft = f"{self._steps[node.inputs['speculator']].digest} {self.planner.proposal(node, serving)}"
        return Key(
            mode=serving.mode,
            dtype=serving.dtype.name,
            draft=draft,
            cores=cores_of(self.planner.placement(node)),
            sizes=(placed.tensor, placed.pipeline, placed.data),
            utilization=placed.utilization,
        )

    def devices_of(self, phase: Phase, node: Node) -> set[int]:
        """Devices of the servers of this phase that are up."""
        keys = {self.key(placed, node) for placed in phase}
        return {device for key, devices in self._running if key in keys for device in devices}

    def idle_devices(self) -> set[int]:
        """Devices with a server that no stage uses at the moment."""
        return {d for (_, devices), server in self._running.items() if not self._in_use(server) for d in devices}

    def occupied(self) -> set[int]:
        """Devices with a server, one that is stopping included."""
        in_use = [*(devices for _, devices in self._running), *(devices for devices, _ in self._stopping)]
        return {device for devices in in_use for device in devices}

    def lease(self, node: Node, phase: Phase, devices: Devices) -> Generator[None, None, dict[str, Server]]:
        """Start or reuse the servers of one phase; return them by the stage's names for them once all are ready.

        Other servers on these devices, and dead ones, are stopped first. For a stage with remote servers nothing starts
        here.

        Raises:
            ServiceError: a server does not start.
            TransientError: a server does not start, but another attempt may succeed.
        """
        if executors.has_remote_servers(self.planner.config, node.kind):
            ordered = [placed for placed in phase if not placed.serving.url]
            self._orders[node.name] = {placed.serving.name: self._order(placed, node) for placed in ordered}
            phase = [placed for placed in phase if placed.serving.url]
            if not phase:
                return {}
        needed = self._assign(node, phase, devices)
        self._leases[node.name] = []
        for entry in list(self._running):
            if set(entry[1]) & set(devices) and (entry not in needed or self._running[entry].poll() == "dead"):
                self._retire(entry)
        while any(set(used) & set(devices) for used, _ in self._stopping):
            yield
        leased = {}
        for entry, placed in needed.items():
            if entry not in self._running:
                self._running[entry] = self._start(placed, node, entry[1])
            leased[placed.serving.name] = self._running[entry]
            self._leases[node.name].append(self._running[entry])
        began = time.monotonic()
        waiting = [server for server in leased.values() if server.state != "ready"]
        while waiting:
            for server in waiting:
                if server.poll() == "dead":
                    raise TransientError(server.failure()) if server.transient else server.failure()
                if server.state == "ready":
                    seconds = time.monotonic() - began
                    self.events.emit("service.ready", service=server.name, mode=server.mode, seconds=seconds)
            waiting = [server for server in waiting if server.state != "ready"]
            yield
        return leased

    def worker_environment(self, node: Node) -> Mapping[str, str]:
        """Environment variables that keep a worker off its servers' devices and cores; call it after `lease`."""
        planner, placement = self.planner, self.planner.placement(node)
        if not placement.devices or not placement.on_this_machine:
            return {}
        split = placement.split
        threads = {"OMP_NUM_THREADS": str(split.training)} if split is not None and split.unit == "cores" else {}
        return {**device_environment(planner.config, planner.machine, self._worker_devices[node.name]), **threads}

    def orders(self, node: Node) -> Mapping[str, vllm.ServerOrder]:
        """Servers that the stage's job has to start on its machine, by its names for them; call it after `lease`."""
        return self._orders.get(node.name, {})

    def release(self, node: Node) -> None:
        """End the stage's lease on its servers."""
        self._leases.pop(node.name, None)

    def keep(self, keys: Collection[Key]) -> None:
        """Stop the servers that are not in use, except live ones with one of these keys."""
        for entry, server in list(self._running.items()):
            if not self._in_use(server) and (entry[0] not in keys or server.poll() == "dead"):
                self._retire(entry)

    def poll(self) -> None:
        """Record the servers that have finished stopping."""
        for entry in list(self._stopping):
            server = entry[1]
            if server.gone():
                self._stopping.remove(entry)
                self.events.emit("service.stopped", service=server.name, mode=server.mode)

    def close(self) -> None:
        """Stop all servers at the same time and wait until they are gone."""
        for entry in list(self._running):
            self._retire(entry)
        while self._stopping:
            self.poll()
            time.sleep(SERVER_STOP_POLL_SECONDS)

    def kill(self) -> None:
        """Kill the processes of all servers at once."""
        for server in [*self._running.values(), *(server for _, server in self._stopping)]:
            server.kill()

    def _assign(self, node: Node, phase: Phase, devices: Devices) -> dict[tuple[Key, Devices], PlacedServer]:
        """Assign a stage's devices to the servers of a phase, which keep those that they run on, and to its worker."""
        placement = self.planner.placement(node)
        numbered: dict[int, int] = {}  # numbers within the placement -> devices
        for placed in phase:
            key = self.key(placed, node)
            running = (used for other, used in self._running if other == key and set(used) <= set(devices))
            used = next((used for used in running if not set(used) & set(numbered.values())), ())
            numbered |= dict(zip(placed.devices, used, strict=False))
        others = (device for device in devices if device not in set(numbered.values()))
        for number in range(placement.devices):
            if number not in numbered and (device := next(others, None)) is not None:
                numbered[number] = device

        def assigned(numbers: Devices) -> Devices:
            return tuple(sorted(numbered[number] for number in numbers if number in numbered))

        self._worker_devices[node.name] = assigned(placement.worker)
        return {(self.key(placed, node), assigned(placed.devices)): placed for placed in phase}

    def _in_use(self, server: Server) -> bool:
        return any(server is used for lease in self._leases.values() for used in lease)

    def _retire(self, entry: tuple[Key, Devices]) -> None:
        server = self._running.pop(entry)
        server.close()
        self._stopping.append((entry[1], server))

    def _start(self, placed: PlacedServer, node: Node, devices: Devices) -> Server:
        planner, mode = self.planner, placed.serving.mode
        if placed.serving.url:
            nonce, log = secrets.token_hex(4), f"vllm-{mode}-{placed.serving.dtype.name}"
            directory = self._directories / nonce
            server = external(planner.config, placed.serving.url, mode, directory, self._logs / f"{log}-{nonce}.log")
            proposal = planner.proposal(node, placed.serving)
            server.spec.num_speculative_tokens = proposal.get("num_speculative_tokens", 0)
        else:
            environment = device_environment(planner.config, planner.machine, devices)
            server = vllm.make_server(self._order(placed, node), environment)
        server.start()
        self.events.emit("service.starting", service=server.name, mode=mode, log=str(server.spec.log))
        return server

    def _order(self, placed: PlacedServer, node: Node) -> vllm.ServerOrder:
        return server_order(self.planner, node, placed, self._steps, self._directories, self._logs)
