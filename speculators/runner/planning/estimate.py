"""Estimate the servers, tokens, bytes and time that a plan needs, and refuse to start if the disk is too small."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from speculators.errors import StoreError
from speculators.runner.execution.placement import PlacedServer, Placement, Split, counted
from speculators.runner.hardware import GIB
from speculators.runner.planning import derive, durations, graph
from speculators.runner.planning.graph import TARGET
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.planning.serving import server_order
from speculators.runner.planning.workload import Workload, workload
from speculators.runner.servers import vllm
from speculators.runner.store import upkeep
from speculators.runner.store.artifacts import Store, existing, free_bytes
from speculators.timeouts import DISK_CHECK_SECONDS

PREFILLING = {"extract": "tokens_per_second", "train": "prefill_tokens_per_second"}
"""Fields of the stages' records with the target's prefill speed, in tokens/s."""
GENERATING = {"regenerate": "tokens_per_second"}
"""The same for the speed of generation, which is slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerNeed:
    """A server that the plan starts."""

    stage: str
    mode: str
    command: str
    phase: int = 0
    """Phases of a stage follow each other; the servers of one phase run at the same time."""
    devices: list[int] = field(default_factory=list)
    """Numbers of its GPUs among those of the stage, from 0; empty on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Resources that a plan needs."""

    servers: list[ServerNeed] = field(default_factory=list)
    stage_seconds: dict[str, float | None] = field(default_factory=dict)
    """Expected duration of each stage that runs, its servers' start included, by node; None: unknown. Parts of a stage
    that run at the same time count one by one."""
    stage_bytes: dict[str, int] = field(default_factory=dict)
    """Expected size of the artifacts of the stages that run, by node, without those whose size is unknown."""
    seconds: float = 0.0
    """Sum of `stage_seconds` over the stages whose duration is known."""
    gpu_hours: float = 0.0
    """The same, times the GPUs that each stage holds."""
    tokens: int = 0
    """Expected number of tokens, those of prompts included."""
    tokens_from: str = ""
    """Where it comes from: `artifact`, `earlier run`, `sample` (of the data files) or `options`, which is the bound."""
    max_tokens: int = 0
    """Upper bound of `tokens`: every conversation is as long as the options allow."""
    feature_tokens: int = 0
    """Expected number of tokens whose hidden states are stored."""
    feature_bytes: int = 0
    """Expected size of these hidden states, without those that an earlier attempt has written."""
    max_feature_bytes: int = 0
    """The same for `max_tokens`."""
    prefill_tokens: int = 0
    """Approximate number of tokens that the target prefills for their hidden states, over all epochs if training draws
    them from a live server; hidden states stored while answers are generated do not count."""
    prefill_seconds: float = 0.0
    """Duration of this prefill at the speed of the last extraction from this target, else of its last generation; 0 if
    there is none."""
    prefill_at_most: bool = False
    """Whether the speed is that of generation, so that the duration is an upper bound."""
    splits: dict[str, Split] = field(default_factory=dict)
    """How each training from a live server shares the machine with it."""
    stages: dict[str, str] = field(default_factory=dict)
    """GPUs of each stage that uses some, in words: `2 servers of 4 GPUs (tensor 4), one after the other`."""
    stage_gpus: dict[str, int] = field(default_factory=dict)
    """Number of GPUs that each of these stages holds."""
    machine: str = ""
    """GPUs, or cores and memory, that the plan is made for."""
    described: bool = False
    """The recipe describes these GPUs, and this machine does not have them."""
    notes: list[str] = field(default_factory=list)
    """What could not be derived or checked, and why."""
    store: str = ""
    """Path of the store."""
    free_bytes: int = 0
    writable: bool = True
    """Whether the store can be written."""
    store_bytes: int = 0
    """Size of the store; computed only if there is a quota."""
    quota_bytes: int = 0
    """Largest size of the store; 0: no limit."""


