"""Recipes: the only door to Hydra. From words on a command line to a checked `Config`.

Recipes are looked up by name in the shipped `recipes/` and in `./recipes`, or given as a path; each becomes an
option of Hydra's group `recipe`. Composition is Hydra's; the types are `schema.Config`'s; whatever either of
them says about a mistake is turned into one `error:` that names the whole key and one `hint:` that mends it.
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
from speculators.config.checks import check
from speculators.config.fields import MISSING, leaves
from speculators.config.schema import Config, Dataset, Evaluate, Executor, from_plain
from speculators.config.shipped import CONF, available
from speculators.errors import RecipeError, closest
from speculators.packages import installed_version

_VERSION_BASE = "1.3"
_OPEN = ("data.", "pipeline.")
"""Sections whose keys are names that the recipe gives."""
_GROUPS = ("target", "data", "speculator", "pipeline", "hardware", "executor")
_HYDRA_S_OWN = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")
"""Choices about Hydra itself. Where it only composes nothing asks for them, and reading them is a tenth of its time."""
_LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "joblib"),
    "submitit_local": ("hydra-submitit-launcher", "sweep-slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "sweep-slurm"),
    "ray": ("hydra-ray-launcher", "sweep-ray"),
}
"""Launchers of sweeps: the distribution that has one, and the extra that brings it."""

# Every composition copies where Hydra looks, this store and all schemas with it, and then copies what it takes again.
ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]


@dataclass(kw_only=True, slots=True)
class _EvaluateAsWritten(Evaluate):
    """A list and no mapping, since a list on the command line replaces the recipe's, and a mapping adds to it."""

    datasets: list[Any] = field(default_factory=list)  # type: ignore[assignment]


@dataclass(kw_only=True, slots=True)
class _Written(Config):
    """`Config` as recipes write it, for Hydra."""

    evaluate: Evaluate = field(default_factory=_EvaluateAsWritten)


def compose(words: Sequence[str]) -> Config:
    """The recipe that `words` (`recipe=NAME`, `train.lr=3e-4`) ask for, typed and complete.

    Raises:
        RecipeError: no such recipe, option or choice, a value of the wrong type, or one that is missing.
    """
    words, known = _register(words)
    _check_overrides(words, known)
    try:
        with _initialized():
            overrides = [*words, *(f"~hydra/{group}" for group in _HYDRA_S_OWN)]
            composed = hydra.compose(config_name="config", overrides=overrides)
        return typed(composed)
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _mended(error) from None


