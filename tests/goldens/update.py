"""Write goldens anew, where numbers are meant to move: `python -m tests.goldens.update NAME...`; `--help` has NAMES."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from speculators.config import compose
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store
from tests.config.test_schema import NEUTRALS, neutral_values
from tests.data import test_golden_packs
from tests.features import test_golden_encoding
from tests.goldens import captures, stages
from tests.runner.planning.test_key import GOLDEN, RECIPES, keys, words

TESTS = Path(__file__).parents[1]


def write_keys() -> None:
    """The keys of every shipped recipe."""
    with tempfile.TemporaryDirectory() as empty:
        table = {name: keys(Planner(compose.compose(words(name)), Store(Path(empty)))) for name in RECIPES}
    GOLDEN.write_text(json.dumps(table, indent=1) + "\n")


def write_losses() -> None:
    """Losses of small trainings."""
    sys.path[:0] = [str(TESTS / "training"), str(TESTS / "drafts")]  # as pytest does
    import test_golden_losses

    test_golden_losses.update()


def write_neutrals() -> None:
    """The values with which `if_set` options are left out of keys."""
    NEUTRALS.write_text(json.dumps(neutral_values(), indent=1) + "\n")


GOLDENS: dict[str, Callable[[], None]] = {
    "keys": write_keys,
    "neutrals": write_neutrals,
    "losses": write_losses,
    "encodings": test_golden_encoding.update,
    "packs": test_golden_packs.update,
    "captures": captures.update,
}


def main() -> str:
    """Write what the command line names; gives what is wrong, if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens.update", description=__doc__)
    names = [*GOLDENS, "stages"]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--same-output", default="", metavar="WHY", help="the output of every changed stage is the same"
    )
    arguments = parser.parse_args()
    for name in arguments.names:
        if name != "stages":
            GOLDENS[name]()
    return stages.update(arguments.same_output) if "stages" in arguments.names else ""


if __name__ == "__main__":
    sys.exit(main())
