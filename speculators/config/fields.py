"""What a field of the recipe is: whether it is identity, which values it takes, and its value by dotted name.

Each field has a policy, which says whether it enters the key of the stages that declare it:

    semantic      (the default) a different value means a different artifact
    operational   how the work is done, not what comes out: workers, ports, devices, logging
    secret        the *name* of an environment variable; its value is never stored or printed
    if_set        enters the key only when it differs from its neutral default, so that a release can add
                  an option without invalidating what exists

and may have constraints (`positive()`), which are checked when a recipe was composed.

Dotted names (`train.lr`) are the vocabulary: `select` takes them to cut out what a stage may read, and the
same names appear in keys, explanations and errors.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

MISSING: Any = "???"
"""A value that the recipe must give. The same mark as OmegaConf's, which this module does not import."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the value of an option has to satisfy; null always may stand where the type has it."""

    text: str
    """As in `train.epochs=0: must be positive`."""
    holds: Callable[[Any], bool]


def positive() -> Constraint:
    """Above 0."""
    return Constraint("must be positive", lambda value: value > 0)


def at_least(least: int) -> Constraint:
    """`least` or more."""
    text = "must not be negative" if least == 0 else f"must be at least {least}"
    return Constraint(text, lambda value: value >= least)


def non_negative() -> Constraint:
    """0 or more."""
    return at_least(0)


def ratio() -> Constraint:
    """From 0 to 1, both included."""
    return Constraint("must be between 0 and 1", lambda value: 0 <= value <= 1)


def ratio_below_one() -> Constraint:
    """From 0, included, to 1, excluded."""
    return Constraint("must be at least 0 and below 1", lambda value: 0 <= value < 1)


def ratio_above_zero() -> Constraint:
    """From 0, excluded, to 1, included."""
    return Constraint("must be above 0 and at most 1", lambda value: 0 < value <= 1)


def inside_ratio() -> Constraint:
    """From 0 to 1, both excluded."""
    return Constraint("must be above 0 and below 1", lambda value: 0 < value < 1)


def between(low: int, high: int) -> Constraint:
    """From `low` to `high`, both included."""
    return Constraint(f"must be between {low} and {high}", lambda value: low <= value <= high)


def zero_or_above(least: int) -> Constraint:
    """0, which switches it off, or above `least`."""
    return Constraint(f"must be 0 or above {least}", lambda value: value == 0 or value > least)


def not_empty() -> Constraint:
    """A text or list with something in it."""
    return Constraint("must not be empty", lambda value: len(value) > 0)


def each(constraint: Constraint) -> Constraint:
    """A list of values that all satisfy `constraint`."""
    return Constraint(f"every value {constraint.text}", lambda values: all(map(constraint.holds, values)))


def of_length(length: int) -> Constraint:
    """A list of so many values."""
    return Constraint(f"must have {length} values", lambda values: len(values) == length)


_FINITE = Constraint("must be a finite number", lambda value: math.isfinite(value))


def semantic(default: Any, *constraints: Constraint) -> Any:
    """A field that enters the key of every stage that declares it; a plain default is the same without constraints."""
    return _with_policy(default, "semantic", constraints)


def operational(default: Any, *constraints: Constraint) -> Any:
    """A field that never enters a key."""
    return _with_policy(default, "operational", constraints)


def secret(default: str) -> Any:
    """A field that holds the name of an environment variable."""
    return _with_policy(default, "secret")


def if_set(neutral: Any, *constraints: Constraint) -> Any:
    """A field that enters a key only when it is not `neutral`."""
    return _with_policy(neutral, "if_set", constraints)


def _with_policy(default: Any, policy: str, constraints: tuple[Constraint, ...] = ()) -> Any:
    metadata = {"policy": policy, "constraints": constraints}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """What every section of the recipe is. A stage gets the options that it declares, and the others are not set."""

    __slots__ = ()

    def __repr__(self) -> str:
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in _fields(self) if hasattr(self, f.name))
        return f"{type(self).__name__}({', '.join(values)})"

    if not TYPE_CHECKING:  # or mypy would let any name pass

        def __getattr__(self, name: str) -> Any:
            if name not in type(self).__dataclass_fields__:
                raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`")
            raise AttributeError(
                f"`{_section(type(self))}{name}` is not among the options that this stage declares: its key would not "
                "hold it; add it to `reads` of the stage in runner/planning/graph.py"
            )


def _section(cls: type) -> str:
    """The name of a section with its dot, by its class: `speculator.` of every algorithm's; empty of the recipe."""
    name = [c.__name__ for c in cls.__mro__ if c.__name__ not in ("Options", "Stage", "object")][-1].lower()
    return "" if name == "config" else f"{name}."


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def to_plain(value: Any) -> Any:
    """A dataclass, or a container of them, as JSON types; enums become their names, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def select(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The parts of a recipe that `names` ("train", "speculator.target_layer_ids") name, as nested plain values."""
    plain = to_plain(config)
    selected: dict[str, Any] = {}
    for name in names:
        source, into = plain, selected
        *parents, leaf = name.split(".")
        for parent in parents:
            source, into = source[parent], into.setdefault(parent, {})
        into[leaf] = source[leaf]
    return selected


def identity(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What of `names` enters a key: {dotted name: value}, by each field's policy."""
    wanted = tuple(f"{name}." for name in names)
    return {
        name: to_plain(value)
        for name, value, policy, default in leaves(config)
        if f"{name}.".startswith(wanted)
        and (policy == "semantic" or (policy == "if_set" and to_plain(value) != to_plain(default)))
    }


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Every option of a recipe as (dotted name, value, policy, default)."""
    for name, child, f in _options(value, prefix):
        yield name, child, f.metadata.get("policy", "semantic"), _default(f)


def violations(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Every option whose value breaks a constraint, as (dotted name, value, the constraint in words, default)."""
    for name, child, f in _options(value, prefix):
        if child is None:
            continue
        constraints = [*f.metadata.get("constraints", ())]
        if isinstance(child, float):
            constraints.insert(0, _FINITE)
        elif isinstance(child, list) and any(isinstance(item, float) for item in child):
            constraints.insert(0, each(_FINITE))
        for constraint in constraints:
            if not constraint.holds(child):
                yield name, child, constraint.text, _default(f)


def as_override(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else value if isinstance(value, str) else json.dumps(to_plain(value))


def _options(value: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    for f in _fields(value):
        if not hasattr(value, f.name):
            continue
        name, child = f"{prefix}{f.name}", getattr(value, f.name)
        if dataclasses.is_dataclass(child):
            yield from _options(child, f"{name}.")
        elif isinstance(child, dict) and child and all(dataclasses.is_dataclass(v) for v in child.values()):
            for key, item in child.items():
                yield from _options(item, f"{name}.{key}.")
        else:
            yield name, child, f


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return None if f.default is dataclasses.MISSING else f.default
