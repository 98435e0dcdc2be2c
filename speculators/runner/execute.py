"""Carry out a plan: one stage after the other, servers for those that need them, everything written down.

Each stage is one or more workers (`python -m speculators.worker request.json`), one a phase. A worker does its
own locking and publishing; this module only starts it, watches it and its servers, and says what happened.
Killed at any point, the same command goes on: artifacts that exist are hits, the rest resumes in its work
directory.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config import Config
from speculators.errors import ContractError, RecipeError, RunError, ServiceError, SourceError, StageError, StoreError
from speculators.fields import select, to_plain
from speculators.job import REQUEST_FORMAT, write_json
from speculators.runner import derive, estimate, graph, vllm
from speculators.runner.events import Events
from speculators.runner.executors import Handle, executor_of
from speculators.runner.graph import TARGET, Node, Serving
from speculators.runner.plan import Planner, State, Step
from speculators.runner.service import Service, external

POLL = 0.05
"""Seconds between two looks at a worker."""
GRACE = 30.0
"""Seconds that a worker has to write a checkpoint when it is asked to stop."""
_KINDS = {
    kind.__name__: kind for kind in (RecipeError, SourceError, StoreError, ServiceError, StageError, ContractError)
}


class Interrupted(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


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
    _servers: dict[tuple[str, str, str], Service] = field(default_factory=dict)
    _room_was_asked: bool = False

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
        with _interruptible():
            try:
                for name, node in self.planner.graph.items():
                    if node.kind == "fetch":
                        self.steps[name] = self.planner.step(name, {})
                    else:
                        self._ensure(node)
                    if (found := self.steps[name].artifact) is not None:
                        self.planner.store.touch(found)
            finally:
                self._stop_servers(keep=set())
        return self.steps

    def _ensure(self, node: Node) -> None:
        step = self.planner.step(node.name, self._digests())
        if step.state is State.waits:
            # Only the target's own config.json can be missing here: inputs were made in data-flow order.
            self._fetch(TARGET)
            self.planner.learn_target()
            step = self.planner.step(node.name, self._digests())
        self._decided(step)
        if step.state is State.run:
            if self.config.only not in ("", node.name):
                hint = f"make it first: until={node.name}"
                raise RecipeError(f"only={self.config.only} needs `{node.name}`, which is not there", hint)
            for upstream in node.inputs.values():
                self._fetch(upstream)
            step = self._make(step)
        self.steps[node.name] = step

    def _fetch(self, name: str) -> None:
        """Fetch a source that is not here yet; anything else is left alone."""
        step = self.steps[name]
        if step.node.kind == "fetch" and step.path is None:
            self._decided(step)
            self.steps[name] = self._make(step)

    def _digests(self) -> dict[str, str]:
        return {name: step.digest for name, step in self.steps.items()}

    def _decided(self, step: Step) -> None:
        self.events.emit("stage.decided", node=step.node.name, state=step.state.name, reason=step.reason, key=step.key)

    def _make(self, step: Step) -> Step:
        """Run a stage's workers, phase by phase, and take the artifact that the last one published."""
        node, began = step.node, time.monotonic()
        plan = graph.phases(node, self.config)
        try:
            if not self._room_was_asked or "features" in node.spec.gives or node.keeps_states:
                # Again where states are stored: an upper bound is counted by then, and others fill the disk too.
                self._room_was_asked = True
                open_steps = {s.node.name: s for s in self.planner.plan()}
                estimate.refuse_if_too_large(estimate.estimate(self.planner, open_steps))
            for index, servings in enumerate(plan):
                if self._phase_done(step, index):
                    continue
                self._stop_servers(keep={self._server_key(s, node) for s in servings} | self._wanted_later(node))
                servers = {s.name: self._serve(s, node) for s in servings}
                self._await_ready(servers)
                self._work(step, index, len(plan), servers)
        except RunError as failure:
            self.events.emit("stage.failed", node=node.name, message=failure.message)
            raise
        artifact = self.planner.store.find(node.kind, step.key)
        if artifact is None:
            raise StageError(f"{node.name}: the worker ended well but left no artifact", f"look at {self._log(node)}")
        self.planner.forced.discard(node.name)
        made = self.planner.step(node.name, self._digests())
        seconds = time.monotonic() - began
        self.events.emit("stage.finished", node=node.name, seconds=seconds, record=artifact.record, key=step.key)
        self._stop_servers(keep=self._wanted_later(node))
        return made

    def _phase_done(self, step: Step, index: int) -> bool:
        return (self.planner.store.work(step.node.kind, step.key) / "scratch" / f"phase-{index}.done").exists()

    def _work(self, step: Step, index: int, count: int, servers: Mapping[str, Service]) -> None:
        request, log = self._request(step, index, count, servers), self._log(step.node)
        env = {k: v for server in servers.values() for k, v in server.worker_env().items()}
        handle = executor_of(self.config, step.node.kind).submit(request, log, env)
        self.events.emit("stage.started", node=step.node.name, log=str(log), phase=index, phases=count)
        try:
            code = self._watch(step, handle, servers)
        except BaseException:
            _end(handle)
            raise
        if code != 0:
            raise self._failure(step, code, log)

    def _watch(self, step: Step, handle: Handle, servers: Mapping[str, Service]) -> int:
        progress = self.planner.store.work(step.node.kind, step.key) / "progress.json"
        seen = 0
        while (code := handle.poll()) is None:
            for server in servers.values():
                server.poll()
                if server.state == "dead":
                    raise server.failure()
            try:
                if (stamp := progress.stat().st_mtime_ns) != seen:
                    seen = stamp
                    self.events.emit("stage.progress", node=step.node.name, **json.loads(progress.read_text()))
            except FileNotFoundError:
                pass
            time.sleep(POLL)
        return code

    def _request(self, step: Step, index: int, count: int, servers: Mapping[str, Service]) -> Path:
        node = step.node
        path = self.directory / "requests" / f"{node.name}-{index}.json"
        path.parent.mkdir(exist_ok=True)
        request = {
            "format": REQUEST_FORMAT,
            "node": node.name,
            "stage": node.kind,
            "key": step.key,
            "config": select(self.config, node.spec.reads),
            "derived": {**step.derived, "phase": index, "phases": count},
            "inputs": {slot: str(self.steps[upstream].path) for slot, upstream in node.inputs.items()},
            "digests": {slot: self.steps[upstream].digest for slot, upstream in node.inputs.items()},
            "services": {name: server.plain() for name, server in servers.items()},
            "work": str(self.planner.store.work(node.kind, step.key)),
            "store": str(self.planner.store.root),
            "preimage": step.preimage,
            "digest": step.digest or None,
            "forced": node.name in self.planner.forced,
            "provenance": {
                "run": self.name,
                "recipe": self.config.recipe,
                "words": self.words,
                "inputs": {slot: self.steps[upstream].key for slot, upstream in node.inputs.items()},
            },
            "phase": index,
            "phases": count,
        }
        write_json(path, request)
        return path

    def _failure(self, step: Step, code: int, log: Path) -> RunError:
        """What the worker said about itself, or how it died and the end of its log."""
        said = self.planner.store.work(step.node.kind, step.key) / "failure.json"
        if code == 1 and said.exists():
            failure = json.loads(said.read_text())
            return _KINDS.get(failure["kind"], StageError)(f"{step.node.name}: {failure['message']}", failure["hint"])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL:
            how += " (out of memory, most likely)"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        return StageError(
            f"{step.node.name} {how}\n\n{tail}", f"the whole log is {log}; the same command resumes there"
        )

    def _log(self, node: Node) -> Path:
        return self.directory / "logs" / f"{node.name}.log"

    # Servers: one a (mode, dtype, draft), shared by the stages that need the same.

    def _server_key(self, serving: Serving, node: Node) -> tuple[str, str, str]:
        draft = self.steps[node.inputs["speculator"]].digest if serving.mode == "speculative" else ""
        mode = serving.mode
        if mode == "generate" and any(other.mode == "extract" for other in self._to_come(node)):
            # One server does both: it keeps hidden states only for requests that ask for them.
            mode = "extract"
        return mode, serving.dtype.name, draft

    def _to_come(self, node: Node) -> Iterator[Node]:
        """Nodes after this one that may still have to run."""
        names = list(self.planner.graph)
        for name in names[names.index(node.name) + 1 :]:
            if self.planner.step(name, self._digests()).state in (State.run, State.waits):
                yield self.planner.graph[name]

    def _wanted_later(self, node: Node) -> set[tuple[str, str, str]]:
        """Servers that a later stage needs and that do not depend on what is still to be made."""
        later = [n for n in self._to_come(node) if n.mode]
        return {self._server_key(s, n) for n in later for phase in graph.phases(n, self.config) for s in phase}

    def _serve(self, serving: Serving, node: Node) -> Service:
        key = self._server_key(serving, node)
        if key not in self._servers:
            self._servers[key] = self._start(serving, key[0], node)
        return self._servers[key]

    def _start(self, serving: Serving, mode: str, node: Node) -> Service:
        nonce = secrets.token_hex(4)
        log = self.directory / "logs" / f"vllm-{mode}-{serving.dtype.name}-{nonce}.log"
        home = self.planner.store.root / "services" / nonce
        if self.config.serve.url:
            service = external(self.config, mode, home, log)
        else:
            draft = self.steps[node.inputs["speculator"]].path if mode == "speculative" else None
            spec = vllm.server(
                self.config,
                mode=mode,
                dtype=serving.dtype.name,
                target=_there(self.steps[TARGET].path),
                draft=draft / "best" if draft else None,
                capture_layer_ids=self.planner.derived["capture_layer_ids"] if mode == "extract" else None,
                max_model_len=derive.max_model_len(self.config),
                nonce=nonce,
                directory=home,
                log=log,
            )
            service = Service(spec, home)
        service.start()
        self.events.emit("service.starting", service=nonce, mode=mode, log=str(log))
        return service

    def _await_ready(self, servers: Mapping[str, Service]) -> None:
        began = time.monotonic()
        waiting = {id(s): s for s in servers.values() if s.state != "ready"}
        while waiting:
            for ident, server in list(waiting.items()):
                server.poll()
                if server.state == "dead":
                    raise server.failure()
                if server.state == "ready":
                    del waiting[ident]
                    seconds = time.monotonic() - began
                    self.events.emit("service.ready", service=server.name, mode=server.mode, seconds=seconds)
            time.sleep(POLL)

    def _stop_servers(self, keep: set[tuple[str, str, str]]) -> None:
        for key in [k for k in self._servers if k not in keep]:
            server = self._servers.pop(key)
            server.stop()
            self.events.emit("service.stopped", service=server.name, mode=server.mode)