def run_as_hydra_app(words: Sequence[str], task: Callable[[Config], Any]) -> Any:
    """Hand the command line to Hydra itself: `--cfg`, `--info`, `--help`, tab completion.

    `task` gets the typed recipe. Its exceptions come out as they are.
    """
    arguments, known = _register(words)
    _check_overrides([w for w in arguments if "=" in w and not w.startswith("-")], known)
    sys.argv = [sys.argv[0], *arguments]
    failure: list[BaseException] = []

    def job(composed: DictConfig) -> Any:
        try:
            return task(typed(composed))
        except BaseException as error:
            # Hydra would print it its own way and exit; the caller knows better what to say.
            failure.append(error)
            return None

    app = hydra.main(version_base=_VERSION_BASE, config_path=str(CONF), config_name="config")(job)
    result = app()
    if failure:
        raise failure[0]
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job of a sweep, in whatever process its launcher has put it."""

    number: int
    words: list[str]
    """Its own overrides: what would run it alone."""
    composed: DictConfig

    def config(self) -> Config:
        """Its recipe.

        Raises:
            RecipeError: as `compose`.
        """
        return typed(self.composed)


def sweep(words: Sequence[str], directory: Path, task: Callable[[Job], None]) -> None:
    """`-m`: hand each job of a sweep to `task`, which the launcher may pickle and call in another process.

    Hydra and its launchers keep their own files in `directory`.

    Raises:
        RecipeError: before the first job, if one of them does not compose.
    """
    rewritten, known = _register(words)
    overrides = [word for word in rewritten if word not in ("-m", "--multirun")]
    _check_overrides([word for word in overrides if not word.startswith("-")], known, sweep=True)
    overrides += _launcher_settings(overrides)
    given = {Path(v).stem: v for w in words if w.startswith("recipe=") for v in w.removeprefix("recipe=").split(",")}

    def job(composed: DictConfig) -> None:
        plain = HydraConfig.get()
        own = [f"recipe={given.get(w[7:], w[7:])}" if w.startswith("recipe=") else w for w in plain.overrides.task]
        task(Job(number=int(plain.job.num), words=own, composed=composed))

    # Otherwise Hydra prints what goes wrong its own way, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra 1.3 does not take a flag between overrides.
    sys.argv = [sys.argv[0], "-m", f"hydra.sweep.dir='{directory}'", *overrides]
    try:
        hydra.main(version_base=_VERSION_BASE, config_path=str(CONF), config_name="config")(job)()
    except (HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _mended(error) from None


def _launcher_settings(overrides: Sequence[str]) -> list[str]:
    """What a launcher needs to be told unless the command line does: their own defaults are not for jobs like these."""
    launcher = next((word.partition("=")[2] for word in overrides if word.startswith("hydra/launcher=")), "")
    settings = {}
    if launcher == "joblib":  # by itself it starts ten processes
        settings["n_jobs"] = min(_count(overrides), os.cpu_count() or 1)
    elif launcher.startswith("submitit"):  # by itself it ends a job after an hour
        settings["timeout_min"] = Executor().time_limit
    given = {word.partition("=")[0] for word in overrides}
    return [f"hydra.launcher.{k}={v}" for k, v in settings.items() if f"hydra.launcher.{k}" not in given]


def _count(overrides: Sequence[str]) -> int:
    """The jobs that the values of a sweep make up."""
    parsed = OverridesParser.create().parse_overrides(overrides=[w for w in overrides if not w.startswith("-")])
    return math.prod(sum(1 for _ in o.sweep_string_iterator()) for o in parsed if o.is_discrete_sweep())


def typed(composed: DictConfig) -> Config:
    """The `Config` of what Hydra composed, with the data sets of `evaluate.datasets` filled in.

    Hydra merged it into the schema, so names and types hold already.
    """
    plain: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    plain["evaluate"]["datasets"] = _evaluation_datasets(plain["evaluate"]["datasets"], plain["data"])
    for name in sorted(_missing(plain)):
        raise RecipeError(f"`{name}` is not given", f"set it in the recipe, or say {name}=VALUE")
    config = from_plain(Config, plain)
    check(config)
    return config


def _missing(plain: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the options that have no value."""
    for name, value in plain.items():
        if value == MISSING:
            yield f"{prefix}{name}"
        elif isinstance(value, dict):
            yield from _missing(value, f"{prefix}{name}.")


