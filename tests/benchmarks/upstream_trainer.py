"""Upstream's trainer, the PyPI package speculators 0.9: what it reads, and a run of it as a benchmark wants it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from speculators.data.token_table import save_table, write_table
from speculators.drafts.base import Vocabulary
from speculators.features.dataloader import DataLoader
from speculators.features.shards import ShardReader
from speculators.features.upstream import STATES, hidden_states_path

WARM = 3
"""Steps that are not counted."""
PEAK = "peak bytes "


def export(
    corpus: DataLoader,
    features: ShardReader,
    rows: Sequence[int],
    held: Sequence[int],
    vocabulary: Vocabulary,
    root: Path,
) -> float:
    """Write everything as it reads it, held out rows last, where it splits; returns the share before them."""
    directory = root / "rows"
    (directory / STATES).mkdir(parents=True)

    def table() -> Iterator[dict[str, object]]:
        for place, row in enumerate([*rows, *held]):
            token_ids, length = features.token_ids(row), features.length(row)
            states = features.hidden_states(row).to(torch.bfloat16).nan_to_num(nan=0.0)
            save_file({STATES: states, "token_ids": token_ids.contiguous()}, hidden_states_path(directory, place))
            mask = corpus.table.loss_mask(row)[:length].tolist()
            yield {"input_ids": token_ids.tolist(), "loss_mask": mask, "seq_len": length}

    write_table(table(), root / "rows.arrow")
    save_table(root / "rows.arrow", directory, row_format="torch")
    np.save(root / "d2t.npy", vocabulary.d2t.numpy())
    np.save(root / "t2d.npy", vocabulary.t2d.numpy())
    return (len(rows) + 0.5) / (len(rows) + len(held))


def run(
    python: str, root: Path, flags: dict[str, object], words: Sequence[object], driver: Path | None, told: str = ""
) -> tuple[float, int]:
    """Train on what `export` wrote in `root`.

    Args:
        python: of an environment that has it.
        root: also the working directory.
        flags: without their two dashes.
        words: further words of the command line.
        driver: a script that lets it run without an accelerator on import, since it refuses to by itself.
        told: statements that come first.

    Returns:
        tokens/s in its steps, as it counts them, and the most memory on a GPU, in bytes.
    """
    script = root / "upstream.py"
    driven = f"sys.path.insert(0, {str(driver.parent)!r})\nimport {driver.stem}" if driver else ""
    # Processes that load data import the script, and need what the driver does on import.
    script.write_text(
        f"""import sys
{told}
{driven}
if __name__ == "__main__":
    import torch
    from speculators.train.cli import main
    from speculators.train.config import TrainConfig
    main(TrainConfig.resolve(sys.argv[1:]))
    print({PEAK!r} + str(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))
"""
    )
    every = {
        "data-path": root / "rows", "d2t-path": root / "d2t.npy", "t2d-path": root / "t2d.npy", "on-missing": "raise",
        "num-workers": 1, "epochs": 1, "log-dir": root / "logs", **flags,
    }  # fmt: skip
    command = [python, str(script), *(text for name, value in every.items() for text in (f"--{name}", str(value)))]
    done = subprocess.run(
        [*command, *map(str, words)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "COLUMNS": "2000"}, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    timed = re.findall(r"step_ms=([\d.e+]+).*?tokens_per_s=([\d.e+]+)", said)
    timed = timed[WARM:] or timed[-1:]
    seconds = [float(ms) / 1000 for ms, _ in timed]
    rate = sum(s * float(each) for s, (_, each) in zip(seconds, timed, strict=True)) / sum(seconds)
    return rate, int(re.findall(PEAK + r"(\d+)", said)[-1])
