"""Translates exceptions of Hydra and OmegaConf to errors that name the option and the file, with a hint for each."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import omegaconf

from speculators.config import foreign_names
from speculators.config.algorithms import SPECULATORS
from speculators.config.execution import StageLimits
from speculators.config.fields import MISSING, as_override, iter_options
from speculators.config.schema import Config, Dataset
from speculators.config.shipped import available, choices
from speculators.errors import RecipeError, closest

OPEN = {
    "data": "data: {NAME: {source: FILE, format: messages}}",
    "pipeline": "pipeline: {NODE: {INPUT: NODE}}",
    "target.chat_template_kwargs": "target: {chat_template_kwargs: {NAME: VALUE}}",
    "run.stages": "run: {stages: {train: {time_limit: 7200}}}",
}
"""Sections whose keys are defined by the recipe, with an example of each."""
ITEMS = {"data": Dataset, "run.stages": StageLimits}
"""What the keys of an open section stand for."""


def known_options(near: str = "") -> set[str]:
    """Dotted names that may be overridden, sections included; those of one item if `near` is an option of `ITEMS`."""
    for section, schema in ITEMS.items():
        # `data.NAME.source`: the section, the item's key and one of its options.
        if near.startswith(f"{section}.") and near.count(".") == section.count(".") + 2:
            return {f"{near.rpartition('.')[0]}.{name}" for name, *_ in iter_options(schema())}
    names = {name for name, *_ in iter_options(Config())}
    for schema in SPECULATORS.values():
        names |= {f"speculator.{name}" for name, *_ in iter_options(schema())}
    return names | {name.rsplit(".", 1)[0] for name in names if "." in name} | {"data", "pipeline"}


@functools.cache
def sections() -> set[str]:
    """Dotted names of the options that are mappings."""
    return {name.rsplit(".", 1)[0] for name in known_options() if "." in name} | {*OPEN, "hydra"}


def wrong_section(name: str, value: object, file: str = "") -> RecipeError:
    """The error for a section that is no mapping."""
    listed = f"`speculators-run options {name.partition('.')[0]}` lists them"
    hint = f"`{OPEN[name]}`" if name in OPEN else f"set its options: {name}.OPTION=VALUE; {listed}"
    if choices(name) and name not in OPEN:
        hint = f"choose by `override /{name}: {next(iter(choices(name)))}` in `defaults`; or {hint}"
    where = f"{file}: " if file else ""
    return RecipeError(f"{where}{name}={as_override(value)}: must be a mapping of options", hint)


def closest_option(name: str, options: set[str]) -> str:
    """Hint for an unknown option: our name for another tool's option, the closest match, or the section's options."""
    if any(name.startswith(f"{s}.") and name.count(".") == s.count(".") + 1 for s in ITEMS):
        return f"`{name}.OPTION=VALUE` adds it"
    if hint := foreign_names.hint(name):
        return hint
    names = {option.rstrip("_") for option in options}  # `from`
    last = name.rpartition(".")[2]
    if of_sections := sorted(option for option in names if option.endswith(f".{last}")):
        return f"did you mean {' or '.join(f'`{option}`' for option in of_sections)}?"
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
    if match := re.search(r"Key '([^']*)' (?:not in|is not in)", text):
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
    """First line with text of an exception's message; without one, the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
