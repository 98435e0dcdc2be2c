"""lock: record what a recipe resolves to, so that `run.locked` can refuse changes."""

from __future__ import annotations

import dataclasses
import json

from speculators import ui
from speculators.config import composed
from speculators.errors import RecipeError
from speculators.job import write_json
from speculators.runner.planning import lockfile as locks
from speculators.runner.planning.plan import Planner
from speculators.runner.planning.sources import Hub, lock_path
from speculators.runner.store.artifacts import open_store
from speculators.verbs import usage


def lock(argv: list[str]) -> int:
    """Write `<recipe>.lock.json` in the working directory; starts nothing."""
    arguments = usage.parse("lock", argv)
    config = composed.compose_cached(arguments.overrides)
    # The lock covers all stages, whichever of them these options select.
    config = dataclasses.replace(config, force=[], from_="", until="", only="")
    planner = Planner(config, open_store(config.run), Hub())  # asks the hub again, whatever the old lock has
    planner.refuse_unresolved()
    contents = locks.lock_contents(planner)
    path = lock_path(config.recipe)
    try:
        write_json(path, contents)
    except OSError as error:
        hint = "run the command in a writable directory"
        raise RecipeError(f"{path} cannot be written: {error.strerror}", hint) from None
    if arguments.as_json:
        print(json.dumps(contents, indent=1))
    known = sum(stage["key"] is not None for stage in contents["stages"].values())
    ui.narrate("locked", str(path), f"{known} of {len(contents['stages'])} keys known")
    return 0
