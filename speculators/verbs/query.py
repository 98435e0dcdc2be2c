"""plan, explain: print what a recipe would run, and why."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators import ui
from speculators.config import composed
from speculators.config.fields import as_override
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning import checks, datasets, estimate, lockfile, trackers
from speculators.runner.planning.explain import changes_outside_key, explain_stage, to_json
from speculators.runner.planning.plan import Planner, State, Step, steps_as_json
from speculators.runner.planning.sources import lock_path
from speculators.runner.store.artifacts import open_store
from speculators.verbs import usage


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The plan of one recipe."""

    planner: Planner
    steps: dict[str, Step]
    needs: estimate.Needs
    lock: str = ""
    """Path of the recipe's lock file, if there is one."""
    differing: list[lockfile.Difference] = field(default_factory=list)
    """Differences from it."""


def plan(argv: list[str]) -> int:
    """Print what would run, and why; starts and writes nothing."""
    arguments = usage.parse("plan", argv)
    if "--multirun" in arguments.flags:
        return _plan_sweep(arguments)
    planned = _planned(composed.compose_cached(arguments.overrides))
    print(json.dumps(_plan_as_json(planned), indent=1) if arguments.as_json else _plan_text(planned, arguments.flags))
    return 0


def _planned(config: Config) -> _Plan:
    """Plan a recipe; raises as a run would before it starts."""
    planner = Planner(config, open_store(config.run))
    checks.check_machine(config, planner.graph)
    if config.run.locked:
        lockfile.refuse_if_different(planner)
    locked = lockfile.load_lock(config)
    steps = {step.node.name: step for step in planner.plan()}
    trackers.check_trackers(config, steps.values())
    datasets.check_datasets(config, steps.values())
    return _Plan(
        planner=planner,
        steps=steps,
        needs=_needs(planner, steps),
        lock=str(lock_path(config.recipe)) if locked else "",
        differing=lockfile.lock_differences(locked, planner) if locked else [],
    )


def _plan_as_json(planned: _Plan) -> dict[str, Any]:
    needs, steps = planned.needs, planned.steps
    values = {"steps": steps_as_json(steps), "derived": planned.planner.derived, **dataclasses.asdict(needs)}
    values["held_bytes"] = values.pop("store_bytes")
    artifacts = {name: step.artifact for name, step in steps.items() if step.artifact}
    outside = {name: [to_json(c) for c in changes_outside_key(a)] for name, a in artifacts.items()}
    return values | {
        "outside_the_key": {name: changes for name, changes in outside.items() if changes},
        "notes": [*planned.planner.notes, *needs.notes],
        "locked": bool(planned.lock),
        "lock_differs": [dataclasses.asdict(d) for d in planned.differing],
    }


def _plan_text(planned: _Plan, flags: Mapping[str, str]) -> str:
    needs, planner = planned.needs, planned.planner
    notes = [_filled(f"note: {note}") for note in planner.notes]
    servers = _servers(needs, "--servers" in flags)
    lines = [_derived(planner.derived), *notes, servers, *_devices(needs), *_hidden_states(needs)]
    paragraphs = ["\n".join([_stages(planned.steps, needs), *filter(None, lines)])]
    if outside := _outside(planned.steps):
        paragraphs.append(ui.dim("\n".join(outside)))
    if planned.lock:
        names = ", ".join(d.name for d in planned.differing)
        paragraphs.append(_filled(f"locked: {planned.lock}  {f'differs: {names}' if names else 'no differences'}"))
    return "\n\n".join(paragraphs)


def _plan_sweep(arguments: usage.Arguments) -> int:
    """Print what each job of a sweep would run. A stage that several jobs need counts for the first of them."""
    from speculators.config import compose  # imports Hydra

    if "--servers" in arguments.flags:
        raise RecipeError(
            "--servers and --multirun exclude each other", "leave --multirun out, and give one value each"
        )
    jobs = [(overrides, _planned(config)) for overrides, config in compose.sweep_jobs(arguments.overrides)]
    if arguments.as_json:
        print(json.dumps([{"job": i, "overrides": o, **_plan_as_json(p)} for i, (o, p) in enumerate(jobs)], indent=1))
        return 0
    common = set.intersection(*({*overrides} for overrides, _ in jobs))
    users: dict[str, list[str]] = {}
    rows = []
    for number, (overrides, planned) in enumerate(jobs):
        counts, seconds = Counter(step.state for step in planned.steps.values()), []
        work = planned.planner.identities(planned.steps)
        for identity, name in work.items():
            if identity not in users:
                seconds.append(planned.needs.stage_seconds.get(name))
            users.setdefault(identity, []).append(name)
        known = [duration for duration in seconds if duration is not None]
        time = ui.duration(sum(known)) if seconds and len(known) == len(seconds) else ""
        numbers = (str(number), str(counts[State.cached]), str(len(seconds)), str(len(work) - len(seconds)), time)
        rows.append((*numbers, " ".join(override for override in overrides if override not in common)))
    table: list[tuple[str, ...]] = [("job", "cached", "to run", "shared", "time", "options"), *rows]
    if not any(time for *_, time, _ in rows):
        table = [(*numbers, options) for *numbers, _, options in table]
    print(ui.listing(table, right=range(len(table[0]) - 1)))
    print("\nshared: stages that an earlier job of the sweep makes")
    runs: dict[str, int] = Counter(names[0] for names in users.values())
    for count in sorted(set(runs.values())):
        names = ", ".join(name for name, times in runs.items() if times == count)
        print(_filled(f"{'once' if count == 1 else f'{count} times'}: {names}"))
    return 0


