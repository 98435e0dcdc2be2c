"""What the command line takes: a table of the verbs, from which help, the check of arguments and completion follow.

A row of `Verb.takes` is a flag if it begins with `-`, an option if it contains `=`, else a positional argument. The row
`OPTION=VALUE` stands for all options of a recipe.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from speculators import ui
from speculators.config import foreign_names, shipped
from speculators.errors import RecipeError, closest

PROGRAM = "speculators-run"
OVERRIDES = "OPTION=VALUE"
"""The row of verbs that compose a recipe."""
DESTRUCTIVE = {"--delete"}
"""Flags that no hint suggests."""
HELP = ("--help", "-h")
_SHORT = {"-m": "--multirun", "-c": "--cfg", "-i": "--info", "-p": "--package"}
"""Hydra's short flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A verb of the command line."""

    function: str
    """Its function in `speculators.verbs`, imported on use."""
    summary: str
    usage: str
    """Its arguments in one line."""
    takes: Mapping[str, str]
    """Meanings of its arguments."""
    examples: Sequence[str]
    """Command lines, without the program's name."""

    @property
    def flags(self) -> dict[str, str]:
        """Placeholders of the values of its flags, by flag; empty for a flag without a value."""
        return {row.split()[0]: row.partition(" ")[2] for row in self.takes if row.startswith("-")}

    @property
    def options(self) -> list[str]:
        """Names of its options, those of recipes excluded."""
        rows = (row for row in self.takes if not row.startswith("-"))
        return [row.partition("=")[0] for row in rows if "=" in row and row != OVERRIDES]

    @property
    def names(self) -> list[str]:
        """Its positional arguments."""
        return [row for row in self.takes if "=" not in row and not row.startswith("-")]

    @property
    def composes(self) -> bool:
        """Whether it takes a recipe and its options."""
        return OVERRIDES in self.takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """A checked command line of a verb."""

    names: list[str] = field(default_factory=list)
    """Positional arguments."""
    options: dict[str, str] = field(default_factory=dict)
    """Values by option; empty for a verb that composes a recipe."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the recipe, unchecked."""
    flags: dict[str, str] = field(default_factory=dict)
    """Values by flag, long form; empty for a flag without a value."""

    @property
    def as_json(self) -> bool:
        """Whether `--json` was given."""
        return "--json" in self.flags


_JSON = {"--json": "print JSON"}
_RECIPE = {
    "recipe=NAME": "a name of `speculators-run recipes`, or a YAML file",
    OVERRIDES: "an option of the recipe; `speculators-run options` lists them",
}
_STORE = {
    "run.store=PATH": "the store; default: $SPECULATORS_STORE or ~/.cache/speculators-run",
    "run.stores_read=[PATH,..]": "read-only stores that are searched too",
}
_RUNS = {"run.dir=PATH": "the directory of runs; default: runs"}
_ARTIFACTS = "artifacts of a stage, by its name or kind; with KEY (or its beginning), one of them"

