"""Explain a cache hit or miss of a stage by comparing its preimage with that of the nearest earlier artifact.

A hit names the run that made the artifact, its time and overrides. A miss names each option, input or version that
differs, and for an input the runs that made its old and new content. Differences outside the key (the machine, library
versions) are listed separately: they do not cause a miss, but may explain a different measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators.packages import installed_version, public_version
from speculators.runner.planning import graph, key
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.store.artifact import Artifact

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")
"""Libraries whose versions are recorded in the provenance of stages that load them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A value that differs."""

    name: str
    """Name in messages: `train.lr`, `input tokens`, `service engine`, `version`."""
    old: Any
    new: Any
    runs: str = ""
    """For an input: the runs that made the old and the new content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The explanation of a stage's key."""

    node: str
    state: str
    reason: str
    key: str
    because: str = ""
    """For a stage that waits: the stage that must run first, and its reason."""
    nearest: Mapping[str, str] = field(default_factory=dict)
    """The stage's artifact, or the nearest earlier one: key, run, finished, words (the overrides)."""
    changes: list[Change] = field(default_factory=list)
    """Differences from the nearest artifact's preimage; empty for a hit."""
    outside_the_key: list[Change] = field(default_factory=list)
    """Differences between the machine that made that artifact and this one, outside the key."""
    key_values: Mapping[str, Any] = field(default_factory=dict)
    """All values in the key."""


_JSON_NAMES = {"runs": "made", "nearest": "made", "key_values": "leaves"}


def to_json(value: Change | Explanation) -> dict[str, Any]:
    """Convert to JSON types, with the field names of `plan --json` and `explain --json`."""
    return dataclasses.asdict(value, dict_factory=lambda items: {_JSON_NAMES.get(n, n): v for n, v in items})


def explain_stage(planner: Planner, name: str) -> Explanation:
    """Explain a node of the plan, by its name or kind.

    Raises:
        RecipeError: as `graph.find_node`.
    """
    steps = {step.node.name: step for step in planner.plan()}
    name = graph.find_node({node: step.node for node, step in steps.items()}, name)
    step = steps[name]
    key_values = key.flatten_preimage(step.preimage) if step.preimage else {}
    common: dict[str, Any] = {"node": name, "state": step.state.name, "reason": step.reason, "key": step.key}
    if step.state is State.waits:
        return Explanation(**common, because=_root(step, steps))
    nearest = step.artifact or planner.store.nearest(step.node.kind, step.preimage)
    if nearest is None or not key.is_related(nearest.preimage, step.preimage):
        return Explanation(**common, key_values=key_values)
    changes = [
        Change(name=value, old=old, new=new, runs=_runs(planner, step, steps, value, old))
        for value, old, new in key.preimage_differences(nearest.preimage, step.preimage)
    ]
    return Explanation(
        **common,
        nearest=_origin(nearest),
        changes=changes,
        outside_the_key=changes_outside_key(nearest),
        key_values=key_values,
    )


def _root(step: Step, steps: Mapping[str, Step]) -> str:
    """Follow the stages that wait to the one that can run."""
    while step.state is State.waits:
        step = steps[step.reason.removeprefix("upstream: ").partition(";")[0]]
    return f"{step.node.name}: {step.reason}"


def _origin(artifact: Artifact) -> dict[str, str]:
    provenance = artifact.provenance
    return {
        "key": artifact.key,
        "run": str(provenance.get("run", "")),
        "finished": str(provenance.get("finished", "")),
        "words": " ".join(provenance.get("words", ())),
    }


def _runs(planner: Planner, step: Step, steps: Mapping[str, Step], name: str, old: Any) -> str:
    """`RUN -> RUN` for an input whose content changed; `?` where the store no longer has the artifact."""
    upstream = step.node.inputs.get(name.removeprefix("input "))
    if not name.startswith("input ") or upstream is None:
        return ""
    now = steps[upstream]
    before = next((a for a in planner.store.artifacts(now.node.kind) if a.digest == old), None)
    runs = [a.provenance.get("run", "?") if a else "?" for a in (before, now.artifact)]
    return f"{runs[0]} -> {runs[1]}"


def changes_outside_key(artifact: Artifact) -> list[Change]:
    """Differences between the machine that made an artifact and this one, outside the key."""
    origin = artifact.provenance | artifact.provenance.get("versions", {})
    return [
        Change(name=name, old=origin[name], new=new)
        for name, new in _this_machine().items()
        if name in origin
        and name not in artifact.preimage["packages"]
        and public_version(str(origin[name])) != public_version(str(new))
    ]


@functools.cache
def _this_machine() -> dict[str, Any]:
    """The values of this machine that are compared with an artifact's provenance."""
    machine = {"host": socket.gethostname(), "python": platform.python_version(), "platform": platform.platform()}
    return {**machine, **libraries()}


def libraries() -> dict[str, str | None]:
    """Public versions of `LIBRARIES`; None for one that is not installed."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    return {name: None if version is None else public_version(version) for name, version in versions.items()}
