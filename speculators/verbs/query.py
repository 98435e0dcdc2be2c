"""plan, explain: what a recipe would do, and why."""

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


def plan(words: list[str]) -> int:
    """What would run, and why; starts nothing, writes nothing."""
    as_data = "--json" in words
    config = composed.compose_cached([w for w in words if w != "--json"])
    planner = Planner(config, open_store(config.run))
    checks.check_machine(config, planner.graph)
    if config.run.locked:
        lockfile.refuse_if_different(planner)
    locked = lockfile.load_lock(config)
    differing = lockfile.lock_differences(locked, planner) if locked else []
    steps = {step.node.name: step for step in planner.plan()}
    needs = estimate.estimate(planner, steps)
    if as_data:
        values = {"steps": steps_as_json(steps), "derived": planner.derived, **dataclasses.asdict(needs)}
        values["held_bytes"] = values.pop("store_bytes")
        outside = {
            name: [to_json(c) for c in changes_outside_key(s.artifact)] for name, s in steps.items() if s.artifact
        }
        told = {
            "outside_the_key": {name: changes for name, changes in outside.items() if changes},
            "locked": locked is not None,
            "lock_differs": [dataclasses.asdict(d) for d in differing],
        }
        print(json.dumps({**values, **told}, indent=1))
        return 0
    print(ui.columns((s.state.name, name, s.key[:8] or "-", s.reason) for name, s in steps.items()))
    print("\n" + ui.columns((name, json.dumps(value)) for name, value in planner.derived.items()))
    for server in needs.servers:
        print(f"\nserver for {server.stage} ({server.mode}):\n  {server.command}")
    if said := _states(needs):
        print("\n" + "\n".join(said))
    if outside_lines := _outside(steps):
        print("\n" + ui.dim("\n".join(outside_lines)))
    if locked:
        says = f"says otherwise: {', '.join(d.name for d in differing)}" if differing else "says the same"
        print(f"\nlocked: {lockfile.lock_path(config)} {says}")
    return 0


def _states(needs: estimate.Needs) -> list[str]:
    """What is known of the hidden states that are still to be computed, a line for each thing."""
    said = []
    if needs.feature_tokens:
        bytes_, free = ui.size(needs.feature_bytes), ui.size(needs.free_bytes)
        said.append(f"hidden states: at most {needs.feature_tokens:,} tokens, {bytes_}; free in the store: {free}")
    if needs.prefill_tokens:
        took = "; how long that takes is known when this target has run"
        if needs.prefill_seconds:
            how = "as fast as it answered, at most" if needs.prefill_at_most else "at the last speed"
            took = f", {ui.duration(needs.prefill_seconds)} {how}"
        said.append(f"to be prefilled for them: about {needs.prefill_tokens:,} tokens{took}")
    for stage, split in needs.splits.items():
        said.append(f"{stage} and the server that it draws from: {split.training} and {split.server} {split.unit}"
                    f"{', the same ones' if split.shared else ''}")  # fmt: skip
    return said


def _outside(steps: Mapping[str, Step]) -> list[str]:
    """What the cached stages were made with, where this machine has something else; a line for each such thing."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for name, step in steps.items():
        for change in changes_outside_key(step.artifact) if step.artifact else ():
            stages.setdefault((change.name, str(change.old), str(change.new)), []).append(name)
    return [f"not in any key: {n} {old} -> {new}  ({', '.join(names)})" for (n, old, new), names in stages.items()]


def explain(words: list[str]) -> int:
    """Why one stage hits or misses."""
    as_data = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or "=" in words[0]:
        raise RecipeError("explain wants a stage", "speculators-run explain train recipe=NAME")
    config = composed.compose_cached(words[1:])
    found = explain_stage(Planner(config, open_store(config.run)), words[0])
    print(json.dumps(to_json(found), indent=1) if as_data else ui.explanation(found))
    return 0