def _needs(planner: Planner, steps: Mapping[str, Step]) -> estimate.Needs:
    """What the plan needs. What does not fit is a note where a source is not resolved: `run` refuses in any case."""
    try:
        return estimate.estimate(planner, steps)
    except RecipeError as refusal:
        if not planner.unresolved:
            raise
        planner.notes.append(refusal.message)
        return estimate.Needs()


def _devices(needs: estimate.Needs) -> list[str]:
    """Lines about the machine, and what runs on which of its GPUs."""
    absent = ", which this machine does not have: `run` will refuse" if needs.described else ""
    lines = [f"machine: {needs.machine}{absent}"] if needs.machine else []
    lines += [f"  {name}: {used}" for name, used in needs.stages.items()]
    return [_filled(line) for line in [*lines, *(f"note: {note}" for note in needs.notes)]]


def _stages(steps: Mapping[str, Step], needs: estimate.Needs) -> str:
    """A line for each stage: state, expected time and size, GPUs and the reason; then their number and total time."""
    rows = []
    for name, step in steps.items():
        seconds, size = needs.stage_seconds.get(name), needs.stage_bytes.get(name)
        time = "" if seconds is None else ui.duration(seconds)
        gpus = str(needs.stage_gpus.get(name) or "")
        rows.append((step.state.name, name, time, ui.size(size) if size else "", gpus, step.reason))
    counts = Counter(step.state.name for step in steps.values())
    known = [seconds for seconds in needs.stage_seconds.values() if seconds is not None]
    total = f"; about {ui.duration(sum(known))}" if known and len(known) == len(needs.stage_seconds) else ""
    labels = {"run": "to run", "waits": "waiting"}
    summary = ", ".join(f"{count} {labels.get(state, state)}" for state, count in counts.items())
    return (
        ui.stage_table(("state", "stage", "time", "size", "GPUs", "why"), rows, right=[2, 3, 4])
        + f"\n\n{summary}{total}"
    )


def _derived(derived: Mapping[str, Any]) -> str:
    """Derived values in as few lines as they take: `layer_ids=[0,2,15,27] last_state=everywhere`."""
    values = [f"{name}={as_override(value).replace(' ', '')}" for name, value in derived.items()]
    if not values:
        return ""
    return _filled(" ".join(["derived:", *values]))


def _servers(needs: estimate.Needs, commands: bool) -> str:
    """The stages with servers and the servers' modes, or their command lines."""
    if commands:
        return "\n".join(f"server for {s.stage} ({s.mode}):\n  {s.command}" for s in needs.servers)
    modes: dict[str, list[str]] = {}
    for server in needs.servers:
        modes.setdefault(server.stage, []).append(server.mode)
    listed = ", ".join(f"{stage} ({', '.join(dict.fromkeys(each))})" for stage, each in modes.items())
    return _filled(f"servers: {listed}; --servers prints their command lines") if modes else ""


def _filled(text: str) -> str:
    """Wrap a text to the width of stdout."""
    return ui.filled(text, ui.width(), 2)


def _hidden_states(needs: estimate.Needs) -> list[str]:
    """Lines about the hidden states that are still to be computed."""
    lines = []
    if needs.feature_tokens:
        bytes_, free = ui.size(needs.feature_bytes), ui.size(needs.free_bytes)
        count = f"{needs.feature_tokens:,} tokens"
        if needs.tokens_from == "options":
            lines.append(f"hidden states: at most {count}, {bytes_}; {free} free in the store")
        else:
            most = f" (at most {ui.size(needs.max_feature_bytes)})" if needs.max_tokens > needs.tokens else ""
            lines.append(
                f"hidden states: about {count}, {bytes_}{most}, by {needs.tokens_from}; {free} free in the store"
            )
    if needs.prefill_tokens:
        time = "; duration unknown until this target has run"
        if needs.prefill_seconds:
            bound = "at most " if needs.prefill_at_most else "about "
            time = f", {bound}{ui.duration(needs.prefill_seconds)}"
        lines.append(f"prefill for them: about {needs.prefill_tokens:,} tokens{time}")
    for stage, split in needs.splits.items():
        if split.unit == "cores":  # GPUs are listed with the machine
            same = ", the same one" if split.shared else ""
            lines.append(f"{stage} and its server: {split.training} and {split.server} cores{same}")
    return [_filled(line) for line in lines]


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
