"""Compose a checked `Config` from the overrides of a command line. The only module that imports Hydra.

Recipes are looked up by name in the shipped `recipes/` and in `./recipes`, or given as a path; each becomes a choice of
Hydra's config group `recipe`, so that another recipe can build on it (`defaults: [/recipe/NAME, _self_]`). `conf/` of
the working directory is on Hydra's search path, after the shipped one. Hydra merges all into the types of
`schema.Config`. Errors of Hydra and OmegaConf are replaced by one `error:` with the full name of the option and one
`hint:` with the fix.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from speculators.config import foreign_names
from speculators.config.algorithms import SPECULATORS
from speculators.config.checks import check_config, pipeline_nodes
from speculators.config.choices import DataFormat
from speculators.config.execution import ExecutorOptions
from speculators.config.fields import MISSING, iter_options, to_builtins
from speculators.config.schema import Config, Dataset, Evaluate, from_builtins
from speculators.config.shipped import CONF, available, choices, own_conf
from speculators.errors import RecipeError, closest
from speculators.packages import installed_version
from speculators.runner.planning.sources import relative_to

_VERSION_BASE = "1.3"
_OPEN = ("data.", "pipeline.")
"""Sections whose keys are defined by the recipe."""
_GROUPS = ("target", "data", "speculator", "pipeline", "hardware", "executor")
_HYDRA_GROUPS = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")
"""Hydra's config groups for itself, which composing does not need; reading them takes a tenth of its time."""
_LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "joblib"),
    "submitit_local": ("hydra-submitit-launcher", "sweep-slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "sweep-slurm"),
    "ray": ("hydra-ray-launcher", "sweep-ray"),
}
"""Launchers of sweeps: the distribution that contains each, and the extra that installs it."""


@dataclass(kw_only=True, slots=True)
class _EvaluateAsWritten(Evaluate):
    """`datasets` as a list: on the command line a list replaces the recipe's, whereas a mapping would be merged."""

    datasets: list[Any] = field(default_factory=list)  # type: ignore[assignment]


@dataclass(kw_only=True, slots=True)
class _Written(Config):
    """`Config` in the form that recipes have, for Hydra."""

    evaluate: Evaluate = field(default_factory=_EvaluateAsWritten)
    pipeline: dict[str, Any] = field(default_factory=dict)
    """Untyped, since OmegaConf merges nothing into an item with a type of its own; see `checks.pipeline_nodes`."""


def compose(overrides: Sequence[str]) -> Config:
    """Compose the recipe that `overrides` (`recipe=NAME`, `train.lr=3e-4`) describe, typed and complete.

    Raises:
        RecipeError: no such recipe, option or choice, a value of the wrong type, or one that is missing.
    """
    overrides, known = _register(overrides)
    _check_overrides(overrides, known)
    try:
        with _initialized():
            without_hydra = [f"~hydra/{group}" for group in _HYDRA_GROUPS]
            composed = hydra.compose(
                config_name="config", overrides=[*overrides, *without_hydra, *_search_path(overrides)]
            )
        return typed(composed)
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _translated(error) from None


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
        raise _translated(error) from None


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
    rewritten, known = _register(arguments)
    overrides = [a for a in rewritten if a not in ("-m", "--multirun")]
    _check_overrides([o for o in overrides if not o.startswith("-")], known, sweep=True)
    overrides += _launcher_settings(overrides)
    recipes = [name for a in arguments if a.startswith("recipe=") for name in a.removeprefix("recipe=").split(",")]
    path_by_name = {Path(recipe).stem: recipe for recipe in recipes}

    def job(composed: DictConfig) -> None:
        hydra_config, own_overrides = HydraConfig.get(), []
        for override in hydra_config.overrides.task:
            name, _, value = override.partition("=")
            own_overrides.append(f"recipe={path_by_name.get(value, value)}" if name == "recipe" else override)
        task(SweepJob(number=int(hydra_config.job.num), overrides=own_overrides, composed=composed))

    # Otherwise Hydra prints errors in its own format, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra 1.3 does not accept a flag between overrides.
    sys.argv = [sys.argv[0], "-m", f"hydra.sweep.dir='{directory}'", *overrides, *_search_path(overrides)]
    try:
        hydra.main(version_base=_VERSION_BASE, config_path=str(CONF), config_name="config")(job)()
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _translated(error) from None


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
    parsed = OverridesParser.create().parse_overrides(overrides=[o for o in overrides if not o.startswith("-")])
    return math.prod(sum(1 for _ in o.sweep_string_iterator()) for o in parsed if o.is_discrete_sweep())


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
    values: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    values["evaluate"]["datasets"] = _evaluation_datasets(values["evaluate"]["datasets"], values["data"])
    values["pipeline"] = pipeline_nodes(values["pipeline"])
    for name in sorted(_missing(values)):
        raise _without_value(name)
    config = from_builtins(Config, values)
    check_config(config)
    return config


