"""options, recipes: what a recipe may set, and which recipes there are."""

from __future__ import annotations

import dataclasses
import json
import textwrap

from speculators import ui
from speculators.config import documentation, shipped
from speculators.config.documentation import GROUPS, OptionInfo
from speculators.config.fields import MISSING, as_override
from speculators.errors import RecipeError
from speculators.verbs import usage

_KEY = {
    "semantic": "yes: another value makes another artifact",
    "if_set": "only if it differs from the default",
    "operational": "no: it changes how the work is done, not its result",
    "secret": "no: the name of an environment variable, whose value is never stored",
}
"""Whether an option enters keys, by policy."""
_SHORT_KEY = {"semantic": "in keys", "if_set": "in keys if set", "operational": "", "secret": "secret"}


def options(argv: list[str]) -> int:
    """Print all options, those of a section, or one with all that is known of it."""
    arguments = usage.parse("options", argv)
    if len(arguments.names) > 1:
        raise RecipeError("options takes one section or option", "speculators-run options train")
    name = arguments.names[0].rstrip("=.") if arguments.names else ""
    selected = documentation.find_options(name) if name else list(documentation.all_options().values())
    if arguments.as_json:
        print(json.dumps([dataclasses.asdict(option) for option in selected], indent=1))
    elif len(selected) == 1:
        print(_full(selected[0]))
    else:
        print(_section(selected, name) if name else _list(selected))
    return 0


def recipes(argv: list[str]) -> int:
    """List the recipes with the first line of their comments."""
    arguments = usage.parse("recipes", argv)
    paths = shipped.available()
    rows = [
        {"name": name, "summary": shipped.first_comment(path), "path": str(path)}
        for name, path in sorted(paths.items())
    ]
    if arguments.as_json:
        print(json.dumps(rows, indent=1))
    else:
        local = {row["name"]: "./recipes" for row in rows if not row["path"].startswith(str(shipped.RECIPES))}
        print(ui.listing((row["name"], local.get(row["name"], "shipped"), row["summary"]) for row in rows))
        ui.narrate("run one", "speculators-run recipe=NAME")
    return 0


def _list(selected: list[OptionInfo]) -> str:
    """A line for each option: `NAME=DEFAULT` and the beginning of its meaning; config groups first."""
    rows = [(f"{group}=NAME", f"one of {', '.join(documentation.group_choices(group))}") for group in GROUPS]
    rows += [(f"{option.name}={_default(option)}", option.meaning.partition(". ")[0]) for option in selected]
    wide = min(34, max(len(assignment) for assignment, _ in rows))
    space = ui.width() - wide - 2
    lines = []
    for assignment, meaning in rows:
        lines += [assignment] if len(assignment) > wide else []
        text = textwrap.shorten(meaning.rstrip("."), space, placeholder=" ...")
        lines.append(f"{assignment if len(assignment) <= wide else '':<{wide}}  {text}".rstrip())
    return "\n".join([*lines, "", "speculators-run options SECTION|NAME prints all that is known of them"])


def _section(selected: list[OptionInfo], section: str) -> str:
    """The options of a section with type, policy and full meaning."""
    lines = []
    if section in GROUPS:
        lines += [f"{section}=NAME", *_wrapped(f"One of {', '.join(documentation.group_choices(section))}.", 4)]
    for option in selected:
        facts = [option.type, option.unit, _SHORT_KEY[option.policy], _algorithms(option)]
        lines += [f"{option.name}={_default(option)}", *_wrapped(f"({'; '.join(filter(None, facts))})", 4)]
        lines += _wrapped(option.meaning, 4)
        if any(option.choices.values()):
            lines += [line for name, meaning in option.choices.items() for line in _choice(name, meaning, 6)]
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, ui.width() - 1, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _algorithms(option: OptionInfo) -> str:
    return " or ".join(f"speculator={name}" for name in option.algorithms)


def _default(option: OptionInfo) -> str:
    if option.default == MISSING:
        return "???"
    return as_override(option.default).replace(" ", "")


def _full(option: OptionInfo) -> str:
    """An option with its type, default, unit, constraints, policy and choices."""
    rows = [
        ("type", option.type),
        ("default", "none: a recipe has to set it" if option.default == MISSING else _default(option)),
        ("unit", option.unit),
        ("value", "; ".join(option.constraints)),
        ("in keys", _KEY[option.policy]),
        ("only with", _algorithms(option)),
    ]
    choices = [line for name, meaning in option.choices.items() for line in _choice(name, meaning)]
    facts = ui.columns((f"  {name}", value) for name, value in rows if value)
    meaning = "\n".join(_wrapped(option.meaning, 2))
    return "\n".join(
        [option.name, "", *([meaning, ""] if meaning else []), facts, *(["", *choices] if choices else [])]
    )


def _choice(name: str, meaning: str, indent: int = 2) -> list[str]:
    begin = " " * indent
    return textwrap.wrap(f"{name}  {meaning}".strip(), 78, initial_indent=begin, subsequent_indent=f"{begin}  ")
