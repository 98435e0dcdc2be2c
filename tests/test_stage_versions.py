"""A stage whose source changed either has a new version, or somebody said that its output is the same.

`python -m tests.goldens.update stages` says so: it records the new source under the old version, in a diff.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from speculators.runner.planning.graph import KINDS

GOLDEN = Path(__file__).parent / "goldens" / "stages.json"
STAGES = Path(__file__).parent.parent / "speculators" / "stages"


def recorded() -> dict[str, list[object]]:
    """Version and digest of the source of every stage, as they are now."""
    return {
        stage: [kind.version, hashlib.sha256((STAGES / f"{stage}.py").read_bytes()).hexdigest()]
        for stage, kind in KINDS.items()
    }


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_a_changed_stage_has_a_new_version_or_says_that_its_output_is_the_same(stage: str) -> None:
    assert recorded()[stage] == json.loads(GOLDEN.read_text())[stage], (
        f"stages/{stage}.py changed: raise its version in runner/planning/graph.py if its output differs, "
        "then run `python -m tests.goldens.update stages`"
    )
