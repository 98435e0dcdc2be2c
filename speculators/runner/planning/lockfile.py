"""`<recipe>.lock.json`: what a recipe came to on the day it was locked, and whether it still comes to that.

It holds, for every node, what its key is made of (options, versions, the resolved source, the digests of inputs) and
the key itself, as far as they were known: a stage whose input was not made yet has no key. What only one side knows is
no difference, so that a lock written beside a full store can be held against an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning import graph, key
from speculators.runner.planning.explain import libraries
from speculators.runner.planning.plan import Planner

FORMAT = 1
"""Raised when an older release could not read the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One field in which the lock and the recipe differ."""

    name: str
    """As a user writes it: `train.lr`, `target.source.revision`, `version`, `input tokens`, `package torch`."""
    old: Any
    new: Any
    stages: tuple[str, ...]
    """Where it counts; empty for what belongs to no stage."""


def place(config: Config) -> Path:
    """The recipe's lock, in the working directory."""
    return Path(f"{config.recipe}.lock.json")


def resolved(planner: Planner) -> dict[str, Any]:
    """The lock of what is planned, as plain values."""
    steps = planner.plan()
    digests = {step.node.name: step.digest for step in steps if step.digest}
    stages = {
        step.node.name: {
            "stage": step.node.kind,
            "wiring": dict(step.node.inputs),
            "key": step.key or None,
            "in_key": _leaves(planner, step.node, digests),
        }
        for step in steps
        if step.node.part is None  # into how many parts the work is cut is not what comes out
    }
    return {"format": FORMAT, "recipe": planner.config.recipe, "packages": libraries(), "stages": stages}


def read(config: Config) -> dict[str, Any] | None:
    """The recipe's lock, None if there is none.

    Raises:
        RecipeError: it cannot be read.
    """
    path, hint = place(config), f"write it anew: speculators-run lock recipe={config.recipe}"
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        if plain["format"] != FORMAT:
            raise RecipeError(f"{path} is of format {plain['format']}, this release reads {FORMAT}", hint)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", hint) from None
    return plain


def differences(locked: Mapping[str, Any], planner: Planner) -> list[Difference]:
    """Every field that the lock says otherwise, a field that several stages read once."""
    now = resolved(planner)
    whole = graph.build(planner.config) if planner.config.until or planner.config.only else planner.graph
    found: dict[str, Difference] = {}
    for node, name, old, new in _compared(locked, now, set(whole)):
        token = key.canonical([name, old, new])
        before = found[token].stages if token in found else ()
        found[token] = Difference(name=name, old=old, new=new, stages=(*before, node) if node else ())
    return list(found.values())


def refuse_if_different(planner: Planner) -> None:
    """What `run.locked=true` asks for.

    Raises:
        RecipeError: there is no lock, or it says something else; each field with its old and its new value.
    """
    config = planner.config
    locked = read(config)
    if locked is None:
        raise RecipeError(
            f"run.locked: there is no {place(config)} in the working directory",
            f"write it: speculators-run lock recipe={config.recipe}",
        )
    if found := differences(locked, planner):
        lines = [f"  {d.name}  {_short(d.old)} -> {_short(d.new)}{_where(d)}" for d in found]
        raise RecipeError(
            f"run.locked: {place(config)} says otherwise\n\n" + "\n".join(lines),
            f"take the change back, or lock it: speculators-run lock recipe={config.recipe}",
        )


def _compared(
    locked: Mapping[str, Any], now: Mapping[str, Any], nodes: set[str]
) -> Iterator[tuple[str, str, Any, Any]]:
    """(node, field, old, new) of all that differs."""
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
        yield node, "key", old["key"], new["key"]  # by another scheme


def _leaves(planner: Planner, node: graph.Node, digests: Mapping[str, str]) -> dict[str, Any]:
    """What is in a node's key; of a source every part apart, by the name of its option."""
    leaves = key.leaves(planner.known(node.name, digests))
    source = leaves.pop("source", None)
    if isinstance(source, dict):
        section = f"data.{node.name.removeprefix('dataset.')}" if node.name != graph.TARGET else node.name
        leaves |= {f"{section}.source.{part}": value for part, value in source.items()}
    return leaves


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else key.canonical(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _where(difference: Difference) -> str:
    return f"  ({', '.join(difference.stages)})" if difference.stages else ""