def estimate(planner: Planner, steps: Mapping[str, Step]) -> Needs:
    """Estimate the resources of the steps that are not cached.

    Raises:
        RecipeError: this hardware cannot run a server and the training from it at the same time.
    """
    config = planner.config
    open_steps = [s for s in steps.values() if s.state in (State.run, State.waits)]
    placements = {step.node.name: planner.placement(step.node) for step in open_steps}
    uses_devices = any(placement.devices and placement.on_this_machine for placement in placements.values())
    root, quota = planner.store.root, int(config.run.quota_gib * 2**30)
    needs = Needs(
        servers=_servers(planner, steps, open_steps),
        splits={name: placement.split for name, placement in placements.items() if placement.split is not None},
        stage_gpus={name: placement.devices for name, placement in placements.items() if placement.gpus},
        stages={
            name: used if placement.on_this_machine else f"in its job, {used}"
            for name, placement in placements.items()
            if (used := _devices_used(placement))
        },
        machine=str(planner.machine) if uses_devices else "",
        described=uses_devices and planner.machine.described,
        notes=sorted({note for placement in placements.values() for note in placement.notes}),
        store=str(root),
        free_bytes=free_bytes(root),
        writable=_writable(root),
        store_bytes=upkeep.store_bytes(planner.store) if quota else 0,
        quota_bytes=quota,
    )
    table = next((s for s in steps.values() if "tokens" in s.node.spec.gives), None)
    work = workload(planner, table, steps) if table is not None and open_steps else None
    if work is not None:
        needs = replace(needs, tokens=work.tokens, tokens_from=work.source, max_tokens=work.max_tokens)
        needs = replace(needs, notes=[*needs.notes, *work.unread])
        needs = _with_hidden_states(planner, steps, needs)
    return _with_durations(planner, steps, needs, work)


def _with_durations(planner: Planner, steps: Mapping[str, Step], needs: Needs, work: Workload | None) -> Needs:
    """Add the expected duration and size of each stage."""
    expected = durations.expected(planner, steps, work)
    seconds = {name: stage.seconds for name, stage in expected.items()}
    sizes = {name: stage.bytes for name, stage in expected.items() if stage.bytes is not None}
    placements = {name: planner.placement(steps[name].node) for name in seconds}
    gpus = {name: placement.devices if placement.gpus else 0 for name, placement in placements.items()}
    return replace(
        needs,
        stage_seconds=seconds,
        stage_bytes=sizes | needs.stage_bytes,
        seconds=sum(filter(None, seconds.values())),
        gpu_hours=sum(gpus[name] * (duration or 0.0) for name, duration in seconds.items()) / 3600,
    )


