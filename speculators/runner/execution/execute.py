"""Carry out a plan: every stage as soon as its inputs and a place for it are there, servers for those that need them.

Each stage is one or more workers (`python -m speculators.worker request.json`), one a phase. A worker does its
own locking and publishing; this module only starts it, watches it and its servers, and says what happened.
Killed at any point, the same command goes on: artifacts that exist are hits, the rest resumes in its work
directory.

Stages run beside each other without threads: what is done about one is a generator that yields whenever it has to
wait, and `Execution.run` goes round them. When a stage fails, nothing is started any more, but what runs beside it
runs to its end: its time is spent, and its artifact is kept. Who cannot wait interrupts.
"""

from __future__ import annotations

import contextlib
import graphlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speculators.config.fields import select, to_builtins
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError, RunError, ServiceError, SourceError, StageError, StoreError
from speculators.job import Request
from speculators.runner.execution import endings, schedule
from speculators.runner.execution.endings import PassingError
from speculators.runner.execution.events import Events, now
from speculators.runner.execution.schedule import Devices, Need
from speculators.runner.execution.signals import Interrupted, Signals
from speculators.runner.executors import Handle, executor_of, served_there
from speculators.runner.planning import estimate, graph
from speculators.runner.planning.graph import TARGET, Node
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.servers.pool import Key, Services
from speculators.runner.servers.server import DEATH_SECONDS, Service, lost, reap_left_overs
from speculators.runner.store import upkeep

POLL, SHORTEST_POLL = 0.05, 0.002
"""Seconds between two looks at the workers: the longer nothing happens the fewer, within these bounds."""
GRACE = 30.0
"""Seconds that a worker has to write a checkpoint when it is asked to stop."""
_KINDS = {
    kind.__name__: kind for kind in (RecipeError, SourceError, StoreError, ServiceError, StageError, ContractError)
}

Waiting = Generator[None, None, None]
"""Work on one stage; it yields while there is nothing to do but wait."""


