"""The servers that a plan needs: what `plan` prints and a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from speculators.errors import RecipeError
from speculators.runner import executors, hardware
from speculators.runner.execution.placement import PlacedServer, Placement
from speculators.runner.planning import derive
from speculators.runner.planning.graph import TARGET, Node
from speculators.runner.planning.plan import Planner, State, Step, draft_directory
from speculators.runner.servers import vllm


def check_placements(planner: Planner) -> None:
    """Place the stages that are not cached, before the first of them runs.

    Raises:
        RecipeError: one of them fits nowhere, or this machine does not have the GPUs that the recipe describes.
    """
    open_steps = [step for step in planner.plan() if step.state in (State.run, State.waits)]
    placements = [planner.placement(step.node) for step in open_steps]
    if planner.machine.described and any(p.gpus and p.on_this_machine for p in placements):
        raise RecipeError(
            f"hardware.gpu_memory_gib={planner.config.hardware.gpu_memory_gib:g}: the recipe is made for "
            f"{planner.machine}, and this machine has {hardware.find_machine()}",
            "hardware=auto, to use the GPUs of this machine",
        )


def cores_of(placement: Placement) -> int:
    """CPU cores that a stage's server gets; 0: all."""
    split = placement.split
    return split.server if split is not None and split.unit == "cores" else 0


def server_order(
    planner: Planner, node: Node, placed: PlacedServer, steps: Mapping[str, Step], directories: Path, logs: Path
) -> vllm.ServerOrder:
    """The order of one server of a stage. Checkpoints that do not exist yet are called `TARGET` and `DRAFT`."""
    config, mode = placed.resolve(planner.config), placed.serving.mode
    target = steps[TARGET].path
    draft = draft_directory(steps[node.inputs["speculator"]]) if mode == "speculative" else None
    if executors.has_remote_servers(config, node.kind):  # another job on that machine may use the configured port
        config = replace(config, serve=replace(config.serve, port=0))
    return vllm.ServerOrder(
        config=config,
        mode=mode,
        dtype=placed.serving.dtype.name,
        target=str(target.absolute()) if target else "TARGET",
        draft="" if mode != "speculative" else str(draft) if draft else "DRAFT",
        proposal=planner.proposal(node, placed.serving),
        capture_layer_ids=planner.derived.get("capture_layer_ids", []) if mode == "extract" else None,
        max_model_len=derive.max_model_len(config, planner.facts, mode),
        cores=cores_of(planner.placement(node)),
        devices=list(placed.devices) if placed.utilization is not None else [],
        directories=str(directories),
        logs=str(logs),
    )
