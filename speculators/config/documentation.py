"""What each option of a recipe means, read from the schema: the string under a field, its type, default and policy.

Strings under fields are not kept at run time, so they are read from the source; nothing but the schema is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config import foreign_names, shipped
from speculators.config.algorithms import SPECULATORS, Speculator
from speculators.config.fields import to_builtins
from speculators.config.schema import Config
from speculators.errors import RecipeError

GROUPS = ("recipe", "target", "data", "speculator", "pipeline", "hardware", "executor")
"""Options whose values are files: recipes, and the choices in `conf/`."""
KEYED = "NAME"
"""Stands for a key that the recipe defines, as in `data.NAME.source`."""
_UNITS = ("tokens", "seconds", "minutes", "GiB", "characters", "steps", "epochs", "conversations", "requests", "layers")
_UNIT_SUFFIXES = {"gib": "GiB", "ratio": "share", "seconds": "seconds", "tokens": "tokens", "steps": "steps"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionInfo:
    """An option of a recipe."""

    name: str
    type: str
    """`int`, `float or null`, `list of int`, `one of adamw, muon`."""
    default: Any
    """In JSON types."""
    unit: str
    """Empty for a number without a unit, and for everything else."""
    meaning: str
    constraints: list[str]
    policy: str
    """Whether it enters keys: `semantic`, `operational`, `secret` or `if_set`; see `config.fields`."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Meanings of its values, for an enumeration."""
    algorithms: list[str] = field(default_factory=list)
    """The draft algorithms that have it; empty: all."""


@functools.cache
def all_options() -> dict[str, OptionInfo]:
    """Every option by its dotted name, in the order of the schema."""
    options: dict[str, OptionInfo] = {}
    for option in _section(Config, ""):
        options[option.name] = option
        if option.name == f"speculator.{dataclasses.fields(Speculator)[-1].name}":
            options |= _of_algorithms(options)
    return options


def _of_algorithms(of_all: Mapping[str, OptionInfo]) -> dict[str, OptionInfo]:
    """The options that only some draft algorithms have."""
    options: dict[str, OptionInfo] = {}
    for algorithm, schema in SPECULATORS.items():
        for option in _section(schema, "speculator."):
            if option.name not in of_all:
                first = options.get(option.name, option)
                options[option.name] = dataclasses.replace(first, algorithms=[*first.algorithms, algorithm])
    return options


def group_choices(group: str) -> dict[str, str]:
    """The values of an option of `GROUPS`, each with the first comment line of its file."""
    files = shipped.available() if group == "recipe" else shipped.choices(group)
    return {name: shipped.first_comment(path) for name, path in sorted(files.items())}


def find_options(name: str) -> list[OptionInfo]:
    """The options of a section, or the option of this name; the last part of a name suffices where it is unique.

    Raises:
        RecipeError: there is none; the hint has the closest names.
    """
    options = all_options()
    below = [option for full, option in options.items() if f"{full}.".startswith(f"{name}.")]
    ending = [option for full, option in options.items() if full.rpartition(".")[2] == name]
    if below or len(ending) == 1:
        return below or ending
    if ending:
        raise RecipeError(f"several options are named `{name}`", " or ".join(f"`{each.name}`" for each in ending))
    raise RecipeError(f"there is no option `{name}`", foreign_names.hint(name) or _closest_names(name, options))


def _closest_names(name: str, options: Mapping[str, OptionInfo]) -> str:
    import difflib  # imported here because most processes never need it

    sections = dict.fromkeys(full.partition(".")[0] for full in options)
    by_last = {full.rpartition(".")[2]: full for full in options}
    matches = difflib.get_close_matches(name, [*options, *sections, *by_last], n=3, cutoff=0.7)
    close = dict.fromkeys(f"`{by_last.get(match, match)}`" for match in matches)
    return f"did you mean {' or '.join(close)}?" if close else f"sections: {', '.join(sections)}"


def _section(schema: type, prefix: str) -> Iterator[OptionInfo]:
    """The options of a dataclass and of the dataclasses in it."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        hint, name = hints[f.name], f"{prefix}{f.name.rstrip('_')}"
        element = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if dataclasses.is_dataclass(hint):
            yield from _section(typing.cast(type, hint), f"{name}.")
        elif dataclasses.is_dataclass(element):
            yield from _section(typing.cast(type, element), f"{name}.{KEYED}.")
        else:
            yield _option(schema, f, hint, name)


def _option(schema: type, f: dataclasses.Field[Any], hint: Any, name: str) -> OptionInfo:
    meaning = _meaning(schema, f.name)
    enumeration = next((each for each in (hint, *typing.get_args(hint)) if _is_enum(each)), None)
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    return OptionInfo(
        name=name,
        type=_type_text(hint),
        default=to_builtins(default),
        unit=_unit(f.name, hint, meaning),
        meaning=meaning,
        constraints=[constraint.text for constraint in f.metadata.get("constraints", ())],
        policy=f.metadata.get("policy", "semantic"),
        choices={each.name: _meaning(enumeration, each.name) for each in enumeration} if enumeration else {},
    )


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _type_text(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_text(arg) for arg in args)
    if origin is list:
        return f"list of {_type_text(args[0])}"
    if origin is dict:
        return f"{{name: {_type_text(args[1])}}}"
    if _is_enum(hint):
        return f"one of {', '.join(hint.__members__)}"
    return {bool: "true or false", str: "text"}.get(hint) or getattr(hint, "__name__", str(hint)).lower()


def _unit(name: str, hint: Any, meaning: str) -> str:
    """The unit of a number, from its meaning (`..., in tokens`, `Seconds before ...`) or its name (`quota_gib`)."""
    if not {int, float} & {hint, *typing.get_args(hint)}:
        return ""
    if match := re.search(rf"\bin ({'|'.join(_UNITS)})\b", meaning):
        return match[1]
    first, sentence = meaning.partition(" ")[0], meaning.partition(". ")[0].lower()
    if name.endswith("_ratio") or (float in (hint, *typing.get_args(hint)) and "share of" in sentence):
        return "share, 0 to 1"
    return next((u for u in _UNITS if first.lower() == u), "") or _UNIT_SUFFIXES.get(name.rpartition("_")[2], "")


def _meaning(schema: type, name: str) -> str:
    """The string under a field or an enumeration's value, of the class or the base class that defines it."""
    for cls in schema.__mro__:
        if meaning := _strings(cls.__module__).get(cls.__name__, {}).get(name):
            return meaning
    return ""


@functools.cache
def _strings(module: str) -> dict[str, dict[str, str]]:
    """The strings under assignments, by class and name, in the source of a module of the schema."""
    file = getattr(sys.modules[module], "__file__", None) if module.startswith("speculators.") else None
    if file is None:
        return {}
    strings: dict[str, dict[str, str]] = {}
    for cls in ast.parse(Path(file).read_text()).body:
        if isinstance(cls, ast.ClassDef):
            strings[cls.name] = dict(_strings_of(cls))
    return strings


def _strings_of(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, below in zip(cls.body, cls.body[1:], strict=False):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield target.id, " ".join(str(below.value.value).split())