VERBS = {
    "run": Verb(
        function="run.run",
        summary="run all stages without a cached artifact; the default verb",
        usage="recipe=NAME [OPTION=VALUE ...] [FLAG ...]",
        takes=_RECIPE
        | {
            "until=STAGE": "stop after this stage",
            "only=STAGE": "run only this stage",
            "force=STAGE": "run this stage although it is cached",
            "from=STAGE": "the same, with all later stages",
            "--multirun": "run the recipe for each value of `OPTION=A,B`; also -m",
            "--cfg job|hydra|all": "print the composed recipe; also -c",
            "--resolve": "with --cfg: with resolved interpolations",
            "--package PACKAGE": "with --cfg: only this section; also -p",
            "--info [all|config|defaults|defaults-tree|plugins|searchpath]": "print how Hydra composes; also -i",
            "--hydra-help": "print Hydra's help",
        },
        examples=["recipe=smollm2_eagle3 train.lr=3e-4", "-m recipe=smollm2_eagle3 train.lr=3e-4,1e-3"],
    ),
    "plan": Verb(
        function="query.plan",
        summary="print what would run, and why; starts and writes nothing",
        usage="recipe=NAME [OPTION=VALUE ...] [--servers] [--multirun] [--json]",
        takes={
            **_RECIPE,
            "--servers": "also print the servers' command lines",
            "--multirun": "plan a job for each value of `OPTION=A,B`, and what they share; also -m",
            **_JSON,
        },
        examples=["plan recipe=smollm2_eagle3 train.lr=3e-4", "plan -m recipe=smollm2_eagle3 train.lr=3e-4,1e-3"],
    ),
    "explain": Verb(
        function="query.explain",
        summary="explain the cache hit or miss of a stage, field by field",
        usage="STAGE recipe=NAME [OPTION=VALUE ...] [--json]",
        takes={"STAGE": "a stage, by its name or kind", **_RECIPE, **_JSON},
        examples=["explain train recipe=smollm2_eagle3 train.lr=3e-4"],
    ),
    "lock": Verb(
        function="lock.lock",
        summary="write RECIPE.lock.json, with which run.locked=true compares",
        usage="recipe=NAME [OPTION=VALUE ...] [--json]",
        takes={**_RECIPE, **_JSON},
        examples=["lock recipe=smollm2_eagle3"],
    ),
    "runs": Verb(
        function="history.runs",
        summary="list earlier runs, oldest first",
        usage="[run.dir=PATH] [--json]",
        takes={**_RUNS, **_JSON},
        examples=["runs"],
    ),
    "show": Verb(
        function="history.show",
        summary="show a run, one of its stages, or a row of its tokens",
        usage="[tokens] RUN [STAGE] [--row N] [run.dir=PATH] [--json]",
        takes={
            "RUN": "a run's name, its beginning, its path, or `last`",
            "STAGE": "a stage, by its name or kind",
            "tokens RUN": "a row of the run's tokens, with the supervised ones marked",
            "--row N": "number of that row, from 0; default: 0",
            **_RUNS,
            **_JSON,
        },
        examples=["show last", "show last train", "show tokens last --row 7"],
    ),
    "compare": Verb(
        function="history.compare",
        summary="compare options and metrics of runs",
        usage="RUN RUN ...|DIRECTORY [run.dir=PATH] [--json]",
        takes={"RUN": "a run, as for `show`; two or more", "DIRECTORY": "a directory of runs", **_RUNS, **_JSON},
        examples=["compare last 20261130-101500", "compare runs"],
    ),
    "serve": Verb(
        function="serve.serve",
        summary="start vLLM with a draft, until Ctrl-C",
        usage="[RUN|train:KEY|DIRECTORY] [--print] [run.dir=PATH] [run.store=PATH] [-- VLLM ARGS]",
        takes={
            "RUN": "a run, as for `show`; default: the last one that has a draft. RUN:NODE: one of several drafts",
            "train:KEY": "an artifact of the store",
            "DIRECTORY": "a checkpoint in the speculators format",
            "--print": "print the command for another machine",
            **_RUNS,
            "run.store=PATH": _STORE["run.store=PATH"],
            "-- VLLM ARGS": "further arguments for vLLM; of one that is given twice, the last counts",
        },
        examples=["serve", "serve last -- --port 8001", "serve ./my-draft --print"],
    ),
    "publish": Verb(
        function="publish.publish_draft",
        summary="write a draft with its card and recipe, or upload it",
        usage="RUN DIRECTORY|hub:ORG/NAME [verifier=ORG/NAME] [--dry-run] [run.dir=PATH]",
        takes={
            "RUN": "a run, as for `show`. RUN:NODE: one of several drafts",
            "DIRECTORY": "a directory that does not exist yet",
            "hub:ORG/NAME": "a repository of the Hugging Face hub, which is created if it does not exist",
            "verifier=ORG/NAME": "name of the target in the checkpoint, for a target that was a local directory",
            "--dry-run": "list the files and their sizes, and write nothing",
            **_RUNS,
        },
        examples=["publish last my-draft", "publish last hub:me/my-draft --dry-run"],
    ),
    "ls": Verb(
        function="store.ls",
        summary="list the artifacts of the store",
        usage="[STAGE[:KEY] ...] [run.store=PATH] [--json]",
        takes={"STAGE[:KEY]": _ARTIFACTS, **_STORE, **_JSON},
        examples=["ls", "ls train extract"],
    ),
    "verify": Verb(
        function="store.verify",
        summary="re-hash artifacts and report damage",
        usage="[STAGE[:KEY] ...] [--quarantine] [run.store=PATH] [--json]",
        takes={
            "STAGE[:KEY]": _ARTIFACTS,
            "--quarantine": "move damaged ones to quarantine",
            **_STORE,
            **_JSON,
        },
        examples=["verify train"],
    ),
    "gc": Verb(
        function="store.gc",
        summary="list artifacts unused for N days, or delete them",
        usage="[STAGE[:KEY] ...] [days=N] [run.dir=PATH,PATH] [--delete] [--json]",
        takes={
            "STAGE[:KEY]": _ARTIFACTS,
            "days=N": "days since the last use; default: 30",
            "run.dir=PATH,PATH": "directories of runs whose artifacts are kept; default: runs",
            "--delete": "delete what is listed; without it nothing is deleted",
            **_STORE,
            **_JSON,
        },
        examples=["gc days=60"],
    ),
    "export": Verb(
        function="store.export",
        summary="write artifacts into one file",
        usage="STAGE[:KEY] ...|recipe=NAME [OPTION=VALUE ...] FILE [--json]",
        takes={
            "STAGE[:KEY]": _ARTIFACTS,
            "FILE": "the file, which must not exist",
            "recipe=NAME": "all existing artifacts of a recipe",
            OVERRIDES: "an option of that recipe",
            **_JSON,
        },
        examples=["export train:0123abcd draft.tar", "export recipe=smollm2_eagle3 demo.tar"],
    ),
    "import": Verb(
        function="store.import_",
        summary="add the artifacts of such a file to the store",
        usage="FILE [run.store=PATH] [--json]",
        takes={"FILE": "a file that `export` wrote", **_STORE, **_JSON},
        examples=["import draft.tar"],
    ),
    "options": Verb(
        function="catalogue.options",
        summary="print options with type, default, unit and meaning",
        usage="[SECTION|NAME] [--json]",
        takes={"SECTION|NAME": "a section (`train`) or an option (`train.lr`)", **_JSON},
        examples=["options", "options train", "options train.lr"],
    ),
    "recipes": Verb(
        function="catalogue.recipes",
        summary="list the recipes, shipped and in ./recipes",
        usage="[--json]",
        takes=_JSON,
        examples=["recipes"],
    ),
    "doctor": Verb(
        function="doctor.doctor",
        summary="check this machine, and print how to fix each problem",
        usage="[run.store=PATH] [serve.python=PATH] [--json]",
        takes={"run.store=PATH": "the store", "serve.python=PATH": "the interpreter that has vLLM", **_JSON},
        examples=["doctor"],
    ),
    "completion": Verb(
        function="completion.completion",
        summary="print the script that switches tab completion on",
        usage="bash|zsh|fish",
        takes={"bash|zsh|fish": "the shell"},
        examples=[
            'eval "$(speculators-run completion bash)"          # in ~/.bashrc',
            'eval "$(speculators-run completion zsh)"           # in ~/.zshrc',
            "speculators-run completion fish | source           # in config.fish",
        ],
    ),
}
"""Every verb by name, in the order of the help."""


