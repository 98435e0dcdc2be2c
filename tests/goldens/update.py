"""Write the goldens anew, when a key is meant to move or a stage changed: `python tests/goldens/update.py`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from speculators.config import compose
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store
from tests import test_stage_versions
from tests.runner.planning.test_key import GOLDEN, RECIPES, keys, words

with tempfile.TemporaryDirectory() as empty:
    table = {name: keys(Planner(compose.compose(words(name)), Store(Path(empty)))) for name in RECIPES}
GOLDEN.write_text(json.dumps(table, indent=1) + "\n")
test_stage_versions.GOLDEN.write_text(json.dumps(test_stage_versions.recorded(), indent=1) + "\n")
