"""Fields of the recipe's schema: their policies, their constraints, and access to their values by dotted name.

The policy of a field determines whether its value enters the cache keys of the stages that declare it:

    semantic      (the default) a different value means a different artifact
    operational   affects how the work is done, not its result: workers, ports, devices, logging
    secret        holds the *name* of an environment variable, whose value is never stored or printed
    if_set        enters the key only when it differs from its neutral default, so that a release can add
                  an option without invalidating existing artifacts

A field may have constraints (`positive()`), which are checked after a recipe is composed. `select`, keys, explanations
and messages refer to a field by its dotted name (`train.lr`).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

MISSING: Any = "???"
"""Default of an option without which a recipe is incomplete; equal to OmegaConf's, which is not imported here."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A condition on the value of an option; it is not applied to null."""

    text: str
    """The condition in a message: `train.epochs=0: must be positive`."""
    holds: Callable[[Any], bool]


def positive() -> Constraint:
    """Value > 0."""
    return Constraint("must be positive", lambda value: value > 0)


def at_least(least: int) -> Constraint:
    """Value >= `least`."""
    text = "must not be negative" if least == 0 else f"must be at least {least}"
    return Constraint(text, lambda value: value >= least)


def non_negative() -> Constraint:
    """Value >= 0."""
    return at_least(0)


def ratio() -> Constraint:
    """0 <= value <= 1."""
    return Constraint("must be between 0 and 1", lambda value: 0 <= value <= 1)


def ratio_below_one() -> Constraint:
    """0 <= value < 1."""
    return Constraint("must be at least 0 and below 1", lambda value: 0 <= value < 1)


def ratio_above_zero() -> Constraint:
    """0 < value <= 1."""
    return Constraint("must be above 0 and at most 1", lambda value: 0 < value <= 1)


def inside_ratio() -> Constraint:
    """0 < value < 1."""
    return Constraint("must be above 0 and below 1", lambda value: 0 < value < 1)


def between(low: int, high: int) -> Constraint:
    """`low` <= value <= `high`."""
    return Constraint(f"must be between {low} and {high}", lambda value: low <= value <= high)


def zero_or_above(least: int) -> Constraint:
    """Value = 0, which switches the option off, or value > `least`."""
    return Constraint(f"must be 0 or above {least}", lambda value: value == 0 or value > least)


def not_empty() -> Constraint:
    """A string or list that is not empty."""
    return Constraint("must not be empty", lambda value: len(value) > 0)


def each(constraint: Constraint) -> Constraint:
    """A list whose values all satisfy `constraint`."""
    return Constraint(f"every value {constraint.text}", lambda values: all(map(constraint.holds, values)))


def of_length(length: int) -> Constraint:
    """A list of `length` values."""
    return Constraint(f"must have {length} values", lambda values: len(values) == length)


def chat_roles() -> Constraint:
    """A mapping to roles of chat templates."""
    roles = ("system", "developer", "user", "assistant", "tool")
    return Constraint(f"roles are {', '.join(roles)}", lambda value: set(value.values()) <= set(roles))


def matches(pattern: str, text: str) -> Constraint:
    """A string that `pattern` matches completely; `text` describes it: `must be HOST:PORT`."""
    return Constraint(text, lambda value: re.fullmatch(pattern, value) is not None)


def seed() -> Constraint:
    """A seed of random numbers, as torch and vLLM take it."""
    return Constraint(f"must be between 0 and {_LARGEST}", lambda value: 0 <= value <= _LARGEST)


def http_url() -> Constraint:
    """Empty, or the URL of a server."""
    return Constraint("must be http://HOST:PORT", lambda value: not value or _is_http_url(value))


def _is_http_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        bare = not (parts.query or parts.fragment or re.search(r"\s", value))
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and bare
    except ValueError:  # a port that is no number, or too large
        return False


def server_address(url: str) -> tuple[str, int, str]:
    """Host, port and path of a checked URL, by which equal servers are recognized however they are written."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in ("localhost", "::1") else parts.hostname or ""
    return host, parts.port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


_LARGEST = 2**63 - 1
_FINITE = Constraint("must be a finite number", lambda value: math.isfinite(value))
_SIXTY_FOUR_BITS = Constraint("must be an integer of 64 bits", lambda value: -_LARGEST <= value <= _LARGEST)


def semantic(default: Any, *constraints: Constraint) -> Any:
    """A field that enters keys. A field with a bare default is semantic too, without constraints."""
    return _with_policy(default, "semantic", constraints)


def operational(default: Any, *constraints: Constraint) -> Any:
    """A field that never enters keys."""
    return _with_policy(default, "operational", constraints)


def secret(default: str) -> Any:
    """A field that holds the name of an environment variable."""
    return _with_policy(default, "secret")


def if_set(neutral: Any, *constraints: Constraint) -> Any:
    """A field that enters keys only when it differs from `neutral`, its default."""
    return _with_policy(neutral, "if_set", constraints)


def _with_policy(default: Any, policy: str, constraints: tuple[Constraint, ...] = ()) -> Any:
    metadata = {"policy": policy, "constraints": constraints}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base class of the recipe's sections. In a stage only the options that it declares are set."""

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
    """The dotted prefix of a section, by its class: `speculator.` for every algorithm, empty for the recipe."""
    base_classes = ("Options", "StageOptions", "object")
    name = [c.__name__ for c in cls.__mro__ if c.__name__ not in base_classes][-1].removesuffix("Options").lower()
    return "" if name == "config" else f"{name}."


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def to_builtins(value: Any) -> Any:
    """Convert dataclasses, and containers of them, to JSON types; enums become their names, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_builtins(getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)
        }
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(k): to_builtins(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtins(v) for v in value]
    return value


def select(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The options and sections `names` ("train", "speculator.target_layer_ids") of a recipe, as nested JSON types."""
    values = to_builtins(config)
    selected: dict[str, Any] = {}
    for name in names:
        source, into = values, selected
        *parents, option = name.split(".")
        for parent in parents:
            source, into = source[parent], into.setdefault(parent, {})
        into[option] = source[option]
    return selected


def identity(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The options below `names` that enter a key by their policies, as {dotted name: value in JSON types}."""
    prefixes = tuple(f"{name}." for name in names)
    return {
        name: to_builtins(value)
        for name, value, policy, default in iter_options(config)
        if f"{name}.".startswith(prefixes)
        and (policy == "semantic" or (policy == "if_set" and to_builtins(value) != to_builtins(default)))
    }


def iter_options(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Iterate over a recipe's options as (dotted name, value, policy, default)."""
    for name, child, f in _options(value, prefix):
        yield name, child, f.metadata.get("policy", "semantic"), _default(f)


def violations(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Iterate over broken constraints as (dotted name, value, text of the constraint, default)."""
    for name, child, f in _options(value, prefix):
        if child is None:
            continue
        items = child if isinstance(child, list) else [child]
        general = [c for t, c in ((float, _FINITE), (int, _SIXTY_FOUR_BITS)) if any(isinstance(i, t) for i in items)]
        general = [each(constraint) for constraint in general] if items is child else general
        for constraint in (*general, *f.metadata.get("constraints", ())):
            if not constraint.holds(child):
                yield name, child, constraint.text, _default(f)


def as_override(value: Any) -> str:
    """Format a value for the command line."""
    if isinstance(value, str):
        return value or "''"
    return "null" if value is None else json.dumps(to_builtins(value))


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
