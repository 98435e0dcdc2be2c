"""Translates exceptions of Hydra and OmegaConf to errors that name the option and the file, with a hint for each."""

from __future__ import annotations

import re
from collections.abc import Iterator

import omegaconf

from speculators.config import foreign_names
from speculators.config.algorithms import SPECULATORS
from speculators.config.fields import MISSING, iter_options
from speculators.config.schema import Config, Dataset
from speculators.config.shipped import available, choices
from speculators.errors import RecipeError, closest

FREE = ("pipeline", "target.chat_template_kwargs")
"""Sections of mappings whose names nothing fixes: an override may add one."""
OPEN = ("data", "run.stages", *FREE)
"""Sections whose keys are defined by the recipe."""


def known_options(near: str = "") -> set[str]:
    """Dotted names that may be overridden, sections included; if `near` is a dataset's option, the dataset's."""
    if near.startswith("data.") and near.count(".") == 2:
        return {f"{near.rpartition('.')[0]}.{name}" for name, *_ in iter_options(Dataset())}
    names = {name for name, *_ in iter_options(Config())}
    for schema in SPECULATORS.values():
        names |= {f"speculator.{name}" for name, *_ in iter_options(schema())}
    return names | {name.rsplit(".", 1)[0] for name in names if "." in name} | {"data", "pipeline"}


def closest_option(name: str, options: set[str]) -> str:
    """Hint for an unknown option: our name for another tool's option, the closest match, or the section's options."""
    if section := next((s for s in OPEN if name.startswith(f"{s}.") and name not in options), ""):
        key, _, option = name.removeprefix(f"{section}.").partition(".")
        if not any(each.startswith(f"{section}.{key}.") for each in options):
            parents = section.split(".")
            nested = "".join(f"{part}: {{" for part in (*parents, key)) + f"{option or 'OPTION'}: VALUE"
            return f"names are added in the recipe: `{nested}{'}' * (len(parents) + 1)}`"
    if hint := foreign_names.hint(name):
        return hint
    names = {option.rstrip("_") for option in options}  # `from`
    section = name.rpartition(".")[0]
    siblings = [option for option in names if option.rpartition(".")[0] == section]
    return closest(name, names, siblings or [option for option in names if "." not in option])


def translated(error: Exception) -> RecipeError:
    """Translate an exception of Hydra or OmegaConf into a message with the option and a hint."""
    chain = list(_chain(error))
    text, cause = "\n".join(str(e) for e in chain), chain[-1]
    name = next((key for e in chain if (key := getattr(e, "full_key", None))), None)
    name = "from" if name == "from_" else name
    file = match[1] if (match := re.search(r"In '([^']+)'", text)) else ""
    where = f"{file}.yaml: " if file and file != "config" else ""
    if match := re.search(r"Could not (?:find|load) '(?:(\w+)/)?([^']+)'", text):
        group, choice = match[1] or "recipe", match[2]
        return RecipeError(
            f"no choice for {group} named `{choice}`",
            closest(choice, available() if group == "recipe" else choices(group)),
        )
    if match := re.search(r"Key '([^']+)' (?:not in|is not in)", text):
        unknown = str(name or match[1])
        if unknown in known_options(unknown):  # of another algorithm: the recipe and the command line choose two
            return RecipeError(
                f"the chosen `speculator` has no option `{unknown}`, which the recipe or the command line sets",
                "choose the algorithm that has it, or a recipe that does not set it",
            )
        return RecipeError(f"there is no option `{unknown}`", closest_option(unknown, known_options(unknown)))
    invalid = next((e for e in chain if isinstance(e, omegaconf.errors.ValidationError)), None)
    if invalid is not None and name and "is not a ListConfig" in str(invalid):
        return RecipeError(f"{where}{name}: must be a list", f"put it into brackets: '{name}=[VALUE]'")
    if invalid is not None and name:
        return RecipeError(
            f"{where}{name}: {first_line(invalid)}", "give a value of the option's type; `--cfg job` shows them all"
        )
    if isinstance(cause, omegaconf.errors.MissingMandatoryValue) or MISSING in text:
        return RecipeError(f"`{name}` has no value", f"set it in the recipe, or add {name}=VALUE")
    unresolved = next((e for e in chain if isinstance(e, omegaconf.errors.InterpolationResolutionError)), None)
    if unresolved is not None:
        return RecipeError(
            f"{name}: {first_line(unresolved)}", "set what it refers to, as in ${oc.env:NAME,DEFAULT}, or give a value"
        )
    return RecipeError(
        f"{where}{first_line(cause)}", "`--cfg job` shows the composed recipe, `--info defaults` its defaults lists"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the original one last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
