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
from tests import test_stage_versions
from tests.data import test_golden_packs
from tests.features import test_golden_encoding
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


def write_stages() -> None:
    """Versions and sources of the stages."""
    test_stage_versions.GOLDEN.write_text(json.dumps(test_stage_versions.recorded(), indent=1) + "\n")


GOLDENS: dict[str, Callable[[], None]] = {
    "keys": write_keys,
    "losses": write_losses,
    "encodings": test_golden_encoding.update,
    "packs": test_golden_packs.update,
    "stages": write_stages,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.goldens.update", description=__doc__)
    parser.add_argument("names", nargs="+", choices=GOLDENS, metavar="NAME", help=", ".join(GOLDENS))
    for name in parser.parse_args().names:
        GOLDENS[name]()