def _without_value(name: str) -> RecipeError:
    """The error for an option that a recipe has to set."""
    message, hint = f"`{name}` has no value", f"set it in the recipe, or add {name}=VALUE"
    if name == "target.source":
        message = "the recipe names no target: `target.source` has no value"
        hint = (
            f"target.source=ORG/NAME (on the hub) or DIRECTORY; or target=NAME, one of {', '.join(choices('target'))}"
        )
    elif name.endswith(".format"):
        hint = f"{name}=messages, or another of {', '.join(format.name for format in DataFormat)}"
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
            names = [_by_name(name, known) for name in value.split(",")]
            named |= set(names) & set(known)
            argument = f"recipe={','.join(names)}"
        elif key in ("force", "evaluate.datasets") and not value.startswith("["):
            argument = f"{key}=[{value}]"
        elif key == "from":
            argument = f"from_={value}"  # `from` cannot be the name of a field
        elif key.startswith("pipeline."):
            argument = f"++{argument}"  # adds a node or an input, too; its mappings have no fixed names
        rewritten.append(argument)
    registered: set[str] = set()
    while pending := sorted(named - registered):
        for name in pending:
            node = _read_recipe(known[name])
            store.store(group="recipe", name=name, node={**node, "recipe": name}, package="_global_")
            named |= set(_bases(node, known[name], known))
        registered |= set(pending)
    return rewritten, known


def _read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe's file; relative paths in it are relative to the file's directory.

    Raises:
        RecipeError: it is not a YAML mapping.
    """
    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        hint = f"fix the YAML at line {mark.line + 1}" if mark else "fix the YAML"
        raise RecipeError(f"{path.name} is not YAML: {_first_line(error)}", hint) from None
    if not isinstance(node, dict):
        raise RecipeError(f"{path.name} is not a YAML mapping", "write options as `train: {lr: 1e-3}`")
    datasets = (node.get("evaluate") or {}).get("datasets")
    if isinstance(datasets, dict):  # a mapping, as `data` is one
        node["evaluate"]["datasets"] = datasets = [datasets]
    definitions = [*(item.values() for item in [node.get("data"), *(datasets or [])] if isinstance(item, dict))]
    for section in (node.get("target"), *(section for group in definitions for section in group)):
        if isinstance(section, dict) and isinstance(section.get("source"), str):
            model = section is node.get("target")
            section["source"] = relative_to(path.absolute().parent, section["source"], model=model)
    if isinstance(draft := (node.get("evaluate") or {}).get("draft"), str) and draft:
        node["evaluate"]["draft"] = relative_to(path.absolute().parent, draft, model=True)
    return node


def _bases(node: Mapping[str, Any], path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The names of the recipes that a recipe's defaults list names; those in its own directory are added to `known`."""
    for entry in node.get("defaults") or []:
        name = entry.removeprefix("/recipe/") if isinstance(entry, str) else ""
        sibling = path.parent / f"{name}.yaml"
        if name and name not in known and sibling.is_file():
            known[name] = sibling
        if name in known:
            yield name


def _by_name(recipe: str, known: dict[str, Path]) -> str:
    """The name of a recipe given by name or by path; a path is added to `known`."""
    if not recipe.endswith((".yaml", ".yml")):
        return recipe
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise RecipeError(f"no recipe at `{recipe}`", closest(path.stem, known))
    known[path.stem] = path
    return path.stem


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
            datasets[name] = _dataset(name, options) if options else trained_on.get(name) or _shipped_dataset(name)
    return datasets


def _shipped_dataset(name: str) -> Any:
    path = choices("data").get(name)
    if path is None:
        raise RecipeError(f"evaluate.datasets: there is no dataset `{name}`", closest(name, choices("data")))
    loaded: Any = OmegaConf.load(path)
    return _dataset(name, loaded[name])


def _dataset(name: str, options: Any) -> Any:
    """Fill the defaults of a dataset in."""
    full = f"evaluate.datasets.{name}"
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"{full} is {options!r}", "define the dataset by its options: {source: FILE, format: prompts}"
        )
    schema, known = OmegaConf.structured(Dataset), [name for name, *_ in iter_options(Dataset())]
    for option, value in options.items():
        if option not in known:
            raise RecipeError(f"there is no option `{full}.{option}`", closest(str(option), known))
        try:
            schema[option] = value
        except omegaconf.errors.ValidationError as error:
            raise RecipeError(f"{full}.{option}: {_first_line(error)}", "give a value of the option's type") from None
    return OmegaConf.to_container(schema, enum_to_str=True)


def _options(near: str = "") -> set[str]:
    """Dotted names that may be overridden, sections included; if `near` is a dataset's option, the dataset's."""
    if near.startswith("data.") and near.count(".") == 2:
        return {f"{near.rpartition('.')[0]}.{name}" for name, *_ in iter_options(Dataset())}
    names = {name for name, *_ in iter_options(Config())}
    for schema in SPECULATORS.values():
        names |= {f"speculator.{name}" for name, *_ in iter_options(schema())}
    return names | {name.rsplit(".", 1)[0] for name in names if "." in name} | {"data", "pipeline"}


