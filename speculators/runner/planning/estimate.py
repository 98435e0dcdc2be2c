"""What a plan will need, before it needs it: servers, tokens, bytes, time; and the refusal when the disk is short."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from speculators.errors import StoreError
from speculators.runner.execution import schedule
from speculators.runner.execution.schedule import GIB, Split
from speculators.runner.planning import derive, graph
from speculators.runner.planning.graph import TARGET
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.servers import vllm
from speculators.runner.store import upkeep
from speculators.runner.store.artifacts import Store, existing, free_bytes

PREFILLING = {"extract": "tokens_per_second", "train": "prefill_tokens_per_second"}
"""What stages say in their records about how fast they had the target run over their tokens."""
ANSWERING = {"regenerate": "tokens_per_second"}
"""... and about how fast it answered, which takes longer a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerNeed:
    """A server that would be started."""

    stage: str
    mode: str
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What would be used."""

    servers: list[ServerNeed] = field(default_factory=list)
    feature_tokens: int = 0
    """Upper bound of the tokens whose states would be stored."""
    feature_bytes: int = 0
    """Of them, without what an earlier attempt has written."""
    prefill_tokens: int = 0
    """Tokens that the target is run over for their hidden states alone, about; an answer's, taken while it is given,
    do not count. Where training draws them from a server, over all epochs."""
    prefill_seconds: float = 0.0
    """For them, at the speed of the last extraction from this target, or else of its last answers; 0 if there were
    none."""
    prefill_at_most: bool = False
    """It was that of answers."""
    splits: dict[str, Split] = field(default_factory=dict)
    """How training shares the machine with the server that it draws from, by stage."""
    store: str = ""
    """Where all of it would be kept."""
    free_bytes: int = 0
    writable: bool = True
    """Whether anything can be made there."""
    held_bytes: int = 0
    """What the store holds now; counted only if there is a quota."""
    quota_bytes: int = 0
    """What it may hold; 0: as much as the disk does."""


def estimate(planner: Planner, steps: Mapping[str, Step]) -> Needs:
    """Servers, tokens, bytes and time of what is still to be made.

    Raises:
        RecipeError: a server and the training beside it do not go together on this hardware.
    """
    config = planner.config
    open_steps = [s for s in steps.values() if s.state in (State.run, State.waits)]
    servers = [
        ServerNeed(stage=_served(step.node), mode=serving.mode, command=shlex.join(_argv(planner, serving, steps)))
        for step in _without_equals(open_steps)
        for phase in graph.phases(step.node, config)
        for serving in phase
        if not config.serve.url
    ]
    root, quota = planner.store.root, int(config.run.quota_gib * 2**30)
    needs = Needs(
        servers=servers,
        store=str(root),
        free_bytes=free_bytes(root),
        writable=_writable(root),
        held_bytes=upkeep.held(planner.store) if quota else 0,
        quota_bytes=quota,
    )
    splits = {s.node.name: split for s in open_steps if (split := schedule.split(s.node, config)) is not None}
    needs = replace(needs, splits=splits)
    packing = [s for s in open_steps if ("features" in s.node.spec.gives or s.node.draws) and not s.node.parts]
    if not packing or planner.facts is None:
        return needs
    first = packing[0]
    tokens = _tokens(planner, steps[first.node.inputs["tokens"]])
    if first.node.part is not None:  # what other workers have extracted already is not extracted again
        packing = [s for s in packing if s.node.part is not None]
        tokens = math.ceil(tokens * len(packing) / first.node.part[1])
    each = derive.feature_bytes_per_token(config, planner.facts)
    stored, prefilled = tokens, tokens if first.node.mode else 0
    if first.node.draws:
        stored = min(tokens, int(config.train.states_disk_gib * GIB) // each)
        in_memory = int(config.train.states_memory_gib * GIB) // each
        prefilled += (config.train.epochs - 1) * max(0, tokens - stored - in_memory)
    keeping = [s for s in open_steps if s.node.keeps_states]
    storing = [*(packing if first.node.part is not None else [first]), *keeping]
    written = sum(upkeep.size(planner.store.work(s.node.kind, s.key)) for s in storing if s.key)
    measured = _speed(planner, steps, PREFILLING)
    speed = measured or _speed(planner, steps, ANSWERING)
    return replace(
        needs,
        feature_tokens=stored,
        feature_bytes=0 if _linked(first, steps, root) else max(0, stored * each - written),
        prefill_tokens=prefilled,
        prefill_seconds=prefilled / speed if speed else 0.0,
        prefill_at_most=bool(speed and not measured),
    )


def refuse_if_too_large(needs: Needs) -> None:
    """Raises StoreError when nothing can be stored at all, or the hidden states would not fit."""
    if not needs.writable:
        hint = "mend its permissions, or store elsewhere and only read this one: run.store=PATH run.stores_read=[PATH]"
        raise StoreError(f"something is to be made, and the store {needs.store} cannot be written", hint)
    wanted = needs.held_bytes + needs.feature_bytes
    if needs.quota_bytes and wanted > needs.quota_bytes:
        states = f" and the hidden states need up to {_gib(needs.feature_bytes)}" if needs.feature_bytes else ""
        raise StoreError(
            f"the store holds {_gib(needs.held_bytes)}{states}, run.quota_gib allows {_gib(needs.quota_bytes)}",
            "`speculators-run gc --delete` removes what nobody uses; or raise run.quota_gib",
        )
    if needs.feature_bytes > needs.free_bytes:
        raise StoreError(
            f"the hidden states need up to {_gib(needs.feature_bytes)}, the store has {_gib(needs.free_bytes)} free",
            "lower prompts.num_conversations, max_seq_len or, if training keeps them, train.states_disk_gib; or name a "
            "larger disk: run.store=PATH",
        )


class DiskWatch:
    """The room in a store while stages work there, looked at now and then."""

    EVERY = 5.0
    """Seconds between two looks, at least; what a store holds is counted for a hundredth of the time at most."""
    RESERVE = 256 * 2**20
    """Bytes that are left for last checkpoints, and for whoever else uses the disk."""

    def __init__(self, store: Store, quota_gib: float) -> None:
        self._store = store
        self._quota = int(quota_gib * GIB)
        self._had_more = free_bytes(store.root) > self.RESERVE  # else the disk is a small one, and full is full
        self._next = time.monotonic() + self.EVERY

    def check(self) -> None:
        """Raises StoreError when what is written meanwhile has used the room up but for the reserve."""
        began = time.monotonic()
        if began < self._next:
            return
        hint = "make room (`speculators-run gc` tells what nobody uses), then run the same command again"
        if self._had_more and (free := free_bytes(self._store.root)) < self.RESERVE:
            raise StoreError(f"the disk of the store runs full: {free / 2**20:.0f} MiB are free", hint)
        if self._quota and (held := upkeep.held(self._store)) > self._quota:
            allowed = f"run.quota_gib allows {_gib(self._quota)}"
            raise StoreError(f"the store holds {_gib(held)} by now, {allowed}", f"{hint}; or raise run.quota_gib")
        now = time.monotonic()
        self._next = now + max(self.EVERY, 100 * (now - began))


def _linked(packing: Step, steps: Mapping[str, Step], root: Path) -> bool:
    """Whether hidden states are there already, and no byte of them has to be written again."""
    answers = steps[packing.node.inputs["states"]].path if "states" in packing.node.inputs else None
    return answers is not None and _device(answers) == _device(root)


def _device(path: Path) -> int:
    """Of the file system where a path is, or will be."""
    return existing(path).stat().st_dev


def _without_equals(steps: list[Step]) -> list[Step]:
    """Of the workers of one stage, which are served alike, the first that has something to do."""
    firsts: dict[str, Step] = {}
    for step in steps:
        firsts.setdefault(_served(step.node), step)
    return list(firsts.values())


def _served(node: graph.Node) -> str:
    """For whom a server is started."""
    return node.name if node.part is None else f"{node.name.rpartition('.')[0]}, each of {node.part[1]} workers"


def _writable(root: Path) -> bool:
    """Whether something could be made in a directory, or where it will be."""
    return os.access(existing(root), os.W_OK | os.X_OK)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _tokens(planner: Planner, tokens: Step) -> int:
    """Counted if the tokens are there, else every conversation at its longest."""
    if tokens.artifact is not None and "tokens" in tokens.artifact.record:
        return int(tokens.artifact.record["tokens"])
    return (planner.config.prompts.num_conversations or 0) * planner.config.max_seq_len


def _speed(planner: Planner, steps: Mapping[str, Step], telling: Mapping[str, str]) -> float:
    """Tokens a second, as the newest artifact says that had this target run in this type; 0 if there is none."""
    said = [
        (str(artifact.provenance.get("finished", "")), float(artifact.record.get(name) or 0.0))
        for stage, name in telling.items()
        for artifact in planner.store.artifacts(stage)
        if artifact.record.get(name)
        and artifact.preimage["inputs"].get(TARGET) == steps[TARGET].digest
        and artifact.preimage["config"].get("target.dtype") == planner.config.target.dtype.name
    ]
    return max(said, default=("", 0.0))[1]


def _argv(planner: Planner, serving: graph.Serving, steps: Mapping[str, Step]) -> list[str]:
    target = steps[TARGET].path or Path("TARGET")
    return vllm.argv(
        planner.config,
        mode=serving.mode,
        dtype=serving.dtype.name,
        target=target,
        draft=Path("DRAFT") if serving.mode == "speculative" else None,
        capture_layer_ids=planner.derived.get("capture_layer_ids", []) if serving.mode == "extract" else None,
        max_model_len=derive.max_model_len(planner.config, planner.facts),
        model="target-NONCE",
        port=planner.config.serve.port,
        hidden_states_dir=Path("STATES"),
    )
