"""What a field of the recipe is: whether it is identity, and its value by dotted name.

Each field has a policy, which says whether it enters the key of the stages that declare it:

    semantic      (the default) a different value means a different artifact
    operational   how the work is done, not what comes out: workers, ports, devices, logging
    secret        the *name* of an environment variable; its value is never stored or printed
    if_set        enters the key only when it differs from its neutral default, so that a release can add
                  an option without invalidating what exists

Dotted names (`train.lr`) are the vocabulary: `select` takes them to cut out what a stage may read, and the
same names appear in keys, explanations and errors.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

MISSING: Any = "???"
"""A value that the recipe must give. The same mark as OmegaConf's, which this module does not import."""


def operational(default: Any) -> Any:
    """A field that never enters a key."""
    return _with_policy(default, "operational")


def secret(default: str) -> Any:
    """A field that holds the name of an environment variable."""
    return _with_policy(default, "secret")


def if_set(neutral: Any) -> Any:
    """A field that enters a key only when it is not `neutral`."""
    return _with_policy(neutral, "if_set")


def _with_policy(default: Any, policy: str) -> Any:
    metadata = {"policy": policy}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    for f in dataclasses.fields(value):
        if not hasattr(value, f.name):
            continue
        name, child, policy = f"{prefix}{f.name}", getattr(value, f.name), f.metadata.get("policy", "semantic")
        if dataclasses.is_dataclass(child):
            yield from leaves(child, f"{name}.")
        elif isinstance(child, dict) and child and all(dataclasses.is_dataclass(v) for v in child.values()):
            for key, item in child.items():
                yield from leaves(item, f"{name}.{key}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else None
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            yield name, child, policy, default
