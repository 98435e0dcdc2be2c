"""The servers of one run: one for each mode, dtype and draft, started when a stage needs it and shared by stages.

A server is in use while a stage has a lease on it. Afterwards it stays up as long as an upcoming stage needs it and no
other stage needs its devices. A dead server is replaced at the next lease; the stages that used it are retried.

For a stage that runs on another machine nothing starts here: its request contains a `ServerOrder` for each server, and
its job starts them there, for that stage only.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from speculators.config.choices import Connector
from speculators.runner import executors
from speculators.runner.execution import schedule
from speculators.runner.execution.endings import TransientError
from speculators.runner.execution.events import Events
from speculators.runner.execution.schedule import Devices
from speculators.runner.planning import derive
from speculators.runner.planning.graph import TARGET, Node, Serving
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.servers import vllm
from speculators.runner.servers.server import Server, external
from speculators.timeouts import SERVER_STOP_POLL_SECONDS

Key = tuple[str, str, str, int]
"""Mode, dtype, digest of the draft, and number of cores (0: all)."""


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

    def key(self, serving: Serving, node: Node, upcoming: Iterable[Node]) -> Key:
        """The key of the server that a stage needs. `upcoming` are the other stages that may still run."""
        draft = self._steps[node.inputs["speculator"]].digest if serving.mode == "speculative" else ""
        mode = serving.mode
        native = self.planner.config.extract.connector is Connector.native
        if mode == "generate" and native and any(n.mode == "extract" and not self._cores(n) for n in upcoming):
            # One server does both: the native connector exports hidden states only for requests that ask for them.
            mode = "extract"
        return mode, serving.dtype.name, draft, self._cores(node)

    def devices_of(self, keys: Collection[Key]) -> Devices:
        """Devices of the first of these servers that is up; () if none is."""
        return next((devices for key, devices in self._running if key in keys), ())

    def idle_devices(self) -> set[int]:
        """Devices with a server that no stage uses at the moment."""
        return {d for (_, devices), server in self._running.items() if not self._in_use(server) for d in devices}

    def occupied(self) -> set[int]:
        """Devices with a server, one that is stopping included."""
        in_use = [*(devices for _, devices in self._running), *(devices for devices, _ in self._stopping)]
        return {device for devices in in_use for device in devices}

    def lease(
        self, node: Node, servings: Mapping[Key, Serving], devices: Devices
    ) -> Generator[None, None, dict[str, Server]]:
        """Start or reuse the servers of one phase; return them by the stage's names for them once all are ready.

        Other servers on these devices, and dead ones, are stopped first. A stage that streams hidden states while it
        trains shares its devices with the server. For a stage with remote servers nothing starts here.

        Raises:
            ServiceError: a server does not start.
            TransientError: a server does not start, but another attempt may succeed.
        """
        if executors.has_remote_servers(self.planner.config, node.kind):
            self._orders[node.name] = {serving.name: self._order(key, node) for key, serving in servings.items()}
            return {}
        server_devices, self._worker_devices[node.name] = schedule.parts(
            node, self.planner.config, devices, self.devices_of(servings)
        )
        needed = {(key, server_devices) for key in servings}
        self._leases[node.name] = []
        for entry in list(self._running):
            if set(entry[1]) & set(devices) and (entry not in needed or self._running[entry].poll() == "dead"):
                self._retire(entry)
        while any(set(used) & set(devices) for used, _ in self._stopping):
            yield
        leased = {}
        for key, serving in servings.items():
            entry = key, server_devices
            if entry not in self._running:
                self._running[entry] = self._start(key, node, server_devices)
            leased[serving.name] = self._running[entry]
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
        config = self.planner.config
        devices = self._worker_devices.get(node.name, ())
        return {**schedule.device_environment(config, devices), **schedule.threads(node, config)}

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

    def _cores(self, node: Node) -> int:
        divided = schedule.split(node, self.planner.config)
        return divided.server if divided is not None and divided.unit == "cores" else 0

    def _in_use(self, server: Server) -> bool:
        return any(server is used for lease in self._leases.values() for used in lease)

    def _retire(self, entry: tuple[Key, Devices]) -> None:
        server = self._running.pop(entry)
        server.close()
        self._stopping.append((entry[1], server))

    def _start(self, key: Key, node: Node, devices: Devices) -> Server:
        config, (mode, dtype, _, _) = self.planner.config, key
        if config.serve.url:
            nonce = secrets.token_hex(4)
            server = external(config, mode, self._directories / nonce, self._logs / f"vllm-{mode}-{dtype}-{nonce}.log")
        else:
            server = vllm.make_server(self._order(key, node), schedule.device_environment(config, devices))
        server.start()
        self.events.emit("service.starting", service=server.name, mode=mode, log=str(server.spec.log))
        return server

    def _order(self, key: Key, node: Node) -> vllm.ServerOrder:
        config, (mode, dtype, _, cores) = self.planner.config, key
        draft = self._steps[node.inputs["speculator"]].path if mode == "speculative" else None
        target = self._steps[TARGET].path
        assert target is not None, "the target is fetched before a server is started for it"
        if executors.has_remote_servers(config, node.kind):  # another job on that machine may use the configured port
            config = replace(config, serve=replace(config.serve, port=0))
        return vllm.ServerOrder(
            config=config,
            mode=mode,
            dtype=dtype,
            target=str(target.absolute()),
            draft=str(draft / "best") if draft else "",
            capture_layer_ids=self.planner.derived["capture_layer_ids"] if mode == "extract" else None,
            max_model_len=derive.max_model_len(config, self.planner.facts),
            cores=cores,
            directories=str(self._directories),
            logs=str(self._logs),
        )
