"""plan, explain: what a recipe would do, and why."""

from __future__ import annotations

import dataclasses
import json

from speculators import recipe, ui
from speculators.errors import RecipeError
from speculators.runner import estimate
from speculators.runner.execute import as_json
from speculators.runner.explain import explain as explanation
from speculators.runner.plan import Planner
from speculators.runner.store import open_store


def plan(words: list[str]) -> int:
    """What would run, and why; starts nothing, writes nothing."""
    as_data = "--json" in words
    config = recipe.compose([w for w in words if w != "--json"])
    planner = Planner(config, open_store(config.run))
    steps = {step.node.name: step for step in planner.plan()}
    needs = estimate.estimate(planner, steps)
    if as_data:
        print(json.dumps({"steps": as_json(steps), "derived": planner.derived, **dataclasses.asdict(needs)}, indent=1))
        return 0
    print(ui.columns((s.state.name, name, s.key[:8] or "-", s.reason) for name, s in steps.items()))
    print("\n" + ui.columns((name, json.dumps(value)) for name, value in planner.derived.items()))
    for server in needs.servers:
        print(f"\nserver for {server.stage} ({server.mode}):\n  {server.command}")
    if needs.feature_tokens:
        print(
            f"\nhidden states: at most {needs.feature_tokens:,} tokens, {ui.size(needs.feature_bytes)}; "
            f"free in the store: {ui.size(needs.free_bytes)}"
        )
    return 0


def explain(words: list[str]) -> int:
    """Why one stage hits or misses."""
    as_data = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or "=" in words[0]:
        raise RecipeError("explain wants a stage", "speculators-run explain train recipe=NAME")
    config = recipe.compose(words[1:])
    found = explanation(Planner(config, open_store(config.run)), words[0])
    print(json.dumps(dataclasses.asdict(found), indent=1) if as_data else ui.explanation(found))
    return 0
