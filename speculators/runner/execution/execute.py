"""Executes a plan: runs every stage whose artifact is missing, in the order of the graph, with the servers it needs.

A stage runs as one or more worker processes (`python -m speculators.worker request.json`), one for each phase: a set
of servers that it needs at one time (only `evaluate` has two). The worker resumes, computes and publishes the
artifact; this module starts it, watches it and its servers, retries it, and records events. A lazy node runs only
when another stage needs it: a fetched model or dataset, or a part of a stage that several workers compute. A killed
run continues when the same command runs again: artifacts are cache hits, an unfinished stage resumes where it was.

Stages run concurrently without threads. The work on one stage is a generator that yields whenever it has to wait:
`Execution.run` calls `_loop`, which resumes all generators in turn, and `_ensure` is the life of one stage:

    _ensure    cached? done. Otherwise run its lazy inputs (`_fetch`, which calls `_build` too), then:
    _build     wait for devices and memory, run the attempts, return the published artifact
    _attempts  lease servers and run one worker for each phase, with retries
    _work      start one worker and watch it until it exits

When a stage fails, no further stage starts; those that run finish and publish their artifacts. A signal stops all.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from speculators.config.fields import select, to_builtins
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError, RunError, ServiceError, SourceError, StageError, StoreError
from speculators.job import Request, file_name, phase_marker
from speculators.runner.execution import endings, schedule
from speculators.runner.execution.endings import TransientError
from speculators.runner.execution.events import Events, now
from speculators.runner.execution.placement import Devices, PlacedServer, Placement
from speculators.runner.execution.signals import Interrupted, Signals
from speculators.runner.executors import Handle, executor_of, has_remote_servers, is_remote
from speculators.runner.planning import estimate
from speculators.runner.planning.graph import DRAFT, TARGET, Node, missing_for_only
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.planning.serving import check_placements
from speculators.runner.servers.pool import ServerPool
from speculators.runner.servers.server import Server, find_dead, reap_left_overs
from speculators.runner.store import upkeep
from speculators.timeouts import MAX_POLL_SECONDS, MIN_POLL_SECONDS, SERVER_DEATH_SECONDS, WORKER_GRACE_SECONDS

_ERROR_CLASSES = {
    kind.__name__: kind for kind in (RecipeError, SourceError, StoreError, ServiceError, StageError, ContractError)
}

Waiting = Generator[None, None, None]
"""Work on one stage; it yields whenever it has to wait."""


@dataclass(kw_only=True)
class Execution:
    """One run of one recipe."""

    planner: Planner
    directory: Path
    """The run directory: requests, logs, events."""
    events: Events
    argv: list[str]
    """The command line, for provenance and for the command that tries again."""
    steps: dict[str, Step] = field(default_factory=dict)
    """The steps decided so far, by node: cached, or run and published; lazy nodes also before they run."""
    _tasks: dict[str, Waiting] = field(default_factory=dict)
    _workers: dict[str, Handle] = field(default_factory=dict)
    _eager: set[str] = field(default_factory=set)
    """Stages that wait for a device on which their server runs: they go first, or it would be started twice."""
    _began: dict[str, str] = field(default_factory=dict)
    """When each stage got its devices, for its provenance: before its servers and its worker started."""
    _disk_estimated: bool = False
    _placed_for: tuple[Path | None, ...] = ()
    """The target's checkpoint, None before it is fetched, for which stages have been placed."""

    def __post_init__(self) -> None:
        self.servers = ServerPool(self.planner, self.steps, self.directory, self.events)
        self._disk = estimate.DiskWatch(self.planner.store, self.config.run.quota_gib)

    @property
    def config(self) -> Config:
        return self.planner.config

    @functools.cached_property
    def resources(self) -> schedule.ResourcePool:
        """The machine's devices, which are looked for when the first stage runs."""
        locks = self.planner.store.root / "locks"
        return schedule.resource_pool(self.config, self.planner.machine, locks, self.events)

    @property
    def name(self) -> str:
        """The run's name, which is that of its directory."""
        return self.directory.name

    def run(self) -> dict[str, Step]:
        """Run every stage whose artifact is missing; return all steps but discarded parts, in data-flow order.

        Raises:
            RunError: a stage failed; the error of the first that did.
            Interrupted: a signal arrived; all workers and servers have ended.
        """
        reap_left_overs(self.planner.store.root / "services" / self.name)
        with Signals(self._kill) as signals:
            try:
                self._loop(signals)
            except Interrupted:
                self.events.emit("run.stopping", seconds=WORKER_GRACE_SECONDS)
                raise
            finally:
                self._stop_workers()
                self.servers.close()
                if self._placed_for:
                    self.resources.close()
                for name in [name for name in self.planner.graph if name in self.steps]:
                    step = self.steps.pop(name)
                    if step.node.part is None or step.artifact is not None:
                        self.steps[name] = step  # in data-flow order, not in the order in which they ended
        return self.steps

    def _loop(self, signals: Signals) -> None:
        nodes = self.planner.graph
        order = {name: index for index, name in enumerate(nodes)}
        sorter = graphlib.TopologicalSorter({name: node.needs for name, node in nodes.items()})
        sorter.prepare()
        failure: RunError | None = None
        pause = MIN_POLL_SECONDS
        while True:
            signals.check()
            ready = sorter.get_ready() if failure is None else ()
            ended = [name for name in ready if self._begin(nodes[name])]  # lazy nodes among them
            for name in sorted(self._tasks, key=lambda name: (name not in self._eager, order[name])):
                try:
                    if name in self._tasks and self._advance(name) and not nodes[name].lazy:
                        ended.append(name)
                except RunError as error:
                    failure = failure or error
                    self._drop_pending()
            sorter.done(*ended)
            self.servers.poll()
            if not self._tasks and not ended:
                break
            pause = MIN_POLL_SECONDS if ended else min(MAX_POLL_SECONDS, pause * 1.1)
            if not ended:
                signals.wait(pause)
        if failure is not None:
            raise failure

    def _begin(self, node: Node) -> bool:
        """Start a node whose predecessors are done. True for a lazy node, which counts as done before it runs."""
        if not node.lazy:
            self._tasks[node.name] = self._ensure(node)
            return False
        step = self._step(node)
        self._done(step)
        if step.path is None and node.name in (self.config.only, self.config.until):
            self._tasks[node.name] = self._fetch(step)
        return True

    def _advance(self, name: str) -> bool:
        """Resume the work on one node until it has to wait; return whether it has ended."""
        try:
            next(self._tasks[name])
        except StopIteration:
            del self._tasks[name]
            return True
        except RunError:
            del self._tasks[name]
            raise
        return False

    def _drop_pending(self) -> None:
        """Drop the stages that have not started."""
        for name in [name for name in self._tasks if not self.resources.is_running(name)]:
            self._tasks.pop(name).close()

    def _done(self, step: Step) -> None:
        if step.artifact is not None:
            self.planner.store.touch(step.artifact)
            self._discard_stale_work(step.node.kind, step.key)
        self.steps[step.node.name] = step

    def _discard_stale_work(self, stage: str, key: str) -> None:
        """Remove the work directory of an attempt that was killed between publishing and removing it."""
        store = self.planner.store
        if store.work(stage, key).exists():
            with contextlib.suppress(StoreError), store.claimed_at_once(stage, key) as claimed:
                if claimed:
                    store.discard_work(stage, key)

    # One node, from the decision to the artifact.

    def _ensure(self, node: Node) -> Waiting:
        """Reuse the node's artifact, or run the stage, lazy inputs first."""
        step = self._step(node)
        if step.state is State.waits:
            # The key is unknown until the config.json of target and draft are fetched: derived values come from there.
            yield from self._fetched([name for name in (TARGET, DRAFT) if name in node.inputs.values()])
            self.planner.learn_checkpoints()
            step = self._step(node)
        self._decided(step)
        if step.state is State.run:
            if self.config.only not in ("", node.name):
                raise missing_for_only(self.config.only, node.name)
            yield from self._fetched(node.needs)
            if (step := self._step(node)).state is State.run:  # the target's files may have changed what is derived
                step = yield from self._build(step)
        self._drop_parts(node)
        self._done(step)

    def _fetched(self, names: Iterable[str]) -> Waiting:
        """Run the lazy nodes among these whose artifact is missing; skip all others."""
        missing = [name for name in names if self.steps[name].node.lazy and self.steps[name].path is None]
        for name in missing:
            if name not in self._tasks:
                self._tasks[name] = self._fetch(self.steps[name])
        while any(self.steps[name].path is None for name in missing):
            yield

    def _fetch(self, step: Step) -> Waiting:
        yield from self._fetched(step.node.inputs.values())
        if step.state is State.waits:  # a part of a stage that began before the target was fetched
            self.planner.learn_checkpoints()
        step = self._step(step.node)
        self._decided(step)
        self._done((yield from self._build(step)))
        if step.node.name == TARGET:  # checks its files before anything is computed with it
            self.planner.learn_checkpoints()

    def _drop_parts(self, node: Node) -> None:
        """Discard the artifacts of a stage's parts: the stage has joined them."""
        for step in [self.steps[name] for name in node.parts]:
            if step.artifact is not None:
                upkeep.discard(self.planner.store, step.artifact)
            self.steps[step.node.name] = replace(step, artifact=None)

    def _step(self, node: Node) -> Step:
        known = [name for name in node.inputs.values() if name in self.steps]
        return self.planner.step(node.name, {name: self.steps[name].digest for name in known})

    def _decided(self, step: Step) -> None:
        self.events.emit("stage.decided", node=step.node.name, state=step.state.name, reason=step.reason, key=step.key)

    def _build(self, step: Step) -> Generator[None, None, Step]:
        """Run a stage's workers once its resources are free; return the step with the published artifact."""
        node = step.node
        target = self.steps[TARGET].path if TARGET in self.steps else None
        if self._placed_for != (target,):
            self._placed_for = (target,)
            check_placements(self.planner)
        placement = self.planner.placement(node)
        while (devices := self._acquire(node, placement)) is None:
            yield
        began, self._began[node.name] = time.monotonic(), now()
        try:
            current = self._step(node)
            if current.state is State.cached:  # another run published it in the meantime
                self._decided(current)
                return current
            self._check_disk(node)
            for reused in step.reuse.artifacts:
                self.planner.store.touch(reused)
            yield from self._attempts(step, placement, devices)
            artifact = self.planner.store.find(node.kind, step.key)
            if artifact is None:
                raise StageError(f"{node.name}: its worker published no artifact", f"see {self._log(node)}")
        except RunError as failure:
            self.events.emit("stage.failed", node=node.name, message=failure.message)
            raise self._with_log(node, failure) from None
        finally:
            self.servers.release(node)
            self.resources.release(node.name, self.servers.occupied())
        self.planner.forced.discard(node.name)
        seconds = time.monotonic() - began
        self.events.emit("stage.finished", node=node.name, seconds=seconds, record=artifact.record, key=step.key)
        self._stop_unneeded_servers(node)
        return self._step(node)

    def _acquire(self, node: Node, placement: Placement) -> Devices | None:
        """Acquire a stage's resources; devices with its server come first, those with another idle server last."""
        prefer = self.servers.devices_of(placement.phases[0], node)
        if prefer:
            self._eager.add(node.name)
        return self.resources.acquire(node.name, placement, prefer=prefer, avoid=self.servers.idle_devices())

    def _upcoming(self, node: Node) -> list[Node]:
        """Other nodes that may still run and need a server of the pipeline on this machine."""
        unfinished = [n for n in self.planner.graph.values() if n.name not in self.steps or n.name in self._tasks]
        served_here = [
            n for n in unfinished if n.mode and n.name != node.name and not has_remote_servers(self.config, n.kind)
        ]
        steps = map(self._step, served_here)
        return [step.node for step in steps if step.node.mode and step.state in (State.run, State.waits)]

    def _stop_unneeded_servers(self, node: Node) -> None:
        """Stop the idle servers that no upcoming stage needs."""
        if self.servers.idle_devices():
            upcoming = self._upcoming(node)
            phases = [(other, phase) for other in upcoming for phase in self.planner.placement(other).phases]
            self.servers.keep([self.servers.key(placed, other) for other, phase in phases for placed in phase])

    def _check_disk(self, node: Node) -> None:
        """Refuse to start if disk or quota cannot hold what the run will write.

        Checked before the first stage and before one that stores hidden states; with a quota, before every stage.
        """
        quota = self.config.run.quota_gib
        if quota or not self._disk_estimated or "features" in node.spec.gives or node.keeps_states:
            self._disk_estimated = True
            open_steps = {s.node.name: s for s in self.planner.plan()}
            needs = estimate.estimate(self.planner, open_steps)
            self.events.emit("run.estimated", seconds=needs.stage_seconds)
            estimate.refuse_if_too_large(needs, ignore_estimate=self.config.run.ignore_disk_estimate)

    # Attempts at one stage.

    def _attempts(self, step: Step, placement: Placement, devices: Devices) -> Waiting:
        """Run the phases that are not done, one worker each; retry after a transient failure."""
        node = step.node
        limits = schedule.limits(self.config, node.name)
        for attempt in itertools.count(1):
            try:
                for index, phase in enumerate(placement.phases):
                    if not self._phase_done(step, index, phase):
                        leased = yield from self.servers.lease(node, phase, devices)
                        yield from self._work(step, (index, len(placement.phases)), attempt, leased)
                return
            except TransientError as transient:
                if attempt > limits.retries:
                    raise transient.failure from None
                message, seconds = transient.failure.message.splitlines()[0], limits.retry_wait * 2 ** (attempt - 1)
            self.servers.release(node)
            self.events.emit("stage.retried", node=node.name, attempt=attempt, message=message, seconds=seconds)
            yield from _pause(seconds)

    def _phase_done(self, step: Step, index: int, phase: Sequence[PlacedServer]) -> bool:
        scratch = self.planner.store.work(step.node.kind, step.key) / "scratch"
        return (scratch / phase_marker(index, (placed.serving.name for placed in phase))).exists()

    def _work(self, step: Step, phase: tuple[int, int], attempt: int, servers: Mapping[str, Server]) -> Waiting:
        """Start one worker and watch it until it exits. A `TransientError` means that another attempt may succeed."""
        node, log = step.node, self._log(step.node)
        request = self._request(step, *phase, attempt, servers)
        env = {k: v for server in servers.values() for k, v in server.worker_env().items()}
        with log.open("a") as file:
            title = f"{node.name}: attempt {attempt}, phase {phase[0] + 1} of {phase[1]}, {now()}"
            file.write(f"{endings.ATTEMPT}{title}\n")
        env.update(self.servers.worker_environment(node))
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
        failure, transient = self._failure(step, code)
        if servers and isinstance(failure, ServiceError):
            yield from _pause(SERVER_DEATH_SECONDS, unless=lambda: find_dead(servers.values()) is not None)
        if (server := find_dead(servers.values())) is not None:
            raise TransientError(server.failure())
        raise TransientError(failure) if transient else failure

    def _watched(self, step: Step, handle: Handle, servers: Mapping[str, Server]) -> Generator[None, None, int]:
        """Emit the worker's progress until it exits; return its exit code. Stop it when a server dies or time is up."""
        progress = self.planner.store.work(step.node.kind, step.key) / "progress.json"
        limit = schedule.limits(self.config, step.node.name).time_limit
        began, last_mtime = time.monotonic(), 0
        while (code := handle.poll()) is None:
            server = find_dead(servers.values())
            if server is not None or 0 < limit < time.monotonic() - began:
                yield from _stop(handle)
                raise TransientError(server.failure() if server is not None else self._too_long(step.node, limit))
            try:
                self._disk.check()
            except StoreError:
                yield from _stop(handle)
                raise
            try:
                if (mtime := progress.stat().st_mtime_ns) != last_mtime:
                    last_mtime = mtime
                    self.events.emit("stage.progress", node=step.node.name, **json.loads(progress.read_text()))
            except FileNotFoundError:
                pass
            yield
        return code

    def _request(self, step: Step, index: int, count: int, attempt: int, servers: Mapping[str, Server]) -> Path:
        """Write the worker's request for phase `index` of `count`; return its path."""
        node, placement = step.node, self.planner.placement(step.node)
        path = self.directory / "requests" / f"{file_name(node.name)}-{index}.json"
        path.parent.mkdir(exist_ok=True)
        Request(
            node=node.name,
            stage=node.kind,
            key=step.key,
            config=select(placement.resolve(self.config), node.reads),
            derived={**step.derived, "phase": index, "phases": count, **self.planner.outside_key(node)},
            inputs={slot: str(self.steps[upstream].path) for slot, upstream in self._slots(node).items()},
            digests={slot: self.steps[upstream].digest for slot, upstream in node.inputs.items()},
            services={name: server.request_entry() for name, server in servers.items()},
            orders=to_builtins(self.servers.orders(node)),
            reuse=[rows.as_json() for rows in step.reuse.sources],
            work=str(self.planner.store.work(node.kind, step.key)),
            store=str(self.planner.store.root),
            preimage=step.preimage,
            digest=step.digest or None,
            forced=node.name in self.planner.forced,
            provenance={
                "run": self.name,
                "node": node.name,
                "recipe": self.config.recipe,
                "words": self.argv,
                "attempt": attempt,
                **({} if is_remote(self.config, node.kind) else {"began": self._began[node.name]}),
                "inputs": {slot: self.steps[upstream].key for slot, upstream in node.inputs.items()},
                "reuse": [artifact.key for artifact in step.reuse.artifacts],
            },
            phase=index,
            phases=count,
        ).write(path)
        return path

    @staticmethod
    def _slots(node: Node) -> dict[str, str]:
        """The worker's inputs by slot, with the parts under names that sort in their order."""
        return {**node.inputs, **{f"part.{number:05d}": part for number, part in enumerate(node.parts)}}

    def _failure(self, step: Step, code: int) -> tuple[RunError, bool]:
        """The error that the worker reported, or how it died; and whether another attempt may succeed."""
        name = step.node.name
        report = self.planner.store.work(step.node.kind, step.key) / "failure.json"
        if code == 1 and report.exists():
            reported = json.loads(report.read_text())
            failure = _ERROR_CLASSES.get(reported["kind"], StageError)(
                f"{name}: {reported['message']}", reported["hint"]
            )
            return failure, reported.get("transient", False)
        hint = "finished work is kept: the next attempt resumes there"
        return StageError(f"{name} {endings.describe_exit(code)}", hint), endings.signal_of(code) is not None

    def _too_long(self, node: Node, limit: float) -> StageError:
        hint = "finished work is kept; allow more time: run.time_limit=SECONDS"
        return StageError(f"{node.name} was stopped after {limit:g} s, its run.time_limit", hint)

    def _with_log(self, node: Node, failure: RunError) -> RunError:
        """The failure with the end of the stage's log, the log's path and the command that runs only this stage."""
        log, command = self._log(node), endings.retry_command(self.argv, node.name)
        lines = endings.tail_before(log, failure.message.removeprefix(f"{node.name}: "))
        message = "\n\n".join([failure.message, "\n".join(lines)] if lines else [failure.message])
        return type(failure)(message, endings.hint_with_log(failure.hint, log, command))

    def _log(self, node: Node) -> Path:
        return self.directory / "logs" / f"{file_name(node.name)}.log"

    # Stopping workers: in order, or at once.

    def _stop_workers(self) -> None:
        """Ask all workers to stop, give them time to write checkpoints, then kill the rest."""
        for handle in self._workers.values():
            handle.terminate()
        deadline = time.monotonic() + WORKER_GRACE_SECONDS
        while any(handle.poll() is None for handle in self._workers.values()):
            if time.monotonic() > deadline:
                self._kill_workers()
            time.sleep(MIN_POLL_SECONDS)

    def _kill_workers(self) -> None:
        for handle in self._workers.values():
            if handle.poll() is None:
                handle.kill()

    def _kill(self) -> None:
        self._kill_workers()
        self.servers.kill()


def _stop(handle: Handle) -> Waiting:
    """Stop a worker: SIGTERM, time to write a checkpoint, SIGKILL."""
    handle.terminate()
    yield from _pause(WORKER_GRACE_SECONDS, unless=lambda: handle.poll() is not None)
    if handle.poll() is None:
        handle.kill()
    while handle.poll() is None:
        yield


def _pause(seconds: float, unless: Callable[[], bool] = lambda: False) -> Waiting:
    """Wait for `seconds`, or until `unless` returns true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not unless():
        yield
