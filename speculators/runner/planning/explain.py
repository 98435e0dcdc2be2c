"""Why a stage hits or misses: what made its key, against the nearest earlier artifact of that stage, leaf by leaf.

A hit says which run made it, when and with which words. A miss names the very option, input or version that differs; a
changed input names the runs that made the old and the new content. What is outside of the key and differs too (the
machine, the versions of libraries) is told apart: it did not cause anything, but it may explain a different number.
"""

from __future__ import annotations

import functools
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators.errors import RecipeError, closest
from speculators.packages import installed_version
from speculators.runner.planning import key
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.store.artifact import Artifact

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")
"""Noted in the provenance by the stages that load them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One leaf that differs."""

    name: str
    """As a user writes it: `train.lr`, `input tokens`, `service engine`, `version`."""
    old: Any
    new: Any
    made: str = ""
    """For an input: which runs made the old and the new content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What is known about one stage's key."""

    node: str
    state: str
    reason: str
    key: str
    because: str = ""
    """The stage further up that this one really waits for, and its reason."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Of the artifact that is there or comes nearest: key, run, finished, words."""
    changes: list[Change] = field(default_factory=list)
    """From the nearest artifact to what is wanted; empty for a hit."""
    beside: list[Change] = field(default_factory=list)
    """Outside of the key: from what that artifact was made with to what is here."""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    """Everything that is in the key."""


def explain(planner: Planner, name: str) -> Explanation:
    """Explain one node of the plan.

    Raises:
        RecipeError: the recipe has no such stage.
    """
    steps = {step.node.name: step for step in planner.plan()}
    if name not in steps:
        raise RecipeError(f"the recipe has no stage `{name}`", closest(name, steps))
    step = steps[name]
    leaves = key.leaves(step.preimage) if step.preimage else {}
    common: dict[str, Any] = {"node": name, "state": step.state.name, "reason": step.reason, "key": step.key}
    if step.state is State.waits:
        return Explanation(**common, because=_root(step, steps))
    nearest = step.artifact or planner.store.nearest(step.node.kind, step.preimage)
    if nearest is None:
        return Explanation(**common, leaves=leaves)
    changes = [
        Change(name=leaf, old=old, new=new, made=_makers(planner, step, steps, leaf, old))
        for leaf, old, new in key.differences(nearest.preimage, step.preimage)
    ]
    return Explanation(**common, made=_made(nearest), changes=changes, beside=beside(nearest), leaves=leaves)


def _root(step: Step, steps: Mapping[str, Step]) -> str:
    """Follow what is waited for to the stage that can run."""
    while step.state is State.waits:
        step = steps[step.reason.removeprefix("upstream: ")]
    return f"{step.node.name}: {step.reason}"


def _made(artifact: Artifact) -> dict[str, str]:
    provenance = artifact.provenance
    return {
        "key": artifact.key,
        "run": str(provenance.get("run", "")),
        "finished": str(provenance.get("finished", "")),
        "words": " ".join(provenance.get("words", ())),
    }


def _makers(planner: Planner, step: Step, steps: Mapping[str, Step], leaf: str, old: Any) -> str:
    """`RUN -> RUN` for an input whose content changed, as far as the store still knows."""
    upstream = step.node.inputs.get(leaf.removeprefix("input "))
    if not leaf.startswith("input ") or upstream is None:
        return ""
    now = steps[upstream]
    before = next((a for a in planner.store.artifacts(now.node.kind) if a.digest == old), None)
    runs = [a.provenance.get("run", "?") if a else "?" for a in (before, now.artifact)]
    return f"{runs[0]} -> {runs[1]}"


def beside(artifact: Artifact) -> list[Change]:
    """What differs between the machine that made an artifact and this one, outside of every key."""
    made = artifact.provenance | artifact.provenance.get("versions", {})
    return [
        Change(name=name, old=made[name], new=new)
        for name, new in _here().items()
        if name in made and name not in artifact.preimage["packages"] and _public(made[name]) != _public(new)
    ]


@functools.cache
def _here() -> dict[str, Any]:
    """The same facts of this machine."""
    machine = {"host": socket.gethostname(), "python": platform.python_version(), "platform": platform.platform()}
    return {**machine, **libraries()}


def libraries() -> dict[str, str | None]:
    """Their versions here, without the local part; None for one that is not installed."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    return {name: None if version is None else _public(version) for name, version in versions.items()}


def _public(version: Any) -> str:
    """Without the local part: torch calls itself `2.13.0+cpu`, its wheel may not."""
    return str(version).partition("+")[0]
