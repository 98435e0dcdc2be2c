"""What a plan will need, before it needs it: servers, tokens, bytes; and the refusal when the disk has not got them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from speculators.errors import StoreError
from speculators.runner import derive, graph, upkeep, vllm
from speculators.runner.graph import TARGET
from speculators.runner.plan import Planner, State, Step
from speculators.runner.store import free_bytes


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
    """Servers and bytes of what is still to be made."""
    config = planner.config
    open_steps = [s for s in steps.values() if s.state in (State.run, State.waits)]
    servers = [
        ServerNeed(stage=step.node.name, mode=serving.mode, command=shlex.join(_argv(planner, serving, steps)))
        for step in open_steps
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
    packing = next((s for s in open_steps if "features" in s.node.spec.gives), None)
    if packing is None or planner.facts is None:
        return needs
    tokens = _tokens(planner, steps[packing.node.inputs["tokens"]])
    storing = [packing, *(s for s in open_steps if s.node.keeps_states)]
    written = sum(upkeep.size(planner.store.work(s.node.kind, s.key)) for s in storing if s.key)
    need = max(0, len(storing) * tokens * derive.feature_bytes_per_token(config, planner.facts) - written)
    return replace(needs, feature_tokens=tokens, feature_bytes=need)


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
            "lower prompts.count or train.sequence_length, or name a larger disk: run.store=PATH",
        )


def _writable(root: Path) -> bool:
    """Whether something could be made in a directory, or where it will be."""
    while not root.exists():
        root = root.parent
    return os.access(root, os.W_OK | os.X_OK)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _tokens(planner: Planner, tokens: Step) -> int:
    """Counted if the tokens are there, else every conversation at its longest."""
    if tokens.artifact is not None and "tokens" in tokens.artifact.record:
        return int(tokens.artifact.record["tokens"])
    return (planner.config.prompts.count or 0) * planner.config.train.sequence_length


def _argv(planner: Planner, serving: graph.Serving, steps: Mapping[str, Step]) -> list[str]:
    target = steps[TARGET].path or Path("TARGET")
    return vllm.argv(
        planner.config,
        mode=serving.mode,
        dtype=serving.dtype.name,
        target=target,
        draft=Path("DRAFT") if serving.mode == "speculative" else None,
        capture_layer_ids=planner.derived.get("capture_layer_ids", []) if serving.mode == "extract" else None,
        max_model_len=derive.max_model_len(planner.config),
        model="target-NONCE",
        port=planner.config.serve.port,
        states=Path("STATES"),
    )
