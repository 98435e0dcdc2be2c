"""lock: write down what a recipe comes to, so that a run can refuse anything else."""

from __future__ import annotations

import dataclasses
import json

from speculators import ui
from speculators.config import composed
from speculators.errors import RecipeError
from speculators.job import write_json
from speculators.runner.planning import lockfile as locks
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import open_store


def lock(words: list[str]) -> int:
    """Write `<recipe>.lock.json` in the working directory; starts nothing."""
    config = composed.compose_cached([word for word in words if word != "--json"])
    # A lock is of the whole recipe, whatever part of it would be run.
    config = dataclasses.replace(config, force=[], from_="", until="", only="")
    plain = locks.lock_contents(Planner(config, open_store(config.run)))
    path = locks.lock_path(config)
    try:
        write_json(path, plain)
    except OSError as error:
        hint = "lock it in a directory that you may write to"
        raise RecipeError(f"{path} cannot be written: {error.strerror}", hint) from None
    if "--json" in words:
        print(json.dumps(plain, indent=1))
    known = sum(stage["key"] is not None for stage in plain["stages"].values())
    ui.narrate("locked", str(path), f"{known} of {len(plain['stages'])} keys known")
    return 0
