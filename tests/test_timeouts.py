"""Timeouts and polling intervals of the runner are defined in `speculators/timeouts.py` and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

RUNNER = Path(__file__).parent.parent / "speculators/runner"
EXEMPT = ("guard.py", "environment.py", "doctor.py", "sources.py")
"""`guard` and `environment` run without this package or before it; the other two are not moved yet."""
NAMES = re.compile("TIMEOUT|GRACE|INTERVAL|DEADLINE|HEARTBEAT|POLL")


def test_the_runner_defines_no_timeout_of_its_own() -> None:
    bad = []
    for path in (path for path in sorted(RUNNER.rglob("*.py")) if path.name not in EXEMPT):
        tree = ast.parse(path.read_text())
        assigned = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        targets = [name.id for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name)]
        bad += [f"{path.name}: {name}" for name in targets if NAMES.search(name)]
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
                bad += [f"{path.name}:{node.value.lineno}: timeout={node.value.value}"] if node.value.value != 0 else []
    assert bad == []
