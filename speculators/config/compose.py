"""Compose a checked `Config` from the overrides of a command line. The only module that imports Hydra.

Recipes are looked up by name in the shipped `recipes/` and in `./recipes`, or given as a path; each becomes a choice of
Hydra's config group `recipe`, so that another recipe can build on it (`defaults: [/recipe/NAME, _self_]`). `conf/` of
the working directory is on Hydra's search path, after the shipped one. Hydra merges all into the types of
`schema.Config`. Errors of Hydra and OmegaConf are replaced by one `error:` with the full name of the option and one
`hint:` with the fix.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from speculators.config.algorithms import SPECULATORS
from speculators.config.checks import check_config, check_launcher, pipeline_nodes
from speculators.config.execution import ExecutorOptions, RunOptions, StageLimits
from speculators.config.fields import MISSING, iter_options, to_builtins
from speculators.config.recipe_files import bases, by_name, quoted, read_recipe, refuse_circles
from speculators.config.schema import Config, Dataset, Evaluate, from_builtins
from speculators.config.shipped import CONF, available, choices, own_conf
from speculators.config.translation import (
    ITEMS,
    OPEN,
    closest_option,
    first_line,
    known_options,
    sections,
    translated,
    wrong_section,
)
from speculators.errors import RecipeError, closest

_VERSION_BASE = "1.3"
_GROUPS = ("target", "data", "speculator", "pipeline", "hardware", "executor")
_HYDRA_GROUPS = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")
"""Hydra's config groups for itself, which composing does not need; reading them takes a tenth of its time."""
_REMOVED = re.compile(r"(data|run\.stages)\.[^.]+=null")
"""Removes an item, which must exist."""


@dataclass(kw_only=True, slots=True)
class _EvaluateAsWritten(Evaluate):
    """`datasets` as a list: on the command line a list replaces the recipe's, whereas a mapping would be merged."""

    datasets: list[Any] = field(default_factory=list)  # type: ignore[assignment]


@dataclass(kw_only=True, slots=True)
class _RunAsWritten(RunOptions):
    """`stages` untyped, as in `_Written`."""

    stages: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Written(Config):
    """`Config` in the form that recipes have, for Hydra."""

    evaluate: Evaluate = field(default_factory=_EvaluateAsWritten)
    data: dict[str, Any] = field(default_factory=dict)
    """Untyped, as the next two, since OmegaConf adds no item with a type of its own; see `_item`. Null removes a
    dataset, as of a recipe that this one builds on."""
    run: RunOptions = field(default_factory=_RunAsWritten)
    pipeline: dict[str, Any] = field(default_factory=dict)
    """See `checks.pipeline_nodes`."""


def compose(overrides: Sequence[str]) -> Config:
    """Compose the recipe that `overrides` (`recipe=NAME`, `train.lr=3e-4`) describe, typed and complete.

    Raises:
        RecipeError: no such recipe, option or choice, a value of the wrong type, or one that is missing.
    """
    overrides, known = _register(overrides)
    _check_overrides(overrides, known)
    return _composed(overrides)


def _composed(overrides: Sequence[str]) -> Config:
    """Compose checked overrides of registered recipes."""
    try:
        with _initialized():
            without_hydra = [f"~hydra/{group}" for group in _HYDRA_GROUPS]
            composed = hydra.compose(
                config_name="config", overrides=[*overrides, *without_hydra, *_search_path(overrides)]
            )
    except RecipeError:
        raise
    except Exception as error:  # of what is written, of whatever type: nothing of this package runs here
        raise translated(error) from None
    return typed(composed)