@dataclass(kw_only=True)
class Execution:
    """One run of one recipe."""

    planner: Planner
    directory: Path
    """The run directory: requests, logs, events."""
    events: Events
    words: list[str]
    """The command line, for provenance."""
    steps: dict[str, Step] = field(default_factory=dict)
    """What has been decided and made so far, by node."""
    _tasks: dict[str, Waiting] = field(default_factory=dict)
    _workers: dict[str, Handle] = field(default_factory=dict)
    _eager: set[str] = field(default_factory=set)
    """Stages that wait for a device and whose server is up: they go first, or it would be started twice."""
    _room_was_asked: bool = False

    def __post_init__(self) -> None:
        self.room = schedule.room(self.config, self.planner.store.root / "locks", self.events)
        self.services = Services(self.planner, self.steps, self.directory, self.events)
        self._disk = estimate.DiskWatch(self.planner.store, self.config.run.quota_gib)

    @property
    def config(self) -> Config:
        return self.planner.config

    @property
    def name(self) -> str:
        """The run's name: its directory's."""
        return self.directory.name

    def run(self) -> dict[str, Step]:
        """Make everything that is not there.

        Raises:
            RunError: of the first stage that failed; what was finished stays, what follows is not started.
            Interrupted: after workers were asked to stop and servers are down.
        """
        reap_left_overs(self.planner.store.root / "services" / self.name)
        with Signals(self._kill) as signals:
            try:
                self._loop(signals)
            except Interrupted:
                self.events.emit("run.stopping", seconds=GRACE)
                raise
            finally:
                self._stop_workers()
                self.services.close()
                self.room.close()
                for name in [name for name in self.planner.graph if name in self.steps]:
                    step = self.steps.pop(name)
                    if step.node.part is None or step.artifact is not None:
                        self.steps[name] = step  # in data-flow order, not as they ended
        return self.steps

    def _loop(self, signals: Signals) -> None:
        nodes = self.planner.graph
        order = {name: place for place, name in enumerate(nodes)}
        sorter = graphlib.TopologicalSorter({name: node.needs for name, node in nodes.items()})
        sorter.prepare()
        failure: RunError | None = None
        pause = SHORTEST_POLL
        while True:
            signals.check()
            ready = sorter.get_ready() if failure is None else ()
            ended = [name for name in ready if self._take_up(nodes[name])]
            for name in sorted(self._tasks, key=lambda name: (name not in self._eager, order[name])):
                try:
                    if name in self._tasks and self._advance(name) and not nodes[name].lazy:
                        ended.append(name)
                except RunError as error:
                    failure = failure or error
                    self._drop_waiting()
            sorter.done(*ended)
            self.services.poll()
            if not self._tasks and not ended:
                break
            pause = SHORTEST_POLL if ended else min(POLL, pause * 1.1)
            if not ended:
                signals.wait(pause)
        if failure is not None:
            raise failure

    def _take_up(self, node: Node) -> bool:
        """Begin with a node whose inputs are there. True: that is all, a source is fetched when somebody wants it."""
        if not node.lazy:
            self._tasks[node.name] = self._ensure(node)
            return False
        step = self._step(node)
        self._done(step)
        if step.path is None and node.name in (self.config.only, self.config.until):
            self._tasks[node.name] = self._fetch(step)
        return True

    def _advance(self, name: str) -> bool:
        """Go on with one node until it has to wait; whether it has come to its end."""
        try:
            next(self._tasks[name])
        except StopIteration:
            del self._tasks[name]
            return True
        except RunError:
            del self._tasks[name]
            raise
        return False

    def _drop_waiting(self) -> None:
        """Forget what has not started."""
        for name in [name for name in self._tasks if not self.room.holds(name)]:
            self._tasks.pop(name).close()

    def _done(self, step: Step) -> None:
        if step.artifact is not None:
            self.planner.store.touch(step.artifact)
            self._tidy(step.node.kind, step.key)
        self.steps[step.node.name] = step

    def _tidy(self, stage: str, key: str) -> None:
        """An attempt may have been killed after it had published and before its work was removed."""
        store = self.planner.store
        if store.work(stage, key).exists():
            with contextlib.suppress(StoreError), store.claimed_at_once(stage, key) as ours:
                if ours:
                    store.discard_work(stage, key)

    # One node, from the decision to the artifact.

    def _ensure(self, node: Node) -> Waiting:
        step = self._step(node)
        if step.state is State.waits:
            # Only the target's own config.json can be missing here: everything else is made in data-flow order.
            yield from self._fetched([TARGET])
            self.planner.learn_target()
            step = self._step(node)
        self._decided(step)
        if step.state is State.run:
            if self.config.only not in ("", node.name):
                hint = f"make it first: until={node.name}"
                raise RecipeError(f"only={self.config.only} needs `{node.name}`, which is not there", hint)
            yield from self._fetched(node.needs)
            step = yield from self._made(step)
        self._drop_parts(node)
        self._done(step)

    def _fetched(self, names: Iterable[str]) -> Waiting:
        """Fetch or make those among these that are made when they are wanted; anything else is left alone."""
        missing = [name for name in names if self.steps[name].node.lazy and self.steps[name].path is None]
        for name in missing:
            if name not in self._tasks:
                self._tasks[name] = self._fetch(self.steps[name])
        while any(self.steps[name].path is None for name in missing):
            yield

    def _fetch(self, step: Step) -> Waiting:
        yield from self._fetched(step.node.inputs.values())
        if step.state is State.waits:  # a part that was taken up before the target was here
            self.planner.learn_target()
        step = self._step(step.node)
        self._decided(step)
        self._done((yield from self._made(step)))

    def _drop_parts(self, node: Node) -> None:
        """What a stage was joined from is in it now."""
        for step in [self.steps[name] for name in node.parts]:
            if step.artifact is not None:
                upkeep.discard(self.planner.store, step.artifact)
            self.steps[step.node.name] = replace(step, artifact=None)

    def _step(self, node: Node) -> Step:
        known = [name for name in node.inputs.values() if name in self.steps]
        return self.planner.step(node.name, {name: self.steps[name].digest for name in known})

    def _decided(self, step: Step) -> None:
        self.events.emit("stage.decided", node=step.node.name, state=step.state.name, reason=step.reason, key=step.key)

    def _made(self, step: Step) -> Generator[None, None, Step]:
        """Run a stage's workers as soon as there is room, and take the artifact that the last one published."""
        node = step.node
        shares = node.mode and not served_there(self.config, node.kind)
        servers = self._servers_of(node, self._to_come(node) if shares else [])
        need = schedule.need(node, self.config, self.steps[TARGET].path if TARGET in self.steps else None)
        while (devices := self._take_room(node, need, servers)) is None:
            yield
        began = time.monotonic()
        try:
            found = self._step(node)
            if found.state is State.cached:  # somebody made it while this waited
                self._decided(found)
                return found
            self._ask_for_disk(node)
            yield from self._attempts(step, servers, devices)
            artifact = self.planner.store.find(node.kind, step.key)
            if artifact is None:
                raise StageError(f"{node.name}: its worker left no artifact", f"look at {self._log(node)}")
        except RunError as failure:
            self.events.emit("stage.failed", node=node.name, message=failure.message)
            raise self._with_its_log(node, failure) from None
        finally:
            self.services.release(node)
            self.room.give_back(node.name, self.services.occupied())
        self.planner.forced.discard(node.name)
        seconds = time.monotonic() - began
        self.events.emit("stage.finished", node=node.name, seconds=seconds, record=artifact.record, key=step.key)
        self._give_back_servers(node)
        return self._step(node)

    def _take_room(self, node: Node, need: Need, servers: list[dict[Key, graph.Serving]]) -> Devices | None:
        """The devices of its server if that is up; else rather those that nobody's server is kept on."""
        prefer = self.services.devices_of(servers[0])
        if prefer:
            self._eager.add(node.name)
        return self.room.take(node.name, need, prefer=prefer, avoid=self.services.idle_devices())

    def _servers_of(self, node: Node, to_come: Iterable[Node]) -> list[dict[Key, graph.Serving]]:
        """What the stage needs served, phase by phase."""
        plan = graph.phases(node, self.config)
        return [{self.services.key(serving, node, to_come): serving for serving in phase} for phase in plan]

    def _to_come(self, node: Node) -> list[Node]:
        """Other nodes that ask for the pipeline's server, on this machine, and may still have to run."""
        begun = [n for n in self.planner.graph.values() if n.name not in self.steps or n.name in self._tasks]
        asking = [n for n in begun if n.mode and n is not node and not served_there(self.config, n.kind)]
        return [n for n in asking if self._step(n).state in (State.run, State.waits)]

    def _give_back_servers(self, node: Node) -> None:
        """Keep only those that another stage may still need and that do not depend on what is still to be made."""
        if self.services.idle_devices():
            to_come = self._to_come(node)
            wanted = [key for other in to_come for phase in self._servers_of(other, to_come) for key in phase]
            self.services.keep(wanted)

    def _ask_for_disk(self, node: Node) -> None:
        """Again where states are stored: an upper bound is counted by then, and others fill the disk too.

        With a quota, again before each stage, which is after the one before.
        """
        quota = self.config.run.quota_gib
        if quota or not self._room_was_asked or "features" in node.spec.gives or node.keeps_states:
            self._room_was_asked = True
            open_steps = {s.node.name: s for s in self.planner.plan()}
            estimate.refuse_if_too_large(estimate.estimate(self.planner, open_steps))

    # Attempts at one stage.

    def _attempts(self, step: Step, servers: list[dict[Key, graph.Serving]], devices: Devices) -> Waiting:
        node = step.node
        limits = schedule.limits(self.config, node.name)
        for attempt in itertools.count(1):
            try:
                for index, wanted in enumerate(servers):
                    if not self._phase_done(step, index):
                        leased = yield from self.services.lease(node, wanted, devices)
                        yield from self._work(step, (index, len(servers)), attempt, leased)
                return
            except PassingError as passing:
                if attempt > limits.retries:
                    raise passing.failure from None
                message, seconds = passing.failure.message.splitlines()[0], limits.retry_wait * 2 ** (attempt - 1)
            self.services.release(node)
            self.events.emit("stage.retried", node=node.name, attempt=attempt, message=message, seconds=seconds)
            yield from _pause(seconds)

    def _phase_done(self, step: Step, index: int) -> bool:
        return (self.planner.store.work(step.node.kind, step.key) / "scratch" / f"phase-{index}.done").exists()

    def _work(self, step: Step, phase: tuple[int, int], attempt: int, servers: Mapping[str, Service]) -> Waiting:
        """One worker from its start to its end."""
        node, log = step.node, self._log(step.node)
        request = self._request(step, *phase, attempt, servers)
        env = {k: v for server in servers.values() for k, v in server.worker_env().items()}
        with log.open("a") as file:
            opened = f"{node.name}: attempt {attempt}, phase {phase[0] + 1} of {phase[1]}, {now()}"
            file.write(f"{endings.ATTEMPT}{opened}\n")
        env.update(self.services.worker_environment(node))
        handle = executor_of(self.config, node.kind).submit(request, log, env)
        self._workers[node.name] = handle
        self.events.emit(
            "stage.started", node=node.name, log=str(log), phase=phase[0], phases=phase[1], attempt=attempt
        )
        try:
            code = yield from self._watched(step, handle, servers)
        finally:
            if handle.poll() is not None:
                del self._workers[node.name]
        if code == 0:
            return
        failure, passing = self._failure(step, code)
        if servers and isinstance(failure, ServiceError):
            yield from _pause(DEATH_SECONDS, unless=lambda: lost(servers.values()) is not None)
        if (server := lost(servers.values())) is not None:
            raise PassingError(server.failure())
        raise PassingError(failure) if passing else failure

    def _watched(self, step: Step, handle: Handle, servers: Mapping[str, Service]) -> Generator[None, None, int]:
        """Tell of its progress until it ends; end it when a server is lost or its time is over."""
        progress = self.planner.store.work(step.node.kind, step.key) / "progress.json"
        limit = schedule.limits(self.config, step.node.name).time_limit
        began, seen = time.monotonic(), 0
        while (code := handle.poll()) is None:
            server = lost(servers.values())
            if server is not None or 0 < limit < time.monotonic() - began:
                yield from _ended(handle)
                raise PassingError(server.failure() if server is not None else self._too_long(step.node, limit))
            try:
                self._disk.check()
            except StoreError:
                yield from _ended(handle)
                raise
            try:
                if (stamp := progress.stat().st_mtime_ns) != seen:
                    seen = stamp
                    self.events.emit("stage.progress", node=step.node.name, **json.loads(progress.read_text()))
            except FileNotFoundError:
                pass
            yield
        return code

    def _request(self, step: Step, index: int, count: int, attempt: int, servers: Mapping[str, Service]) -> Path:
        node = step.node
        path = self.directory / "requests" / f"{node.name}-{index}.json"
        path.parent.mkdir(exist_ok=True)
        Request(
            node=node.name,
            stage=node.kind,
            key=step.key,
            config=select(self.config, node.reads),
            derived={**step.derived, "phase": index, "phases": count},
            inputs={slot: str(self.steps[upstream].path) for slot, upstream in self._slots(node).items()},
            digests={slot: self.steps[upstream].digest for slot, upstream in node.inputs.items()},
            services={name: server.plain() for name, server in servers.items()},
            orders=to_builtins(self.services.orders(node)),
            work=str(self.planner.store.work(node.kind, step.key)),
            store=str(self.planner.store.root),
            preimage=step.preimage,
            digest=step.digest or None,
            forced=node.name in self.planner.forced,
            provenance={
                "run": self.name,
                "recipe": self.config.recipe,
                "words": self.words,
                "attempt": attempt,
                "inputs": {slot: self.steps[upstream].key for slot, upstream in node.inputs.items()},
            },
            phase=index,
            phases=count,
        ).write(path)
        return path

    @staticmethod
    def _slots(node: Node) -> dict[str, str]:
        """What the worker gets to read; parts by names that sort as they are numbered."""
        return {**node.inputs, **{f"part.{number:05d}": part for number, part in enumerate(node.parts)}}

    def _failure(self, step: Step, code: int) -> tuple[RunError, bool]:
        """What the worker said about itself, or how it died; and whether that may pass."""
        name = step.node.name
        said = self.planner.store.work(step.node.kind, step.key) / "failure.json"
        if code == 1 and said.exists():
            plain = json.loads(said.read_text())
            failure = _KINDS.get(plain["kind"], StageError)(f"{name}: {plain['message']}", plain["hint"])
            return failure, plain.get("passing", False)
        hint = "what it finished is kept: the next attempt goes on there"
        return StageError(f"{name} {endings.in_words(code)}", hint), endings.signal_of(code) is not None

    def _too_long(self, node: Node, limit: float) -> StageError:
        hint = "what it finished is kept; give it more time: run.time_limit=SECONDS"
        return StageError(f"{node.name} was stopped after {limit:g} s, its run.time_limit", hint)

    def _with_its_log(self, node: Node, failure: RunError) -> RunError:
        """The same, with the end of the stage's log, where that is, and the command that runs only this stage again."""
        log, again = self._log(node), endings.again(self.words, node.name)
        lines = endings.tail_before(log, failure.message.removeprefix(f"{node.name}: "))
        message = "\n\n".join([failure.message, "\n".join(lines)] if lines else [failure.message])
        return type(failure)(message, endings.where_to_look(failure.hint, log, again))

    def _log(self, node: Node) -> Path:
        return self.directory / "logs" / f"{node.name}.log"

    # The end, in order and at once.

    def _stop_workers(self) -> None:
        """Ask all of them to stop, give them time to write their checkpoints, and kill what is left."""
        for handle in self._workers.values():
            handle.terminate()
        deadline = time.monotonic() + GRACE
        while any(handle.poll() is None for handle in self._workers.values()):
            if time.monotonic() > deadline:
                self._kill_workers()
            time.sleep(SHORTEST_POLL)

    def _kill_workers(self) -> None:
        for handle in self._workers.values():
            if handle.poll() is None:
                handle.kill()

    def _kill(self) -> None:
        self._kill_workers()
        self.services.kill()


def _ended(handle: Handle) -> Waiting:
    """SIGTERM, time to write a checkpoint, SIGKILL."""
    handle.terminate()
    yield from _pause(GRACE, unless=lambda: handle.poll() is not None)
    if handle.poll() is None:
        handle.kill()
    while handle.poll() is None:
        yield


def _pause(seconds: float, unless: Callable[[], bool] = lambda: False) -> Waiting:
    """Wait so long, or until it is so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not unless():
        yield


def as_json(steps: Mapping[str, Step]) -> dict[str, Any]:
    """The steps of a run as plain values, for `run.json` and `--json`."""
    return {
        name: {"stage": s.node.kind, "state": s.state.name, "reason": s.reason, "key": s.key, "digest": s.digest,
               "inputs": dict(s.node.inputs), "path": str(s.path) if s.path else None}
        for name, s in steps.items()
    }  # fmt: skip


def resolved(config: Config) -> dict[str, Any]:
    """The whole recipe as plain values, for `config.json`."""
    plain: dict[str, Any] = to_builtins(config)
    return plain