def program_help() -> str:
    """The help of the program: verbs, recipes, exit codes."""
    verbs = [(f"  {name}", verb.summary) for name, verb in VERBS.items()]
    recipes = [(f"  {name}", shipped.first_comment(path)) for name, path in sorted(shipped.available().items())]
    return (
        f"{PROGRAM}: train and evaluate a draft model for speculative decoding.\n\n"
        f"usage: {PROGRAM} recipe=NAME [OPTION=VALUE ...]\n       {PROGRAM} VERB [ARGUMENT ...]\n\n"
        f"{ui.columns(verbs)}\n\n`{PROGRAM} VERB --help` prints the arguments of a verb.\n\n"
        f"Recipes, shipped and in ./recipes:\n\n{ui.listing(recipes)}\n\n"
        "Exit codes: 0 success, 1 error with a hint, 2 defect of this program,\n"
        "128 + number of the signal that stopped it."
    )


def verb_help(name: str) -> str:
    """The help of a verb: usage, arguments, flags, examples; within 80 columns.

    Raises:
        RecipeError: there is no such verb.
    """
    if name not in VERBS:
        raise unknown_verb(name)
    verb = VERBS[name]
    usage = textwrap.fill(
        f"{PROGRAM} {name} {verb.usage}", 78, initial_indent="usage: ", subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )  # fmt: skip
    lines = [usage, "", f"{verb.summary[0].upper()}{verb.summary[1:]}.", ""]
    wide = max(len(row) for row in verb.takes if len(row) <= 26)
    for row, meaning in verb.takes.items():
        label = f"  {row}"
        first = f"{label:<{wide + 4}}" if len(label) <= wide + 2 else ""
        lines += [] if first else [label]
        lines += textwrap.wrap(
            meaning, 78, initial_indent=first or " " * (wide + 4), subsequent_indent=" " * (wide + 4)
        )
    examples = [f"  {text}" if PROGRAM in text else f"  {PROGRAM} {text}" for text in verb.examples]
    return "\n".join([*lines, "", "example:" if len(examples) == 1 else "examples:", *examples])