def _there(path: Path | None) -> Path:
    assert path is not None, "the target is fetched before a server is started for it"
    return path


def _end(handle: Handle) -> None:
    """SIGTERM, time to write a checkpoint, SIGKILL."""
    handle.terminate()
    deadline = time.monotonic() + GRACE
    while handle.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)
    if handle.poll() is None:
        handle.kill()


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM unwinds the run in order; a second one kills what is left at once."""

    def first(signum: int, frame: object) -> None:
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, second)
        raise Interrupted(signum)

    def second(signum: int, frame: object) -> None:
        # Workers and servers hold the other end of a pipe to this process: they end when it does.
        os._exit(128 + signum)

    before = {s: signal.signal(s, first) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def as_json(steps: Mapping[str, Step]) -> dict[str, Any]:
    """The steps of a run as plain values, for `run.json` and `--json`."""
    return {
        name: {"stage": s.node.kind, "state": s.state.name, "reason": s.reason, "key": s.key, "digest": s.digest,
               "inputs": dict(s.node.inputs), "path": str(s.path) if s.path else None}
        for name, s in steps.items()
    }  # fmt: skip


def resolved(config: Config) -> dict[str, Any]:
    """The whole recipe as plain values, for `config.json`."""
    plain: dict[str, Any] = to_plain(config)
    return plain
