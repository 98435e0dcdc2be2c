"""Peak memory of the loss, forward and backward, by the size of the vocabulary.

    python tests/benchmarks/loss_memory.py

Every line is a process of its own on one thread: states, head and predictions are made, the peak is reset
(/proc/self/clear_refs), `distill` and its backward run, and the peak resident size above what was there before is
read (VmHWM). glibc is told to give every block back at once, so that a block counts as long as it lives. What a head
that is trained takes for its gradient is told apart. What is left is shown in bytes and in chunks of logits, and should
not grow with the vocabulary; beside it, what one tensor [tokens, vocabulary] alone would take. All in float32: mixed
precision adds a copy of the head in its own format.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from speculators.config.algorithms import Loss
from speculators.drafts.base import Predictions
from speculators.ops.distillation import CHUNK_ELEMENTS, TargetHead
from speculators.training.losses import distill

SIZES = (32_000, 151_936, 262_144)
WIDTH, TOKENS, STEPS = 256, 64, 3
MIXTURE = {Loss.kl: 0.7, Loss.tv: 0.3}
CASES = {
    "kl": ({Loss.kl: 1.0}, False),
    "ce": ({Loss.ce: 1.0}, False),
    "kl + tv": (MIXTURE, False),
    "kl + tv, head trained": (MIXTURE, True),
}
MIB = 2**20


def resident(name: str) -> int:
    """Bytes, from /proc: `VmRSS` now, or `VmHWM` at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(case: str, size: int) -> tuple[int, int]:
    """Peak above what was there before, and the head's own share of it; bytes."""
    torch.set_num_threads(1)
    losses, trained = CASES[case]
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(size, WIDTH, generator=draw)
    last = torch.randn(TOKENS, WIDTH, generator=draw).bfloat16()
    hidden = torch.randn(STEPS, TOKENS, WIDTH, generator=draw).requires_grad_()
    place = torch.arange(TOKENS).expand(STEPS, TOKENS)
    teacher = TargetHead(norm_weight=torch.ones(WIDTH), norm_eps=1e-6, head=head)
    given = head.clone().requires_grad_() if trained else head
    weight = torch.full((STEPS, TOKENS), 1.0 / TOKENS)
    found = Predictions(hidden_states=hidden, target_index=place, valid=place >= 0, weight=weight)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    distill(found, last, given, teacher, losses).loss.backward()
    own = 2 * 4 * head.numel() * trained  # a gradient, and the product with its upstream
    return resident("VmHWM") - before, own


def main() -> None:
    """Print one line for every case and size."""
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1], int(sys.argv[2])))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    chunk = 4 * CHUNK_ELEMENTS["cpu"]
    print(f"{STEPS} x {TOKENS} predictions, width {WIDTH}, chunks of {chunk // MIB} MiB")
    print(
        f"{'loss':24}{'vocabulary':>12}{'peak MiB':>10}{'head MiB':>10}{'left MiB':>10}{'chunks':>8}{'whole MiB':>11}"
    )
    for case in CASES:
        for size in SIZES:
            command = [sys.executable, __file__, case, str(size)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            peak, own = map(int, done.stdout.split())
            left, whole = peak - own, 4 * STEPS * TOKENS * size
            figures = f"{peak / MIB:10.0f}{own / MIB:10.0f}{left / MIB:10.0f}{left / chunk:8.1f}{whole / MIB:11.0f}"
            print(f"{case:24}{size:12d}{figures}", flush=True)


if __name__ == "__main__":
    main()
