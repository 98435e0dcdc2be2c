"""The servers of one run: one a (mode, dtype, draft) on its devices, started when a stage needs it and shared.

What a stage needs that runs on another machine is only ordered here: it is started there, for that stage alone.

A server is in use while a stage holds a lease on it. Afterwards it stays up as long as a later stage wants it and no
other stage needs its devices. One that died is replaced when it is next asked for; whoever used it tries again.
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
from speculators.runner.execution.endings import PassingError
from speculators.runner.execution.events import Events
from speculators.runner.execution.schedule import Devices
from speculators.runner.planning import derive
from speculators.runner.planning.graph import TARGET, Node, Serving
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.servers import vllm
from speculators.runner.servers.server import STOP_SECONDS, Service, external

Key = tuple[str, str, str, int]
"""Mode, dtype, digest of the draft, and the cores that it keeps to; 0: all."""


class Services:
    """Servers by what they are and where they run. Whoever makes one calls `poll` now and then, and `close`."""

    def __init__(self, planner: Planner, steps: Mapping[str, Step], directory: Path, events: Events) -> None:
        self.planner = planner
        self._homes, self._logs = planner.store.root / "services", directory / "logs"
        self.events = events
        self._steps = steps
        self._up: dict[tuple[Key, Devices], Service] = {}
        self._leases: dict[str, list[Service]] = {}
        self._left: dict[str, Devices] = {}
        """Devices that a stage's servers leave to its worker."""
        self._orders: dict[str, dict[str, vllm.Order]] = {}
        """What is started beside workers on other machines."""
        self._leaving: list[tuple[Devices, Service]] = []

    def key(self, serving: Serving, node: Node, to_come: Iterable[Node]) -> Key:
        """Which server this is. `to_come`: other stages that may still have to run."""
        draft = self._steps[node.inputs["speculator"]].digest if serving.mode == "speculative" else ""
        mode = serving.mode
        ours = self.planner.config.extract.connector is Connector.native
        if mode == "generate" and ours and any(n.mode == "extract" and not self._cores(n) for n in to_come):
            # One server does both: with our connector it keeps hidden states only for requests that ask for them.
            mode = "extract"
        return mode, serving.dtype.name, draft, self._cores(node)

    def devices_of(self, keys: Collection[Key]) -> Devices:
        """Where one of these servers is up; nowhere if none is."""
        return next((devices for key, devices in self._up if key in keys), ())

    def idle_devices(self) -> set[int]:
        """Devices with a server that nobody uses at the moment."""
        return {d for (_, devices), server in self._up.items() if not self._in_use(server) for d in devices}

    def occupied(self) -> set[int]:
        """Devices with a server, or with one that is not gone yet."""
        places = [*(devices for _, devices in self._up), *(devices for devices, _ in self._leaving)]
        return {device for devices in places for device in devices}

    def lease(
        self, node: Node, servings: Mapping[Key, Serving], devices: Devices
    ) -> Generator[None, None, dict[str, Service]]:
        """The servers of one phase by the stage's names for them, once they are ready.

        What else is up on these devices, and what died, is given back before anything starts. Of the devices of a stage
        that draws from its server, the server gets a part. Where a stage is served on another machine nothing starts.

        Raises:
            ServiceError: one does not start.
            PassingError: the same, but it may the next time.
        """
        if executors.served_there(self.planner.config, node.kind):
            self._orders[node.name] = {serving.name: self._order(key, node) for key, serving in servings.items()}
            return {}
        served, self._left[node.name] = schedule.parts(node, self.planner.config, devices, self.devices_of(servings))
        wanted = {(key, served) for key in servings}
        self._leases[node.name] = []
        for place in list(self._up):
            if set(place[1]) & set(devices) and (place not in wanted or self._up[place].poll() == "dead"):
                self._retire(place)
        while any(set(used) & set(devices) for used, _ in self._leaving):
            yield
        leased = {}
        for key, serving in servings.items():
            place = key, served
            if place not in self._up:
                self._up[place] = self._start(key, node, served)
            leased[serving.name] = self._up[place]
            self._leases[node.name].append(self._up[place])
        began = time.monotonic()
        waiting = [server for server in leased.values() if server.state != "ready"]
        while waiting:
            for server in waiting:
                if server.poll() == "dead":
                    raise PassingError(server.failure()) if server.passing else server.failure()
                if server.state == "ready":
                    seconds = time.monotonic() - began
                    self.events.emit("service.ready", service=server.name, mode=server.mode, seconds=seconds)
            waiting = [server for server in waiting if server.state != "ready"]
            yield
        return leased

    def worker_environment(self, node: Node) -> Mapping[str, str]:
        """Variables that keep the stage's worker to what its servers leave it; after `lease`."""
        config = self.planner.config
        left = self._left.get(node.name, ())
        return {**schedule.environment(config, left), **schedule.threads(node, config)}

    def orders(self, node: Node) -> Mapping[str, vllm.Order]:
        """Servers that are to be started beside the stage's worker, by the stage's names for them; after `lease`."""
        return self._orders.get(node.name, {})

    def release(self, node: Node) -> None:
        """The stage uses its servers no more."""
        self._leases.pop(node.name, None)

    def keep(self, keys: Collection[Key]) -> None:
        """Stop what is not in use, unless it is one of these and lives."""
        for place, server in list(self._up.items()):
            if not self._in_use(server) and (place[0] not in keys or server.poll() == "dead"):
                self._retire(place)

    def poll(self) -> None:
        """See what has stopped."""
        for entry in list(self._leaving):
            server = entry[1]
            if server.gone():
                self._leaving.remove(entry)
                self.events.emit("service.stopped", service=server.name, mode=server.mode)

    def close(self) -> None:
        """Stop all of them at the same time, and wait until nothing is left."""
        for place in list(self._up):
            self._retire(place)
        while self._leaving:
            self.poll()
            time.sleep(STOP_SECONDS)

    def kill(self) -> None:
        """End all their processes now."""
        for server in [*self._up.values(), *(server for _, server in self._leaving)]:
            server.kill()

    def _cores(self, node: Node) -> int:
        divided = schedule.split(node, self.planner.config)
        return divided.server if divided is not None and divided.unit == "cores" else 0

    def _in_use(self, server: Service) -> bool:
        return any(server is used for lease in self._leases.values() for used in lease)

    def _retire(self, place: tuple[Key, Devices]) -> None:
        server = self._up.pop(place)
        server.close()
        self._leaving.append((place[1], server))

    def _start(self, key: Key, node: Node, devices: Devices) -> Service:
        config, (mode, dtype, _, _) = self.planner.config, key
        if config.serve.url:
            nonce = secrets.token_hex(4)
            service = external(config, mode, self._homes / nonce, self._logs / f"vllm-{mode}-{dtype}-{nonce}.log")
        else:
            service = vllm.server(self._order(key, node), schedule.environment(config, devices))
        service.start()
        self.events.emit("service.starting", service=service.name, mode=mode, log=str(service.spec.log))
        return service

    def _order(self, key: Key, node: Node) -> vllm.Order:
        config, (mode, dtype, _, cores) = self.planner.config, key
        draft = self._steps[node.inputs["speculator"]].path if mode == "speculative" else None
        target = self._steps[TARGET].path
        assert target is not None, "the target is fetched before a server is started for it"
        if executors.served_there(config, node.kind):  # where another job may have the port that is given
            config = replace(config, serve=replace(config.serve, port=0))
        return vllm.Order(
            config=config,
            mode=mode,
            dtype=dtype,
            target=str(target.absolute()),
            draft=str(draft / "best") if draft else "",
            capture_layer_ids=self.planner.derived["capture_layer_ids"] if mode == "extract" else None,
            max_model_len=derive.max_model_len(config, self.planner.facts),
            cores=cores,
            homes=str(self._homes),
            logs=str(self._logs),
        )
