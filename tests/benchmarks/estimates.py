"""What `plan` expects beside what came. `python -m tests.benchmarks.estimates STORE recipe=NAME [KEY=VALUE ...]`.

STORE holds a finished run of the recipe with these overrides, and another run (another size, say) that the expectation
comes from: the artifacts of the run itself are hidden from the estimate.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators.config import compose
from speculators.runner.planning.estimate import Needs, estimate
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store


class WithoutRun(Store):
    """A store without the artifacts of these keys."""

    hidden: frozenset[str] = frozenset()

    def find(self, stage: str, key: str) -> Artifact | None:
        return None if key in self.hidden else super().find(stage, key)

    def artifacts(self, stage: str) -> Iterator[Artifact]:
        return (artifact for artifact in super().artifacts(stage) if artifact.key not in self.hidden)


def wall_seconds(artifact: Artifact) -> float:
    """From the time that the stage got its devices, or that its worker began, to its end."""
    provenance = artifact.provenance
    ends = [datetime.datetime.fromisoformat(provenance[n]) for n in ("finished", "began") if n in provenance]
    return (ends[0] - ends[1]).total_seconds() if len(ends) == 2 else float(artifact.record["seconds"])


def row(name: str, expected: float | None, came: float) -> str:
    ratio = f"{expected / came:8.2f}" if expected and came else "       -"
    return f"{name:24}{'unknown' if expected is None else f'{expected:,.0f}':>14}{came:>14,.0f}{ratio}"


def main(root: str, words: list[str]) -> str:
    """The table; a message if the run is not finished."""
    config = compose.compose(words)
    finished: dict[str, Step] = {step.node.name: step for step in Planner(config, Store(Path(root))).plan()}
    if missing := [name for name, step in finished.items() if step.path is None]:
        return f"not in the store: {', '.join(missing)}"
    store = WithoutRun(Path(root))
    store.hidden = frozenset(s.key for s in finished.values() if s.node.kind != "fetch")
    planner = Planner(config, store)
    needs: Needs = estimate(planner, {step.node.name: step for step in planner.plan()})
    table = next(s.artifact for s in finished.values() if "tokens" in s.node.spec.gives and s.artifact)
    print(f"{'':24}{'expected':>14}{'came':>14}{'ratio':>8}")
    print(row(f"tokens ({needs.tokens_from})", needs.tokens, table.record["tokens"]))
    for name, seconds in needs.stage_seconds.items():
        artifact: Any = finished[name].artifact
        print(row(f"{name}, s", seconds, wall_seconds(artifact)))
    for name, size in needs.stage_bytes.items():
        artifact = finished[name].artifact
        print(row(f"{name}, bytes", size, artifact.bytes))
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