def _with_hidden_states(planner: Planner, steps: Mapping[str, Step], needs: Needs) -> Needs:
    """Add what the hidden states need, if some are still to be computed."""
    config, root = planner.config, planner.store.root
    open_steps = [s for s in steps.values() if s.state in (State.run, State.waits)]
    extracting = [s for s in open_steps if ("features" in s.node.spec.gives or s.node.draws) and not s.node.parts]
    if not extracting or planner.facts is None:
        return needs
    first = extracting[0]
    share = 1.0
    if first.node.part is not None:  # other workers may have finished their part
        extracting = [s for s in extracting if s.node.part is not None]
        share = len(extracting) / first.node.part[1]
    tokens, most = math.ceil(needs.tokens * share), math.ceil(needs.max_tokens * share)
    each = derive.feature_bytes_per_token(config, planner.facts)
    stored, most_stored, prefilled = tokens, most, tokens if first.node.mode else 0
    if first.node.draws:
        on_disk = int(config.train.states_disk_gib * GIB) // each
        stored, most_stored = min(tokens, on_disk), min(most, on_disk)
        in_memory = int(config.train.states_memory_gib * GIB) // each
        prefilled += (config.train.epochs - 1) * max(0, tokens - stored - in_memory)
    keeping = [s for s in open_steps if s.node.keeps_states]
    storing = [*(extracting if first.node.part is not None else [first]), *keeping]
    written = sum(upkeep.total_bytes(planner.store.work(s.node.kind, s.key)) for s in storing if s.key)
    linked = _linked(first, steps, root)
    feature_bytes, most_bytes = (0 if linked else max(0, n * each - written) for n in (stored, most_stored))
    measured = _speed(planner, steps, PREFILLING)
    speed = measured or _speed(planner, steps, GENERATING)
    writers = keeping or storing  # the hidden states of answers are linked
    return replace(
        needs,
        stage_bytes={step.node.name: feature_bytes // len(writers) for step in writers},
        feature_tokens=stored,
        feature_bytes=feature_bytes,
        max_feature_bytes=most_bytes,
        prefill_tokens=prefilled,
        prefill_seconds=prefilled / speed if speed else 0.0,
        prefill_at_most=bool(speed and not measured),
    )


def _servers(planner: Planner, steps: Mapping[str, Step], open_steps: list[Step]) -> list[ServerNeed]:
    """The servers that are started for these steps, in the order in which they are needed."""
    return [
        ServerNeed(
            stage=_server_user(step.node),
            mode=placed.serving.mode,
            command=shlex.join(_argv(planner, step.node, placed, steps)),
            phase=phase,
            devices=list(placed.devices) if placed.utilization is not None else [],
        )
        for step in _first_workers(open_steps)
        for phase, servers in enumerate(planner.placement(step.node).phases)
        for placed in servers
        if not placed.serving.url
    ]


def refuse_if_too_large(needs: Needs, *, ignore_estimate: bool = False) -> None:
    """Check that the store is writable and has space for the hidden states that are expected.

    A bound by the options does not count: it is many times too large, and there is an expectation before the stage that
    stores hidden states begins. With `ignore_estimate`, no estimate counts.

    Raises:
        StoreError: it is not writable, or too small.
    """
    if not needs.writable:
        hint = "fix its permissions, or write elsewhere and only read this one: run.store=PATH run.stores_read=[PATH]"
        raise StoreError(f"stages have to run, and the store {needs.store} is not writable", hint)
    feature_bytes = 0 if ignore_estimate or needs.tokens_from == "options" else needs.feature_bytes
    override = "run.ignore_disk_estimate=true starts anyway"
    needed = needs.store_bytes + feature_bytes
    if needs.quota_bytes and needed > needs.quota_bytes:
        features = f" and the hidden states need about {_gib(feature_bytes)}" if feature_bytes else ""
        raise StoreError(
            f"the store holds {_gib(needs.store_bytes)}{features}, run.quota_gib allows {_gib(needs.quota_bytes)}",
            "`speculators-run gc` finds unused artifacts; or raise run.quota_gib"
            + (f"; {override}" if feature_bytes else ""),
        )
    if feature_bytes > needs.free_bytes:
        raise StoreError(
            f"the hidden states need about {_gib(feature_bytes)}, the store has {_gib(needs.free_bytes)} free",
            "lower prompts.num_conversations, max_seq_len or, if training keeps them, train.states_disk_gib; or use a "
            f"larger disk: run.store=PATH; {override}",
        )


class DiskWatch:
    """Checks the free space of a store at intervals while stages run."""

    RESERVE = 256 * 2**20
    """Bytes that stay free for last checkpoints and for other users of the disk."""

    def __init__(self, store: Store, quota_gib: float) -> None:
        self._store = store
        self._quota = int(quota_gib * GIB)
        self._had_more = free_bytes(store.root) > self.RESERVE  # else the disk is too small for the reserve
        self._next = time.monotonic() + DISK_CHECK_SECONDS

    def check(self) -> None:
        """Check the free space and the quota, at most every `DISK_CHECK_SECONDS`.

        Raises:
            StoreError: less than the reserve is free, or the store exceeds its quota.
        """
        began = time.monotonic()
        if began < self._next:
            return
        hint = "free space (`speculators-run gc` lists unused artifacts), then run the same command again"
        if self._had_more and (free := free_bytes(self._store.root)) < self.RESERVE:
            raise StoreError(f"the disk of the store is almost full: {free / 2**20:.0f} MiB are free", hint)
        if self._quota and (store_bytes := upkeep.store_bytes(self._store)) > self._quota:
            allowed = f"run.quota_gib allows {_gib(self._quota)}"
            raise StoreError(f"the store now holds {_gib(store_bytes)}, {allowed}", f"{hint}; or raise run.quota_gib")
        now = time.monotonic()
        self._next = now + max(DISK_CHECK_SECONDS, 100 * (now - began))


def _linked(extracting: Step, steps: Mapping[str, Step], root: Path) -> bool:
    """Whether the stage can hard-link hidden states that exist on the store's file system."""
    answers = steps[extracting.node.inputs["states"]].path if "states" in extracting.node.inputs else None
    return answers is not None and _device(answers) == _device(root)


def _device(path: Path) -> int:
    """Device number of the file system of a path, which may not exist yet."""
    return existing(path).stat().st_dev


def _devices_used(placement: Placement) -> str:
    """The GPUs of a stage's servers and training, in words; empty without any."""
    phases: list[str] = []
    for servers in placement.phases:
        if not servers or servers[0].utilization is None:
            continue
        names = " and ".join(server.serving.name for server in servers if server.serving.name != TARGET) or "server"
        sizes = f" ({servers[0]})" if str(servers[0]) else ""
        phases.append(f"{names} on {counted(servers[0].ranks)}{' each' if len(servers) > 1 else ''}{sizes}")
    text = ", then ".join(phases)
    if not placement.gpus or not placement.worker:
        return text
    training = f"training on {counted(placement.processes)}" + (" (fsdp)" if placement.fsdp else "")
    if placement.split is not None and placement.split.shared:
        training += f" of them, which leaves the server {placement.phases[0][0].utilization:.0%} of their memory"
    return ", ".join(filter(None, [text, training]))


def _first_workers(steps: list[Step]) -> list[Step]:
    """The steps without further workers of the same stage, whose servers are alike."""
    firsts: dict[str, Step] = {}
    for step in steps:
        firsts.setdefault(_server_user(step.node), step)
    return list(firsts.values())


def _server_user(node: graph.Node) -> str:
    """The stage, or workers of a stage, that a server is started for."""
    return node.name if node.part is None else f"{node.name.rpartition('.')[0]}, each of {node.part[1]} workers"


def _writable(root: Path) -> bool:
    """Whether a directory, which may not exist yet, is writable."""
    return os.access(existing(root), os.W_OK | os.X_OK)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _speed(planner: Planner, steps: Mapping[str, Step], fields: Mapping[str, str]) -> float:
    """Tokens/s recorded by the newest artifact that used this target in this dtype; 0 if there is none.

    `fields` names the field of the record, by kind of stage.
    """
    speeds = [
        (str(artifact.provenance.get("finished", "")), float(artifact.record.get(name) or 0.0))
        for stage, name in fields.items()
        for artifact in planner.store.artifacts(stage)
        if artifact.record.get(name)
        and artifact.preimage["inputs"].get(TARGET) == steps[TARGET].digest
        and artifact.preimage["config"].get("target.dtype") == planner.config.target.dtype.name
    ]
    return max(speeds, default=("", 0.0))[1]


def _argv(planner: Planner, node: graph.Node, placed: PlacedServer, steps: Mapping[str, Step]) -> list[str]:
    order = server_order(planner, node, placed, steps, Path("DIRECTORIES"), Path("LOGS"))
    return vllm.command(order, model="target-NONCE", port=order.config.serve.port, hidden_states_dir=Path("STATES"))
