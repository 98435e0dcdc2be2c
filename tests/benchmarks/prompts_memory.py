"""Peak memory and time of `prompts` over many short rows, without a number of conversations, so that all are kept.

    python tests/benchmarks/prompts_memory.py [ROWS]

Writes JSON lines with one short prompt each (a million, unless ROWS says otherwise) into a temporary directory, runs
the stage on them in a process of its own, and prints its peak resident size, and that of one over a thousand rows.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speculators.config.schema import Config, Dataset
from speculators.stages import prompts
from tests.stages.jobs import make_job


def measure(rows: int, directory: Path) -> None:
    """Run the stage and print what it took."""
    path = directory / f"{rows}.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"id": {i}, "prompt": "What is {i} plus {i % 97}?"}}\n' for i in range(rows))
    config = Config()
    config.data = {"mine": Dataset(source="x")}
    job = make_job("prompts", directory / f"w{rows}", config, dataset__mine=path)
    start = time.monotonic()
    prompts.main(job)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{job.record['kept']:9} of {rows:9} rows kept, {seconds:6.1f} s, peak {peak:6.0f} MiB", flush=True)


def main() -> None:
    """Measure a few rows and many."""
    for rows in ("1000", sys.argv[1] if len(sys.argv) > 1 else "1000000"):
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run([sys.executable, __file__, rows, directory], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