def _register(words: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """Make the recipes and every schema known to Hydra; a recipe given by path becomes one by name.

    Of the recipes, those that are named, or all where Hydra may be asked what there is: reading YAML takes time.
    Gives the words with such a path replaced, and all recipes by name.
    """
    logging.getLogger("hydra").setLevel(logging.ERROR)
    store = ConfigStore.instance()
    store.store(name="schema", node=_Written)
    for algorithm, schema in SPECULATORS.items():
        store.store(group="speculator", name=f"{algorithm}_schema", node=schema)
    known = available()
    rewritten = []
    asked = set(known) if any(word.startswith("-") for word in words) else set()
    for word in words:
        key, _, value = word.partition("=")
        if key == "recipe":
            names = [_by_name(name, known) for name in value.split(",")]
            asked |= set(names) & set(known)
            word = f"recipe={','.join(names)}"
        elif key == "force" and not value.startswith("["):
            word = f"force=[{value}]"
        elif key == "evaluate.datasets" and not value.startswith("["):
            word = f"{key}=[{value}]"
        elif key == "from":
            word = f"from_={value}"  # `from` cannot be the name of a field
        rewritten.append(word)
    for name in sorted(asked):
        path = known[name]
        try:
            node = OmegaConf.load(path)
        except Exception as error:
            raise RecipeError(f"{path.name} is not YAML: {_first_line(error)}", "mend the file at that line") from None
        measured_on = OmegaConf.select(node, "evaluate.datasets")
        if isinstance(measured_on, DictConfig):  # the form that `data` has
            node.evaluate.datasets = [measured_on]
        store.store(group="recipe", name=name, node={**node, "recipe": name}, package="_global_")
    return rewritten, known


def _by_name(given: str, known: dict[str, Path]) -> str:
    """The name of a recipe; one that is given by path becomes known."""
    if not given.endswith((".yaml", ".yml")):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise RecipeError(f"no recipe at `{given}`", closest(path.stem, known))
    known[path.stem] = path
    return path.stem


def _initialized() -> Any:
    GlobalHydra.instance().clear()
    return hydra.initialize_config_dir(config_dir=str(CONF), version_base=_VERSION_BASE)


def _evaluation_datasets(items: list[Any], trained_on: dict[str, Any]) -> dict[str, Any]:
    """`evaluate.datasets` by name, complete, from names and definitions.

    Raises:
        RecipeError: no such data set, or an option of it that does not exist or has the wrong type.
    """
    datasets: dict[str, Any] = {}
    for item in items:
        for name, options in item.items() if isinstance(item, dict) else [(str(item), None)]:
            datasets[name] = _dataset(name, options) if options else trained_on.get(name) or _shipped_dataset(name)
    return datasets


def _shipped_dataset(name: str) -> Any:
    path = CONF / "data" / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"evaluate.datasets: there is no data set `{name}`", closest(name, _choices("data")))
    loaded: Any = OmegaConf.load(path)
    return _dataset(name, loaded[name])


def _dataset(name: str, options: Any) -> Any:
    """A data set with its defaults filled in."""
    full = f"evaluate.datasets.{name}"
    if not isinstance(options, Mapping):
        raise RecipeError(f"{full} is {options!r}", "define it by its options: {source: FILE, format: prompts}")
    schema, known = OmegaConf.structured(Dataset), [name for name, *_ in leaves(Dataset())]
    for option, value in options.items():
        if option not in known:
            raise RecipeError(f"there is no option `{full}.{option}`", closest(str(option), known))
        try:
            schema[option] = value
        except omegaconf.errors.ValidationError as error:
            raise RecipeError(f"{full}.{option}: {_first_line(error)}", "give a value of the option's type") from None
    return OmegaConf.to_container(schema, enum_to_str=True)


def _choices(group: str) -> list[str]:
    return [path.stem for path in (CONF / group).glob("*.yaml")]


def _options(near: str = "") -> set[str]:
    """Every dotted name that may be overridden, sections included; with those of the data set that `near` is one of."""
    if near.startswith("data.") and near.count(".") == 2:
        return {f"{near.rpartition('.')[0]}.{name}" for name, *_ in leaves(Dataset())}
    names = {name for name, *_ in leaves(Config())}
    for schema in SPECULATORS.values():
        names |= {f"speculator.{name}" for name, *_ in leaves(schema())}
    return names | {name.rsplit(".", 1)[0] for name in names if "." in name} | {"data", "pipeline"}


def _closest_option(name: str, options: set[str]) -> str:
    """Ours for a name of another tool; else the closest match; else what there is beside it: all are a screen full."""
    if ours := foreign_names.hint(name):
        return ours
    written = {option.rstrip("_") for option in options}  # `from`
    section = name.rpartition(".")[0]
    beside = [option for option in written if option.rpartition(".")[0] == section]
    return closest(name, written, beside or [option for option in written if "." not in option])


