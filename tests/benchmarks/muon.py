"""CPU time of Muon's orthogonalisation in float32 by its two methods, for the matrices of the demo's drafts.

    python tests/benchmarks/muon.py [ROUNDS]

The methods, chain of quintics and rational function, take turns on one thread, whose CPU time other work on the machine
disturbs least. A line for each draft and `train.muon_block`: median milliseconds of either, their ratio, and what the
rational function saves of the products of a step: quintics, forward and backward pass. Products are 72 % of the time of
a step of 64 tokens (docs/log.md, 2026-11-22).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from speculators.ops import muon

DRAFTS = {
    "EAGLE-3": (
        64,
        3,
        [(576, 1728), (576, 1152), (192, 1152), (192, 1152), (576, 576), *[(1536, 576)] * 2, (576, 1536)],
    ),
    "DFlash": (128, 1, [*[(1536, 576)] * 4, *[(576, 1536)] * 2, *[(576, 576)] * 4, *[(192, 576)] * 4, (576, 2304)]),
}
"""Tokens in a step of the recipe, passes over the matrices, and those that Muon trains; drafts for SmolLM2-135M."""
HEAD, BLOCKS = (8000, 576), (0, 96)


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def orthogonalize(method: Callable[[Tensor], tuple[Tensor, Tensor]], matrices: list[Tensor], block: int) -> None:
    """Orthogonalise matrices, or their blocks of rows, those of one shape as one batch."""
    for indices in muon._batches([matrix.shape for matrix in matrices]):
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in indices]
        x = torch.stack(wide)
        x, factor = method(x.view(-1, block or x.shape[1], x.shape[2]))
        factor @ x


def multiply(matrices: list[Tensor], tokens: int) -> None:
    """Compute the products of a training step: forward, and both gradients of each matrix."""
    for matrix in matrices:
        x = torch.ones(tokens, matrix.shape[1])
        grad = x @ matrix.T
        grad @ matrix, grad.T @ x


def main(rounds: int) -> None:
    """Print a line for each draft."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, CPU time of one thread")
    for (draft, (tokens, passes, shapes)), block in itertools.product(DRAFTS.items(), BLOCKS):
        matrices = [torch.randn(shape) for shape in shapes]
        calls = (
            partial(orthogonalize, muon._quintics, matrices, block),
            partial(orthogonalize, muon._rational, matrices, block),
            partial(multiply, [*matrices, torch.randn(HEAD)] * passes, tokens),
        )
        times = [[milliseconds(call) for call in calls] for _ in range(rounds + 1)][1:]  # the first round warms up
        quintics, rational, step = (statistics.median(column) for column in zip(*times, strict=True))
        ratio, share = quintics / rational, (quintics - rational) / (quintics + step)
        print(
            f"{draft}, block {block}: quintics {quintics:.0f} ms, rational {rational:.0f} ms ({ratio:.2f} times); "
            f"saves {share:.0%} of a step's products"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]) if sys.argv[1:] else 15)
