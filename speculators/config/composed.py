"""Recipes that were composed before. Importing Hydra and composing take longer than all else of a run that finds
everything, so what a run composed is kept, under the digest of all that it was composed from.

That is: the words, every recipe and every choice there is, our own schemas, and the versions of what composes. What
may come out otherwise a second time is not kept: recipes that ask the environment or the clock (`${oc.env:NAME}`), or
that set Hydra itself. `plan`, which writes nothing, only looks.
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
from speculators.config.fields import to_plain
from speculators.config.schema import Config, from_plain
from speculators.packages import installed_version
from speculators.runner.store.artifacts import store_root

KEPT = 100
"""Compositions that are kept, the latest ones."""
_NOT_THE_SAME_TWICE = re.compile(rb"\$\{[\w.]+:|\bhydra[./:]")
_COMPOSERS = ("hydra-core", "omegaconf", "pyyaml", "antlr4-python3-runtime")


def compose(words: Sequence[str], keep: bool = False) -> Config:
    """See `compose.compose`; without Hydra if a run has composed the same. `keep`: it may be kept for the next time.

    Raises:
        RecipeError: as `compose.compose`.
    """
    place = _place(words)
    if place is not None:
        try:
            return from_plain(Config, json.loads(place.read_text()))
        except (OSError, ValueError):
            pass  # not there, or not whole: it is composed again
    from speculators.config import compose as recipe

    config = recipe.compose(words)
    if place is not None and keep:
        _keep(place, config)
    return config


def _place(words: Sequence[str]) -> Path | None:
    """Where the composition of these words is kept; None if it may not be."""
    try:
        recipes = {name: path.read_bytes() for name, path in _recipes(words)}
        ours = {str(path): path.read_bytes() for path in _ours()}
    except OSError:
        return None  # whoever composes has the words for it
    if any(_NOT_THE_SAME_TWICE.search(text) for text in (*map(os.fsencode, words), *recipes.values())):
        return None
    made_of = [list(words), [installed_version(name) for name in _COMPOSERS]]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for name, text in (*recipes.items(), *ours.items()):
        digest.update(hashlib.sha256(os.fsencode(name)).digest() + hashlib.sha256(text).digest())
    # Beside the store of whoever names none: which one is meant is what composing tells.
    store = store_root("")
    return store.with_name(f"{store.name}-composed") / f"{digest.hexdigest()}.json"


def _recipes(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """All recipes by name, and those that the words name by path."""
    yield from sorted(shipped.available().items())
    for word in words:
        if word.startswith("recipe=") and word.endswith((".yaml", ".yml")):
            yield word, Path(word.removeprefix("recipe=")).expanduser()


def _ours() -> list[Path]:
    """The choices, and the modules that hold schemas and checks."""
    return [*sorted(shipped.CONF.rglob("*.yaml")), *sorted(Path(__file__).parent.glob("*.py"))]


def _keep(place: Path, config: Config) -> None:
    """Write it whole, and let go of the oldest; where that cannot be done, it is composed again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
            json.dump(to_plain(config), file)
        os.replace(file.name, place)
        by_age = sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-KEPT]:
            path.unlink(missing_ok=True)
    except OSError:
        pass
