"""Time from a recipe of the README's form, with own target and own conversations, to a measured draft on a CPU.

    python -m tests.benchmarks.own_target [OPTION=VALUE ...]

The target is the tiny Gemma 4 of random weights of `tests/smoke/tiny_gemma.py`; there are 60 conversations. Store and
runs are in a temporary directory. Prints the end of the run and its wall time in seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.smoke import tiny_gemma

RECIPE = """# @package _global_
target: {source: ./target}
data: {mine: {source: ./rows.jsonl, format: messages}}
evaluate: {datasets: [mine]}
"""
SUBJECTS = ("kettle", "bridge", "clock", "garden", "lamp", "engine")


def conversation(number: int) -> dict[str, object]:
    """A row of the format `messages`."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    question = {"role": "user", "content": f"How does a {subject} work? Answer {number} in a few words."}
    return {"id": f"row-{number}", "messages": [question, {"role": "assistant", "content": f"A {subject} is simple."}]}


def main(*overrides: str) -> int:
    """Run the recipe in a temporary directory; gives the run's exit code."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tiny_gemma.write(directory / "target")
        (directory / "rows.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(60)))
        (directory / "mine.yaml").write_text(RECIPE)
        command = [sys.executable, "-m", "speculators.cli", "recipe=mine.yaml", "run.store=store", *overrides]
        began = time.monotonic()
        code = subprocess.run(command, cwd=directory, check=False).returncode
        print(f"{time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
