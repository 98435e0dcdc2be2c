"""`<recipe>.lock.json`: everything that a recipe resolves to, to detect later changes.

It contains the commits of the revisions that the recipe names, which later commands use instead of asking the hub. For
every node it contains the key and the values in it (options, versions, the resolved source, digests of inputs); a
stage whose input does not exist yet has no key. A value that only the lock or only the plan knows is no difference, so
that a lock written with a full store can be compared with an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning import graph, key
from speculators.runner.planning.explain import libraries
from speculators.runner.planning.plan import Planner
from speculators.runner.planning.sources import lock_path

FORMAT = 1
"""Format version; raised when older releases cannot read the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A value in which the lock and the recipe differ."""

    name: str
    """Name in messages: `train.lr`, `target.source.revision`, `version`, `input tokens`, `package torch`."""
    old: Any
    new: Any
    stages: tuple[str, ...]
    """Stages that read it; empty for values of no stage."""


def lock_contents(planner: Planner) -> dict[str, Any]:
    """Contents of the lock for the current plan, as JSON types."""
    steps = planner.plan()
    digests = {step.node.name: step.digest for step in steps if step.digest}
    stages = {
        step.node.name: {
            "stage": step.node.kind,
            "wiring": dict(step.node.inputs),
            "key": step.key or None,
            "in_key": _key_values(planner, step.node, digests),
        }
        for step in steps
        if step.node.part is None  # the number of workers does not affect the output
    }
    return {
        "format": FORMAT,
        "recipe": planner.config.recipe,
        "packages": libraries(),
        "revisions": planner.hub.resolved,
        "stages": stages,
    }


def load_lock(config: Config) -> dict[str, Any] | None:
    """Read the recipe's lock; None if there is none.

    Raises:
        RecipeError: the file cannot be read.
    """
    path, hint = lock_path(config.recipe), f"write it again: speculators-run lock recipe={config.recipe}"
    try:
        contents: dict[str, Any] = json.loads(path.read_text())
        if contents["format"] != FORMAT:
            raise RecipeError(f"{path} has format {contents['format']}, this release reads {FORMAT}", hint)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", hint) from None
    return contents


def lock_differences(locked: Mapping[str, Any], planner: Planner) -> list[Difference]:
    """Values in which lock and plan differ; a value that several stages read is listed once."""
    now = lock_contents(planner)
    all_nodes = graph.build(planner.config) if planner.config.until or planner.config.only else planner.graph
    by_value: dict[str, Difference] = {}
    for node, name, old, new in _compared(locked, now, set(all_nodes)):
        token = key.canonical([name, old, new])
        before = by_value[token].stages if token in by_value else ()
        by_value[token] = Difference(name=name, old=old, new=new, stages=(*before, node) if node else ())
    return list(by_value.values())


def refuse_if_different(planner: Planner) -> None:
    """Implement `run.locked=true`: refuse to run if anything differs from the lock.

    Raises:
        RecipeError: there is no lock, or values differ, each listed with its old and new value.
    """
    config = planner.config
    locked = load_lock(config)
    if locked is None:
        raise RecipeError(
            f"run.locked: there is no {lock_path(config.recipe)} in the working directory",
            f"write it: speculators-run lock recipe={config.recipe}",
        )
    if differences := lock_differences(locked, planner):
        lines = [f"  {d.name}  {_short(d.old)} -> {_short(d.new)}{_where(d)}" for d in differences]
        raise RecipeError(
            f"run.locked: the recipe differs from {lock_path(config.recipe)}\n\n" + "\n".join(lines),
            f"undo the change, or lock it: speculators-run lock recipe={config.recipe}",
        )


def _compared(
    locked: Mapping[str, Any], now: Mapping[str, Any], nodes: set[str]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (node, name, old, new) for each value that differs."""
    for name in sorted({*locked["packages"], *now["packages"]}):
        old, new = locked["packages"].get(name), now["packages"].get(name)
        if None not in (old, new) and old != new:
            yield "", f"package {name}", old, new
    for node in sorted({*locked["stages"], *nodes}):
        old, new = locked["stages"].get(node), now["stages"].get(node)
        if old is None or node not in nodes:
            yield "", f"pipeline.{node}", old and old["stage"], new and new["stage"]
        elif new is not None:  # else `until` or `only` leaves it out
            yield from _compared_stages(node, old, new)


def _compared_stages(node: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    if old["stage"] != new["stage"]:
        yield "", f"pipeline.{node}.uses", old["stage"], new["stage"]
        return
    same = True
    for slot in sorted({*old["wiring"], *new["wiring"]}):
        one, other = old["wiring"].get(slot), new["wiring"].get(slot)
        if one != other:
            same = False
            yield "", f"pipeline.{node}.{slot}", one, other
    for name in sorted({*old["in_key"], *new["in_key"]}):
        one, other = old["in_key"].get(name), new["in_key"].get(name)
        unknown = None in (one, other) and (name.startswith("input ") or name in graph.KINDS[new["stage"]].derived)
        if one != other and not unknown:
            same = False
            yield node, name, one, other
    if same and None not in (old["key"], new["key"]) and old["key"] != new["key"]:
        yield node, "key", old["key"], new["key"]  # keys of another scheme


def _key_values(planner: Planner, node: graph.Node, digests: Mapping[str, str]) -> dict[str, Any]:
    """The values in a node's key, by name; a source is split into its parts."""
    values = key.flatten_preimage(planner.known(node.name, digests))
    source = values.pop("source", None)
    if isinstance(source, dict):
        section = f"data.{node.name.removeprefix('dataset.')}" if node.name != graph.TARGET else node.name
        values |= {f"{section}.source.{part}": value for part, value in source.items()}
    return values


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else key.canonical(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _where(difference: Difference) -> str:
    return f"  ({', '.join(difference.stages)})" if difference.stages else ""