def parse(name: str, argv: Sequence[str]) -> Arguments:
    """Check the arguments of a verb by its row of the table.

    Raises:
        RecipeError: an unknown flag or option, a flag without its value, or an argument too many.
    """
    verb, parsed, rest = VERBS[name], Arguments(), list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            flag, value = _flag(name, verb, argument, rest)
            parsed.flags[flag] = value
        elif verb.composes and ("=" in argument or argument.startswith(("+", "~"))):
            parsed.overrides.append(argument)
        elif "=" in argument:
            option, _, value = argument.partition("=")
            if option not in verb.options:
                known = [*verb.options, *(flag for flag in verb.flags if flag not in DESTRUCTIVE)]
                raise RecipeError(f"`{name}` has no option `{option}`", closest(option, known))
            parsed.options[option] = value
        elif not verb.names:
            raise RecipeError(f"`{name}` takes no argument `{argument}`", _no_argument_hint(name, verb, argument))
        else:
            parsed.names.append(argument)
    return parsed


def unknown_verb(argument: str) -> RecipeError:
    """The error for a first argument that is no verb: the name of a recipe, or a mistyped one of either."""
    recipes = {name: f"recipe={name}" for name in shipped.available()}
    if argument in recipes or argument.endswith((".yaml", ".yml")):
        return RecipeError(f"there is no verb `{argument}`", f"name the recipe: {PROGRAM} recipe={argument}")
    hint = closest(argument, [*VERBS, *recipes], VERBS)
    match = next((name for name in recipes if hint == f"did you mean `{name}`?"), None)
    return RecipeError(f"there is no verb `{argument}`", f"did you mean `recipe={match}`?" if match else hint)


def long_flag(flag: str) -> str:
    """The long form of one of Hydra's short flags; other flags unchanged."""
    return _SHORT.get(flag, flag)


def _flag(name: str, verb: Verb, argument: str, rest: list[str]) -> tuple[str, str]:
    """The flag's long form and its value, which is taken from `rest`."""
    written, equals, value = argument.partition("=")
    flag = long_flag(written)
    placeholder = verb.flags.get(flag)
    if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-") and placeholder != "":
        value = rest.pop(0)
    if placeholder is None:
        raise RecipeError(f"`{name}` has no flag `{written}`", _flag_hint(name, verb, written, value or "VALUE"))
    optional, choices = placeholder.startswith("["), placeholder.strip("[]").split("|")
    if bool(value) != bool(placeholder) and not optional:
        usage = f"{flag} {placeholder}".strip()
        raise RecipeError(f"`{argument}`: the flag takes {'a' if placeholder else 'no'} value", f"write `{usage}`")
    if value and len(choices) > 1 and value not in choices:
        raise RecipeError(f"`{flag} {value}`: there is no such choice", closest(value, choices))
    return flag, value


def _flag_hint(name: str, verb: Verb, flag: str, value: str) -> str:
    """Hint for an unknown flag: an option of the recipe that was written with dashes, else the closest flag."""
    from speculators.config import documentation  # imported for errors only: it reads the schema

    option = flag.lstrip("-").replace("-", "_")
    if verb.composes and len(option) > 1:
        if foreign := foreign_names.hint(option):
            return foreign
        exact = [full for full in documentation.all_options() if option in (full, full.rpartition(".")[2])]
        if option in documentation.GROUPS or len(exact) == 1:
            return f"options have no dashes: {exact[0] if exact else option}={value}"
    hint = closest(flag, verb.flags)
    safe = verb.flags and not any(destructive in hint for destructive in DESTRUCTIVE)
    return hint if safe else f"`{PROGRAM} {name} --help` lists its arguments"


def _no_argument_hint(name: str, verb: Verb, argument: str) -> str:
    if name == "run" and argument in VERBS:
        return f"the verb comes first: {PROGRAM} {argument} ..."
    if verb.composes and (argument in shipped.available() or argument.endswith((".yaml", ".yml"))):
        return f"name the recipe: recipe={argument}"
    return f"`{PROGRAM} {name} --help` lists its arguments"
