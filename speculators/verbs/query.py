"""plan, explain: print what a recipe would run, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from speculators import ui
from speculators.config import composed
from speculators.errors import RecipeError
from speculators.runner.execution.execute import steps_as_json
from speculators.runner.planning import checks, estimate, lockfile
from speculators.runner.planning.explain import changes_outside_key, explain_stage, to_json
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.store.artifacts import open_store
from speculators.verbs import usage


def plan(argv: list[str]) -> int:
    """Print what would run, and why; starts and writes nothing."""
    arguments = usage.parse("plan", argv)
    config = composed.compose_cached(arguments.overrides)
    planner = Planner(config, open_store(config.run))
    checks.check_machine(config, planner.graph)
    if config.run.locked:
        lockfile.refuse_if_different(planner)
    locked = lockfile.load_lock(config)
    differing = lockfile.lock_differences(locked, planner) if locked else []
    steps = {step.node.name: step for step in planner.plan()}
    needs = estimate.estimate(planner, steps)
    if arguments.as_json:
        values = {"steps": steps_as_json(steps), "derived": planner.derived, **dataclasses.asdict(needs)}
        values["held_bytes"] = values.pop("store_bytes")
        artifacts = {name: step.artifact for name, step in steps.items() if step.artifact}
        outside = {name: [to_json(c) for c in changes_outside_key(a)] for name, a in artifacts.items()}
        values |= {
            "outside_the_key": {name: changes for name, changes in outside.items() if changes},
            "locked": locked is not None,
            "lock_differs": [dataclasses.asdict(d) for d in differing],
        }
        print(json.dumps(values, indent=1))
        return 0
    print(ui.columns((s.state.name, name, s.key[:8] or "-", s.reason) for name, s in steps.items()))
    print("\n" + ui.columns((name, json.dumps(value)) for name, value in planner.derived.items()))
    if needs.machine:
        print("\n" + "\n".join(_devices(needs)))
    for server in needs.servers:
        print(f"\nserver for {server.stage} ({server.mode}):\n  {server.command}")
    if lines := _hidden_states(needs):
        print("\n" + "\n".join(lines))
    if outside_lines := _outside(steps):
        print("\n" + ui.dim("\n".join(outside_lines)))
    if locked:
        result = f"differs: {', '.join(d.name for d in differing)}" if differing else "no differences"
        print(f"\nlocked: {lockfile.lock_path(config)}  {result}")
    return 0


def _devices(needs: estimate.Needs) -> list[str]:
    """Lines about the machine, and what runs on which of its GPUs."""
    absent = ", which this machine does not have: `run` will refuse" if needs.described else ""
    lines = [f"machine: {needs.machine}{absent}"]
    lines += ui.columns(needs.stages.items()).splitlines()
    return [*lines, *(f"note: {note}" for note in needs.notes)]


def _hidden_states(needs: estimate.Needs) -> list[str]:
    """Lines about the hidden states that are still to be computed."""
    lines = []
    if needs.feature_tokens:
        bytes_, free = ui.size(needs.feature_bytes), ui.size(needs.free_bytes)
        lines.append(f"hidden states: at most {needs.feature_tokens:,} tokens, {bytes_}; {free} free in the store")
    if needs.prefill_tokens:
        time = "; duration unknown until this target has run"
        if needs.prefill_seconds:
            bound = "at most " if needs.prefill_at_most else "about "
            time = f", {bound}{ui.duration(needs.prefill_seconds)}"
        lines.append(f"prefill for them: about {needs.prefill_tokens:,} tokens{time}")
    for stage, split in needs.splits.items():
        lines.append(f"{stage} and its server: {split.training} and {split.server} {split.unit}"
                    f"{', the same ones' if split.shared else ''}")  # fmt: skip
    return lines


def _outside(steps: Mapping[str, Step]) -> list[str]:
    """Lines about differences outside the key between this machine and those that made the cached artifacts."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for name, step in steps.items():
        for change in changes_outside_key(step.artifact) if step.artifact else ():
            stages.setdefault((change.name, str(change.old), str(change.new)), []).append(name)
    return [f"not in any key: {n} {old} -> {new}  ({', '.join(names)})" for (n, old, new), names in stages.items()]


def explain(argv: list[str]) -> int:
    """Explain the cache hit or miss of a stage."""
    arguments = usage.parse("explain", argv)
    if len(arguments.names) != 1:
        raise RecipeError("explain needs a stage", "speculators-run explain train recipe=NAME")
    config = composed.compose_cached(arguments.overrides)
    explained = explain_stage(Planner(config, open_store(config.run)), arguments.names[0])
    print(json.dumps(to_json(explained), indent=1) if arguments.as_json else ui.explanation(explained))
    return 0
