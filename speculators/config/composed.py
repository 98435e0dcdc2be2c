"""Cache of composed recipes, since importing Hydra and composing take longer than the rest of a fully cached run.

The key is the digest of everything that determines the result: overrides, all recipes and choices, the modules of this
package, and the versions of the composing libraries. Recipes that read the environment or the clock (`${oc.env:NAME}`)
or configure Hydra are not cached. `plan`, which writes nothing, only reads the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from speculators.config import shipped
from speculators.config.fields import to_builtins
from speculators.config.schema import Config, from_builtins
from speculators.packages import installed_version
from speculators.runner.planning import sources
from speculators.runner.store.artifacts import store_root

CACHE_SIZE = 100
"""Compositions that are kept, the most recent ones."""
_NOT_REPRODUCIBLE = re.compile(rb"\$\{[\w.]+:|\bhydra[./:]")
_COMPOSERS = ("hydra-core", "omegaconf", "pyyaml", "antlr4-python3-runtime")


def compose_cached(overrides: Sequence[str], write: bool = False) -> Config:
    """Compose a recipe as `compose.compose` does, without Hydra if the result is cached. `write`: add it to the cache.

    Raises:
        RecipeError: as `compose.compose`.
    """
    path = _cache_path(overrides)
    if path is not None:
        try:
            return from_builtins(Config, json.loads(path.read_text()))
        except (OSError, ValueError):
            pass  # absent or damaged: composed again
    from speculators.config.compose import compose

    config = compose(overrides)
    if path is not None and write:
        _write(path, config)
    return config


def _cache_path(overrides: Sequence[str]) -> Path | None:
    """Cache file of the composition of these overrides; None if it must not be cached."""
    try:
        recipes = {str(path): path.read_bytes() for path in _recipes(overrides)}
        modules = {str(path): path.read_bytes() for path in _choices_and_modules()}
    except OSError:
        return None  # composing reports the error
    if any(_NOT_REPRODUCIBLE.search(text) for text in (*map(os.fsencode, overrides), *recipes.values())):
        return None
    inputs = [list(overrides), [installed_version(name) for name in _COMPOSERS]]
    digest = hashlib.sha256(json.dumps(inputs).encode())
    for name, text in (*recipes.items(), *modules.items()):
        digest.update(hashlib.sha256(os.fsencode(name)).digest() + hashlib.sha256(text).digest())
    # Next to the default store: `run.store` is known only after composing.
    store = store_root("")
    return store.with_name(f"{store.name}-composed") / f"{digest.hexdigest()}.json"


def _recipes(overrides: Sequence[str]) -> Iterator[Path]:
    """All recipes, and the ones given by path with those in the same directory that they mention.

    The paths are absolute, because the sources in a recipe may be relative to it.
    """
    yield from sorted(path.absolute() for path in shipped.available().values())
    for override in overrides:
        if override.startswith("recipe=") and override.endswith((".yaml", ".yml")):
            paths = [Path(override.removeprefix("recipe=")).expanduser().absolute()]
            for path in paths:  # grows
                text = path.read_text(errors="replace")
                siblings = sorted(path.parent.glob("*.yaml"))
                paths += [sibling for sibling in siblings if sibling.stem in text and sibling not in paths]
            yield from paths


def _choices_and_modules() -> list[Path]:
    """The choices, and the modules with schemas and checks."""
    conf = [folder for folder in (shipped.CONF, shipped.own_conf()) if folder is not None]
    choices = [path for folder in conf for path in sorted(folder.rglob("*.yaml"))]
    return [*choices, *sorted(Path(__file__).parent.glob("*.py")), Path(sources.__file__)]


def _write(path: Path, config: Config) -> None:
    """Write a cache file atomically and delete the oldest ones; without write access, nothing is cached."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(to_builtins(config), file)
        os.replace(file.name, path)
        by_age = sorted(path.parent.iterdir(), key=lambda file_path: file_path.stat().st_mtime)
        for old in by_age[:-CACHE_SIZE]:
            old.unlink(missing_ok=True)
    except OSError:
        pass