def as_recipe(config: Config) -> str:
    """A recipe in YAML with all options of `config` but those of the machine: `recipe=FILE` composes it anywhere."""
    values = to_builtins(config)
    for name in ("recipe", "run", "executor", "force", "from_", "until", "only"):
        values.pop(name, None)
    defaults: list[dict[str, Any]] = [{"override /speculator": values["speculator"].pop("algorithm")}]
    for group in _GROUPS:
        if group != "speculator":  # the options contain what other groups would choose
            defaults.append({f"override /{group}": [] if group == "data" else None})
    return f"# @package _global_\n{OmegaConf.to_yaml(OmegaConf.create({'defaults': defaults, **values}))}"


def show_by_hydra(arguments: Sequence[str]) -> None:
    """Let Hydra print what one of its flags asks for: `--cfg job`, `--info`, `--hydra-help`; runs nothing.

    Raises:
        RecipeError: as `compose`.
    """
    if "--hydra-help" in arguments:
        arguments = ["--hydra-help"]  # about Hydra itself; an override would be one without a use
    else:
        arguments, known = _register(arguments)
        _check_overrides([a for a in arguments if "=" in a and not a.startswith("-")], known)
        arguments = [*arguments, *_search_path(arguments)]
    if any(argument.startswith(("--info", "-i")) for argument in arguments):
        logging.getLogger("hydra").setLevel(logging.DEBUG)  # by which it prints
    sys.argv = [sys.argv[0], *arguments]
    # Otherwise Hydra prints errors in its own format, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base=_VERSION_BASE, config_path=str(CONF), config_name="config")(lambda composed: None)()
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise translated(error) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepJob:
    """One job of a sweep, in the process in which its launcher runs it."""

    number: int
    overrides: list[str]
    """The overrides that run this job without the sweep."""
    composed: DictConfig

    def config(self) -> Config:
        """The job's recipe.

        Raises:
            RecipeError: as `compose`.
        """
        return typed(self.composed)


