"""Whether this tree makes the same bytes as the tree that filled a store, from the same inputs.

    python tests/benchmarks/same_bytes.py STORE RECIPE [KEY=VALUE ...]

STORE holds the artifacts of an earlier `speculators-run recipe=RECIPE until=train` with the same choices, whose options
may have had other names. The stages `tokenize`, `vocab`, `collect` and `train` are run here, each on the inputs that
the earlier one had, and the sha256 of every file that each leaves is compared with the earlier manifest. Files whose
content is the names of options or the time (`summary.json`) are listed, not compared. Exit code 1 if a file differs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from speculators import worker
from speculators.config import compose
from speculators.job import Job
from speculators.runner.planning import derive
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store

STAGES = ("tokenize", "vocab", "collect", "train")
TIMED = ("summary.json", "metrics.jsonl", "config.json")


class Past:
    """The artifacts that the earlier tree left."""

    def __init__(self, root: Path, algorithm: str) -> None:
        self.root, self.algorithm = root, algorithm
        paths = sorted(root.glob("artifacts/*/*/*/artifact.json"), key=lambda path: path.stat().st_mtime)
        self.artifacts: list[tuple[Path, dict[str, Any]]] = [
            (path.parent, json.loads(path.read_text())) for path in paths
        ]

    def of(self, stage: str) -> tuple[Path, dict[str, Any]]:
        """The newest artifact of a stage; of `train`, the newest of the algorithm."""
        fits = [
            pair
            for pair in self.artifacts
            if pair[1]["stage"] == stage
            and pair[1]["preimage"]["config"].get("speculator.algorithm", self.algorithm) == self.algorithm
        ]
        if not fits:
            sys.exit(f"error: {self.root} has no artifact of {stage}")
        return fits[-1]

    def inputs(self, artifact: dict[str, Any]) -> dict[str, Path]:
        """Input name -> directory of its data."""
        by_key = {plain["key"]: path / "data" for path, plain in self.artifacts}
        return {name: by_key[key] for name, key in artifact["provenance"]["inputs"].items()}


def hashes(data: Path) -> dict[str, str]:
    """Path below `data` -> sha256 of the file."""
    files = sorted(path for path in data.rglob("*") if path.is_file())
    return {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stages:
    """Jobs that run a recipe's stages on the inputs that an earlier tree's artifacts had."""

    def __init__(self, store: str, recipe: str, overrides: list[str], scratch: Path) -> None:
        self.config = compose.compose([f"recipe={recipe}", *overrides])
        self.past, self.scratch = Past(Path(store), self.config.speculator.algorithm), scratch
        self.planner = Planner(self.config, Store(scratch / "store"))
        facts = derive.facts(self.config, self.past.inputs(self.past.of("tokenize")[1])["target"])
        assert facts is not None
        self.derived = derive.derive(self.config, facts)

    def run(self, stage: str) -> tuple[Job, Path]:
        """Run a stage; returns its job, and the data of the earlier artifact."""
        path, before = self.past.of(stage)
        job = Job(
            node=next(node.name for node in self.planner.graph.values() if node.kind == stage),
            stage=stage,
            key="0" * 64,
            config=self.config,
            derived={**self.derived, "phase": 0, "phases": 1, "verifier": {"name": "", "revision": ""}},
            inputs=self.past.inputs(before),
            digests=before["preimage"]["inputs"],
            services={},
            work=self.scratch / stage,
        )
        for directory in (job.output, job.scratch):
            directory.mkdir(parents=True)
        worker._stage(job)
        return job, path / "data"


def main(store: str, recipe: str, *overrides: str) -> int:
    """Run the stages one after the other and print a line for each file."""
    differing = 0
    with tempfile.TemporaryDirectory() as scratch:
        stages = Stages(store, recipe, list(overrides), Path(scratch))
        for name in STAGES:
            job, data = stages.run(name)
            old, new = hashes(data), hashes(job.output)
            for file in sorted(old | new):
                same = old.get(file) == new.get(file)
                timed = Path(file).name in TIMED and file in old and file in new
                differing += not same and not timed
                verdict = "same" if same else "text" if timed else "DIFFERS"
                print(f"{verdict:<8} {name:<9} {file} {new.get(file, '')[:16]}", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
