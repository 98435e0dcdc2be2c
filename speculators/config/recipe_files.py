"""Reads the files of recipes, and refuses in each what Hydra's merging would report without its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from speculators.config.translation import first_line, sections, wrong_section
from speculators.errors import RecipeError, closest
from speculators.runner.planning.sources import relative_to


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe's file; relative paths in it are relative to the file's directory.

    Raises:
        RecipeError: it is not a YAML mapping, or one of its sections is none.
    """
    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        hint = f"fix the YAML at line {mark.line + 1}" if mark else "fix the YAML"
        raise RecipeError(f"{path.name} is not YAML: {first_line(error)}", hint) from None
    if not isinstance(node, dict):
        raise RecipeError(f"{path.name} is not a YAML mapping", "write options as `train: {lr: 1e-3}`")
    defaults = node.get("defaults") or []
    if not isinstance(defaults, list):
        raise RecipeError(f"{path.name}: `defaults` is not a list", "defaults: [override /speculator: eagle3]")
    for entry in defaults:
        if not isinstance(entry, str) and not (isinstance(entry, dict) and _names_choices(entry)):
            raise RecipeError(
                f"{path.name}: `defaults` has {entry!r}, which names no choice",
                "an entry is `override /speculator: eagle3`, `/recipe/NAME` or `_self_`",
            )
    _check_sections(node, path.name)
    if isinstance(node.get("force"), str):
        node["force"] = [node["force"]]
    if "from" in node:
        node["from_"] = node.pop("from")  # `from` cannot be the name of a field
    evaluate = node["evaluate"] if isinstance(node.get("evaluate"), dict) else {}  # an interpolation
    datasets = evaluate.get("datasets")
    if isinstance(datasets, dict):  # a mapping, as `data` is one
        evaluate["datasets"] = datasets = [datasets]
    items = datasets if isinstance(datasets, list) else []
    definitions = [*(item.values() for item in [node.get("data"), *items] if isinstance(item, dict))]
    for section in (node.get("target"), *(section for group in definitions for section in group)):
        if isinstance(section, dict) and isinstance(section.get("source"), str):
            model = section is node.get("target")
            section["source"] = relative_to(path.absolute().parent, section["source"], model=model)
    if isinstance(draft := evaluate.get("draft"), str) and draft:
        evaluate["draft"] = relative_to(path.absolute().parent, draft, model=True)
    return node


def _names_choices(entry: dict[Any, Any]) -> bool:
    """Whether the values of an entry of a defaults list are names of choices, lists of such names or null."""
    return all(isinstance(value, str | list | None) for value in entry.values())


def _check_sections(node: dict[Any, Any], file: str, prefix: str = "") -> None:
    """Raise RecipeError for a section that is no mapping and no interpolation of one."""
    for name, value in node.items():
        if f"{prefix}{name}" not in sections() or (isinstance(value, str) and "${" in value):
            continue
        if not isinstance(value, dict):
            raise wrong_section(f"{prefix}{name}", value, file)
        _check_sections(value, file, f"{prefix}{name}.")


def quoted(recipe: str) -> str:
    """The name of a recipe as an override: one that Hydra's grammar would not read as a name is quoted."""
    is_name = re.fullmatch(r"[A-Za-z_][\w.-]*", recipe, re.ASCII) and recipe.lower() not in ("null", "true", "false")
    escaped = recipe.replace("'", r"\'")
    return recipe if is_name else f"'{escaped}'"


def bases(node: Mapping[str, Any], path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The names of the recipes that a recipe's defaults list names; those in its own directory are added to `known`."""
    for entry in node.get("defaults") or []:
        entry = entry.get("/recipe") if isinstance(entry, dict) else entry
        name = entry.removeprefix("/recipe/") if isinstance(entry, str) else ""
        sibling = path.parent / f"{name}.yaml"
        if name and name not in known and sibling.is_file():
            known[name] = sibling
        if name in known:
            yield name


def refuse_circles(bases_by_name: Mapping[str, list[str]]) -> None:
    """Check that no recipe builds on itself, which Hydra would follow without an end.

    Raises:
        RecipeError: one does.
    """

    def follow(path: list[str]) -> None:
        for base in bases_by_name[path[-1]]:
            if base in path:
                circle = " -> ".join([*path[path.index(base) :], base])
                raise RecipeError(
                    f"{path[-1]}.yaml: `defaults` names {base}, and the recipes build on each other: {circle}",
                    f"remove {base} from the defaults of {path[-1]}.yaml",
                )
            follow([*path, base])

    for name in bases_by_name:
        follow([name])


def by_name(recipe: str, known: dict[str, Path]) -> str:
    """The name of a recipe given by name or by path; a path is added to `known`.

    Raises:
        RecipeError: there is no file at the path.
    """
    if not recipe.endswith((".yaml", ".yml")):
        return recipe
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise RecipeError(f"no recipe at `{recipe}`", closest(path.stem, known))
    known[path.stem] = path
    return path.stem