def multirun(arguments: Sequence[str], directory: Path, task: Callable[[SweepJob], None]) -> None:
    """Run a sweep (`-m`): call `task` with each job. The launcher may pickle `task` and call it in another process.

    Hydra and its launchers write their files into `directory`.

    Raises:
        RecipeError: before the first job, if one of them does not compose.
    """
    overrides = _sweep_overrides(arguments)
    overrides += _launcher_settings(overrides)
    for job_overrides in _jobs(overrides):
        _composed(job_overrides)

    def job(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        own_overrides = _with_recipe_paths(hydra_config.overrides.task, arguments)
        task(SweepJob(number=int(hydra_config.job.num), overrides=own_overrides, composed=composed))

    # Otherwise Hydra prints errors in its own format, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra 1.3 does not accept a flag between overrides.
    sys.argv = [sys.argv[0], "-m", f"hydra.sweep.dir='{directory}'", *overrides, *_search_path(overrides)]
    try:
        hydra.main(version_base=_VERSION_BASE, config_path=str(CONF), config_name="config")(job)()
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise translated(error) from None


def sweep_jobs(arguments: Sequence[str]) -> list[tuple[list[str], Config]]:
    """The overrides and the recipe of each job of a sweep, in their order; runs nothing.

    Raises:
        RecipeError: as `multirun`.
    """
    jobs = _jobs(_sweep_overrides(arguments))
    return [(_with_recipe_paths(overrides, arguments), _composed(overrides)) for overrides in jobs]


def _sweep_overrides(arguments: Sequence[str]) -> list[str]:
    """Register the recipes of a sweep, and check its overrides, which are returned without flags of this program."""
    rewritten, known = _register(arguments)
    overrides = [a for a in rewritten if a not in ("-m", "--multirun")]
    _check_overrides([o for o in overrides if not o.startswith("-")], known, sweep=True)
    return overrides


def _with_recipe_paths(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The overrides of a job with its recipe as the sweep's arguments have it: a path where they have one."""
    recipes = [name for a in arguments if a.startswith("recipe=") for name in a.removeprefix("recipe=").split(",")]
    path_by_name = {Path(recipe).stem: recipe for recipe in recipes}
    job_overrides = []
    for override in overrides:
        name, _, value = override.partition("=")
        value = value.strip("'")
        job_overrides.append(f"recipe={path_by_name.get(value, value)}" if name == "recipe" else override)
    return job_overrides


def _launcher_settings(overrides: Sequence[str]) -> list[str]:
    """Overrides of the launcher's defaults, which do not suit these jobs, unless the command line sets them."""
    launcher = next((o.partition("=")[2] for o in overrides if o.startswith("hydra/launcher=")), "")
    settings = {}
    if launcher == "joblib":  # by default it starts ten processes
        settings["n_jobs"] = min(_count(overrides), os.cpu_count() or 1)
    elif launcher.startswith("submitit"):  # by default it ends a job after an hour
        settings["timeout_min"] = ExecutorOptions().time_limit
    overridden = {override.partition("=")[0] for override in overrides}
    return [f"hydra.launcher.{k}={v}" for k, v in settings.items() if f"hydra.launcher.{k}" not in overridden]


def _count(overrides: Sequence[str]) -> int:
    """The number of jobs of a sweep."""
    return sum(1 for _ in _jobs(overrides))


def _jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep, without those of Hydra itself."""
    written = [o for o in overrides if not o.startswith(("-", "hydra.", "hydra/"))]
    values = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_discrete_sweep() else [line]
        for o, line in zip(OverridesParser.create().parse_overrides(overrides=written), written, strict=True)
    ]
    yield from map(list, itertools.product(*values))


def _search_path(overrides: Sequence[str]) -> list[str]:
    """The override that adds `conf/` of the working directory to Hydra's search path.

    Raises:
        RecipeError: one of its choices has the name of a shipped one, which Hydra would take instead.
    """
    conf = own_conf()
    if conf is None or any(override.startswith("hydra.searchpath=") for override in overrides):
        return []
    for group in _GROUPS:
        for path in sorted((conf / group).glob("*.yaml")):
            shipped = CONF / group / path.name
            if shipped.is_file() and shipped.read_bytes() != path.read_bytes():
                name = path.relative_to(conf.parent)
                raise RecipeError(
                    f"{name}: there is a shipped choice of this name", f"rename it, to my_{path.name} say"
                )
    return [f"hydra.searchpath=['file://{conf}']"]


def typed(composed: DictConfig) -> Config:
    """Convert Hydra's result to a `Config`, with the datasets of `evaluate.datasets` filled in, and check it.

    Hydra has already checked names and types when it merged the recipe into the schema.
    """
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise translated(error) from None
    for section, items in (("data", values["data"]), ("run.stages", values["run"]["stages"])):
        for name in list(items):
            if items[name] is None:
                del items[name]
            else:
                items[name] = _item(f"{section}.{name}", ITEMS[section], items[name])
    values["evaluate"]["datasets"] = _evaluation_datasets(values["evaluate"]["datasets"], values["data"])
    values["pipeline"] = pipeline_nodes(values["pipeline"])
    for name in sorted(_missing(values)):
        raise _without_value(name, values["data"])
    config = from_builtins(Config, values)
    check_config(config)
    return config


def _without_value(name: str, datasets: Mapping[str, Any]) -> RecipeError:
    """The error for an option that a recipe has to set; `datasets` are all that it names."""
    message, hint = f"`{name}` has no value", f"set it in the recipe, or add {name}=VALUE"
    if name == "target.source":
        message = "the recipe names no target: `target.source` has no value"
        hint = (
            f"target.source=ORG/NAME (on the hub) or DIRECTORY; or target=NAME, one of {', '.join(choices('target'))}"
        )
    elif name.startswith("data.") and name.endswith(".source"):
        others = {f"data.{other}" for other in datasets} - {name.rpartition(".")[0]}
        hint = f"{name}=FILE" + (f", if it is new; {closest(name.rpartition('.')[0], others)}" if others else "")
    return RecipeError(message, hint)


def _missing(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the options that have no value."""
    for name, value in values.items():
        if value == MISSING:
            yield f"{prefix}{name}"
        elif isinstance(value, dict):
            yield from _missing(value, f"{prefix}{name}.")


def _register(arguments: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """Register recipes and schemas with Hydra.

    Because reading YAML takes time, only the named recipes and those that they build on are registered, or all if Hydra
    may list them. Returns the arguments, with paths of recipes replaced by names and our abbreviations by Hydra's
    syntax, and all recipes by name.
    """
    logging.getLogger("hydra").setLevel(logging.ERROR)
    store = ConfigStore.instance()
    store.store(name="schema", node=_Written)
    for algorithm, schema in SPECULATORS.items():
        store.store(group="speculator", name=f"{algorithm}_schema", node=schema)
    known = available()
    rewritten = []
    named = set(known) if any(argument.startswith("-") for argument in arguments) else set()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "recipe":
            names = [by_name(name, known) for name in value.split(",")]
            named |= set(names) & set(known)
            argument = f"recipe={','.join(map(quoted, names))}"
        elif key in ("force", "evaluate.datasets") and not value.startswith("["):
            argument = f"{key}=[{value}]"
        elif key == "from":
            argument = f"from_={value}"  # `from` cannot be the name of a field
        elif _is_in(key, OPEN) and key not in _GROUPS and not _REMOVED.fullmatch(argument):
            argument = f"++{argument}"  # adds an item, too; these mappings have no fixed names
        rewritten.append(argument)
    registered: dict[str, list[str]] = {}
    while pending := sorted(named - registered.keys()):
        for name in pending:
            node = read_recipe(known[name])
            store.store(group="recipe", name=name, node={**node, "recipe": name}, package="_global_")
            registered[name] = list(bases(node, known[name], known))
            named |= set(registered[name])
    refuse_circles(registered)
    return rewritten, known


def _initialized() -> Any:
    GlobalHydra.instance().clear()
    return hydra.initialize_config_dir(config_dir=str(CONF), version_base=_VERSION_BASE)


def _evaluation_datasets(items: list[Any], trained_on: dict[str, Any]) -> dict[str, Any]:
    """Resolve the names and definitions of `evaluate.datasets` to complete datasets, by name.

    Raises:
        RecipeError: no such dataset, or an option of it that does not exist or has the wrong type.
    """
    datasets: dict[str, Any] = {}
    for item in items:
        for name, options in item.items() if isinstance(item, dict) else [(str(item), None)]:
            full = f"evaluate.datasets.{name}"
            datasets[name] = (
                _item(full, Dataset, options) if options else trained_on.get(name) or _shipped_dataset(name)
            )
    return datasets


def _shipped_dataset(name: str) -> Any:
    path = choices("data").get(name)
    if path is None:
        raise RecipeError(f"evaluate.datasets: there is no dataset `{name}`", closest(name, choices("data")))
    loaded: Any = OmegaConf.load(path)
    return _item(f"evaluate.datasets.{name}", Dataset, loaded[name])


def _item(full: str, schema: type[Dataset] | type[StageLimits], options: Any) -> Any:
    """Fill the defaults of an item of an open section in; `full` is its dotted name."""
    if not isinstance(options, Mapping):
        example = "{source: FILE, format: prompts}" if schema is Dataset else "{time_limit: 7200}"
        raise RecipeError(f"{full} is {options!r}", f"define it by its options: {example}")
    typed_item, known = OmegaConf.structured(schema), [name for name, *_ in iter_options(schema())]
    for option, value in options.items():
        if option not in known:
            raise RecipeError(f"there is no option `{full}.{option}`", closest(str(option), known))
        try:
            typed_item[option] = value
        except omegaconf.errors.ValidationError as error:
            raise RecipeError(f"{full}.{option}: {first_line(error)}", "give a value of the option's type") from None
    return OmegaConf.to_container(typed_item, enum_to_str=True)


def _check_overrides(arguments: Sequence[str], known: Mapping[str, Path], sweep: bool = False) -> None:
    """Report wrong overrides before Hydra does, whose messages advise `+key`, which adds unknown keys."""
    try:
        overrides = OverridesParser.create().parse_overrides(overrides=list(arguments))
    except HydraException as error:
        raise RecipeError(
            f"cannot read an override: {first_line(error)}",
            "write KEY=VALUE; quote a value that has = , # or blanks: 'target.source=\"a b\"'",
        ) from None
    options = known_options()
    if not any(o.key_or_group == "recipe" for o in overrides):
        raise RecipeError("no recipe is named", f"add recipe=NAME; there is: {', '.join(sorted(known))}")
    for override in overrides:
        _check_override(override, options, known, sweep)
    if sweep and not any(o.is_sweep_override() or o.key_or_group.startswith("hydra.sweeper") for o in overrides):
        hint = "separate the values by commas, as in train.lr=1e-4,3e-4; without -m this is one run"
        raise RecipeError("-m: no option has several values", hint)


def _check_override(override: Override, options: set[str], known: Mapping[str, Path], sweep: bool) -> None:
    name = override.key_or_group
    if name == "hydra/launcher":
        check_launcher(str(override.value()))
    if name.startswith(("hydra.", "hydra/")):
        return
    section = next((s for s in OPEN if name.startswith(f"{s}.")), "")
    if section in ITEMS:
        options = known_options(name)
    if override.is_add() or (override.is_force_add() and not _is_in(name, OPEN)):
        hint = f"without the `+`: {name}=VALUE" if section and name in options else closest_option(name, options)
        raise RecipeError(f"`+{name}`: options cannot be added", hint)
    if override.is_delete():
        hint = f"{name}=null" if name.count(".") == 1 and section else "set the option to null, or to its default"
        raise RecipeError(f"`~{name}`: options cannot be removed", hint)
    if override.is_sweep_override() and not sweep:
        hint = f"`-m` runs a job for each value, and `plan -m` plans them; a list has brackets: '{name}=[VALUE,VALUE]'"
        raise RecipeError(f"`{name}` has several values", hint)
    if name in (*_GROUPS, "recipe"):
        _check_choice(name, override, known)
    elif name not in options and (not section or (section in ITEMS and name.count(".") > section.count(".") + 1)):
        raise RecipeError(f"there is no option `{name}`", closest_option(name, options))
    elif name in sections() and not override.is_sweep_override() and not isinstance(override.value(), dict):
        raise wrong_section(name, override.value())


def _is_in(name: str, sections: Iterable[str]) -> bool:
    """Whether an option is one of the sections, or in one of them."""
    return f"{name}.".startswith(tuple(f"{section}." for section in sections))


def _check_choice(name: str, override: Override, known: Mapping[str, Path]) -> None:
    """Check the override of a config group or the recipe: a choice, a list, or a choice for each job of a sweep."""
    if override.is_discrete_sweep():
        selected: Any = [value for value in override.sweep_string_iterator() if not value.startswith("[")]
    else:
        selected = override.value()
    all_choices = known if name == "recipe" else choices(name)
    for choice in selected if isinstance(selected, list) else [selected]:
        if choice is None:
            raise RecipeError(f"{name}=null: names no choice", f"leave {name} out, or {closest('', all_choices)}")
        if isinstance(choice, dict):
            example = "data.NAME.source=FILE data.NAME.format=messages" if name == "data" else f"{name}.OPTION=VALUE"
            raise RecipeError(f"{name}={choice}: names no choice", f"options have full names: {example}")
        choice = str(choice).strip("'")
        if choice not in all_choices:
            kind = "recipe" if name == "recipe" else f"choice for {name}"
            raise RecipeError(f"no {kind} named `{choice}`", closest(choice, all_choices))