def _closest_option(name: str, options: set[str]) -> str:
    """Hint for an unknown option: our name for another tool's option, the closest match, or the section's options."""
    if hint := foreign_names.hint(name):
        return hint
    names = {option.rstrip("_") for option in options}  # `from`
    section = name.rpartition(".")[0]
    siblings = [option for option in names if option.rpartition(".")[0] == section]
    return closest(name, names, siblings or [option for option in names if "." not in option])


def _check_overrides(arguments: Sequence[str], known: Mapping[str, Path], sweep: bool = False) -> None:
    """Report wrong overrides before Hydra does, whose messages advise `+key`, which adds unknown keys."""
    try:
        overrides = OverridesParser.create().parse_overrides(overrides=list(arguments))
    except HydraException as error:
        raise RecipeError(
            f"cannot read an override: {_first_line(error)}",
            "write KEY=VALUE; quote a value that has = , # or blanks: 'target.source=\"a b\"'",
        ) from None
    options = _options()
    if not any(o.key_or_group == "recipe" for o in overrides):
        raise RecipeError("no recipe is named", f"add recipe=NAME; there is: {', '.join(sorted(known))}")
    for override in overrides:
        _check_override(override, options, known, sweep)


def _check_override(override: Override, options: set[str], known: Mapping[str, Path], sweep: bool) -> None:
    name = override.key_or_group
    if name == "hydra/launcher":
        _check_launcher(str(override.value()))
    if name.startswith(("hydra.", "hydra/")):
        return
    if override.is_add() or (override.is_force_add() and not name.startswith("pipeline.")):
        raise RecipeError(f"`+{name}`: options cannot be added", _closest_option(name, options))
    if override.is_delete():
        raise RecipeError(f"`~{name}`: options cannot be removed", "set the option to null, or to its default")
    if override.is_sweep_override() and not sweep:
        raise RecipeError(f"`{name}` has several values", "add -m to run one job for each value")
    if name in (*_GROUPS, "recipe"):
        _check_choice(name, override, known)
    elif name not in options and not name.startswith(_OPEN):
        raise RecipeError(f"there is no option `{name}`", _closest_option(name, options))


def _check_choice(name: str, override: Override, known: Mapping[str, Path]) -> None:
    """Check the override of a config group or the recipe: a choice, a list, or a choice for each job of a sweep."""
    if override.is_discrete_sweep():
        selected: Any = [value for value in override.sweep_string_iterator() if not value.startswith("[")]
    else:
        selected = override.value()
    all_choices = known if name == "recipe" else choices(name)
    for choice in selected if isinstance(selected, list) else [selected]:
        if isinstance(choice, str) and choice not in all_choices:
            kind = "recipe" if name == "recipe" else f"choice for {name}"
            raise RecipeError(f"no {kind} named `{choice}`", closest(choice, all_choices))


def _check_launcher(name: str) -> None:
    distribution, extra = _LAUNCHERS.get(name, ("", ""))
    if not distribution:
        if name != "basic":
            raise RecipeError(f"hydra/launcher: there is no launcher `{name}`", closest(name, ["basic", *_LAUNCHERS]))
        return
    if installed_version(distribution) is None:
        raise RecipeError(
            f"hydra/launcher={name} needs `{distribution}`, which is not installed",
            f"pip install 'speculators-run[{extra}]'",
        )


def _translated(error: Exception) -> RecipeError:
    """Translate an exception of Hydra or OmegaConf into a message with the option and a hint."""
    chain = list(_chain(error))
    text, cause = "\n".join(str(e) for e in chain), chain[-1]
    name = next((key for e in chain if (key := getattr(e, "full_key", None))), None)
    if match := re.search(r"Could not (?:find|load) '(?:(\w+)/)?([^']+)'", text):
        group, choice = match[1] or "recipe", match[2]
        return RecipeError(
            f"no choice for {group} named `{choice}`",
            closest(choice, available() if group == "recipe" else choices(group)),
        )
    if match := re.search(r"Key '([^']+)' (?:not in|is not in)", text):
        unknown = str(name or match[1])
        return RecipeError(f"there is no option `{unknown}`", _closest_option(unknown, _options(unknown)))
    invalid = next((e for e in chain if isinstance(e, omegaconf.errors.ValidationError)), None)
    if invalid is not None and name:
        return RecipeError(
            f"{name}: {_first_line(invalid)}", "give a value of the option's type; `--cfg job` shows them all"
        )
    if isinstance(cause, omegaconf.errors.MissingMandatoryValue) or MISSING in text:
        return RecipeError(f"`{name}` has no value", f"set it in the recipe, or add {name}=VALUE")
    return RecipeError(
        _first_line(cause), "`--cfg job` shows the composed recipe, `--info defaults` its defaults lists"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the original one last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
