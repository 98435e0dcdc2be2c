"""What a plan will need, before it needs it: servers, tokens, bytes; and the refusal when the disk has not got them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from speculators.errors import StoreError
from speculators.runner import derive, graph, upkeep, vllm
from speculators.runner.graph import TARGET
from speculators.runner.plan import Planner, State, Step


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
    free_bytes: int = 0


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
    free = free_bytes(planner.store.root)
    packing = next((s for s in open_steps if "features" in s.node.spec.gives), None)
    if packing is None or planner.facts is None:
        return Needs(servers=servers, free_bytes=free)
    tokens = _tokens(planner, steps[packing.node.inputs["tokens"]])
    storing = [packing, *(s for s in open_steps if s.node.keeps_states)]
    written = sum(upkeep.size(planner.store.work(s.node.kind, s.key)) for s in storing if s.key)
    need = max(0, len(storing) * tokens * derive.feature_bytes_per_token(config, planner.facts) - written)
    return Needs(servers=servers, feature_tokens=tokens, feature_bytes=need, free_bytes=free)


def refuse_if_too_large(needs: Needs) -> None:
    """Raises StoreError when the hidden states would not fit."""
    if needs.feature_bytes > needs.free_bytes:
        raise StoreError(
            f"the hidden states need up to {needs.feature_bytes / 2**30:.1f} GiB, "
            f"the store has {needs.free_bytes / 2**30:.1f} GiB free",
            "lower prompts.count or train.sequence_length, or name a larger disk: run.store=PATH",
        )


def free_bytes(root: Path) -> int:
    """Free bytes where the store is, or will be."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


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