def _check_overrides(words: Sequence[str], known: Mapping[str, Path], sweep: bool = False) -> None:
    """Say what is wrong with a word before Hydra does: it would advise `+key`, which smuggles unknown keys in."""
    try:
        overrides = OverridesParser.create().parse_overrides(overrides=list(words))
    except HydraException as error:
        raise RecipeError(
            f"cannot read an override: {_first_line(error)}",
            "write KEY=VALUE; quote a value that has = , # or blanks: 'target.source=\"a b\"'",
        ) from None
    options = _options()
    if not any(o.key_or_group == "recipe" for o in overrides):
        raise RecipeError("no recipe is named", f"say recipe=NAME; there is: {', '.join(sorted(known))}")
    for override in overrides:
        _check_override(override, options, known, sweep)


def _check_override(override: Override, options: set[str], known: Mapping[str, Path], sweep: bool) -> None:
    name = override.key_or_group
    if name == "hydra/launcher":
        _check_launcher(str(override.value()))
    if name.startswith(("hydra.", "hydra/")):
        return
    if override.is_add() or override.is_force_add():
        raise RecipeError(f"`+{name}`: options cannot be added", _closest_option(name, options))
    if override.is_delete():
        raise RecipeError(f"`~{name}`: options cannot be taken away", "set the option to null, or to its default")
    if override.is_sweep_override() and not sweep:
        raise RecipeError(f"`{name}` has several values", "say -m to run one job for each value")
    if name in (*_GROUPS, "recipe"):
        _check_choice(name, override, known)
    elif name not in options and not name.startswith(_OPEN):
        raise RecipeError(f"there is no option `{name}`", _closest_option(name, options))


def _check_choice(name: str, override: Override, known: Mapping[str, Path]) -> None:
    """A group or the recipe: one choice, a list of them, or one for each job of a sweep."""
    if override.is_discrete_sweep():
        chosen: Any = [value for value in override.sweep_string_iterator() if not value.startswith("[")]
    else:
        chosen = override.value()
    choices = list(known) if name == "recipe" else _choices(name)
    for choice in chosen if isinstance(chosen, list) else [chosen]:
        if isinstance(choice, str) and choice not in choices:
            what = "recipe" if name == "recipe" else f"choice for {name}"
            raise RecipeError(f"no {what} named `{choice}`", closest(choice, choices))


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


def _mended(error: Exception) -> RecipeError:
    """Hydra's and OmegaConf's own words, cut to what the person who typed the recipe needs."""
    chain = list(_chain(error))
    text, cause = "\n".join(str(e) for e in chain), chain[-1]
    name = next((found for e in chain if (found := getattr(e, "full_key", None))), None)
    if found := re.search(r"Could not find '(?:(\w+)/)?([^']+)'", text):
        group, choice = found[1] or "recipe", found[2]
        return RecipeError(f"no choice for {group} named `{choice}`", closest(choice, _choices(group)))
    if found := re.search(r"You must specify '(\w+)'", text):
        return RecipeError(
            f"the recipe makes no choice for `{found[1]}`",
            f"add `override /{found[1]}: NAME`; " + closest("", _choices(found[1])),
        )
    if found := re.search(r"Key '([^']+)' (?:not in|is not in)", text):
        wrong = str(name or found[1])
        return RecipeError(f"there is no option `{wrong}`", _closest_option(wrong, _options(wrong)))
    invalid = next((e for e in chain if isinstance(e, omegaconf.errors.ValidationError)), None)
    if invalid is not None and name:
        return RecipeError(
            f"{name}: {_first_line(invalid)}", "give a value of the option's type; `--cfg job` shows them all"
        )
    if isinstance(cause, omegaconf.errors.MissingMandatoryValue) or MISSING in text:
        return RecipeError(f"`{name}` is not given", f"set it in the recipe, or say {name}=VALUE")
    return RecipeError(_first_line(cause), "`--cfg job` shows the composed recipe, `--info defaults` how it came about")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from, the origin last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
