"""Optimisers and schedules. Parameters, momenta and moments are float32, whatever the products are computed in.

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv:2502.16982) replaces the update of a matrix by the nearest
orthogonal matrix, so that every direction is learnt at the same rate. It is written out here because torch's computes
in bfloat16, which many processors emulate slowly, and iterates on the full matrix; this one iterates on the small
Gram matrix, and in blocks if asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from speculators.config import Optimizer, Schedule, Train
from speculators.drafts.base import TARGETS

MOMENTUM = 0.95
"""Muon's, with Nesterov's look-ahead."""
BETAS = (0.9, 0.95)
"""AdamW's."""
EPS = 1e-8
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- aX + b(XX')X + c(XX')^2 X: steep at zero, and around one for everything else."""
ITERATIONS = 5


def orthogonalise(matrix: Tensor, block: int = 0) -> Tensor:
    """The orthogonal matrix nearest to `matrix` [m, n], about: singular values end between 0.7 and 1.2.

    A polynomial of X X' commutes with it, so the iteration runs on the Gram matrix [k, k] and on the product of the
    polynomials [k, k], k = min(m, n), and X is multiplied once at the end: less work wherever X is not square.

    With `block`, the shorter side is cut into groups of so many rows, each made orthogonal by itself: k / block
    times less work, and what is lost is that two groups may still move along the same direction.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    rows, columns = x.shape
    size = min(block, rows) if block else rows
    groups = -(-rows // size)
    # Rows of zeros stay what they are.
    x = nn.functional.pad(x, (0, 0, 0, groups * size - rows)).reshape(groups, size, columns)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = POLYNOMIAL
    gram = x @ x.mT
    product: Tensor | None = None
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    x = (product @ x).reshape(groups * size, columns)[:rows]
    return x.T if tall else x


class Optimizers:
    """What trains a draft: Muon for its matrices if asked, AdamW for the rest, one schedule for both."""

    def __init__(self, model: nn.Module, train: Train) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        muon = train.optimizer is Optimizer.muon
        # Rows of the vocabulary's matrices are learnt one by one, and most have no gradient in a step.
        self.matrices = {name: p for name, p in named if muon and p.ndim == 2 and name not in TARGETS}
        self.others = {name: p for name, p in named if name not in self.matrices}
        self.lr = train.lr
        self.adamw_lr = train.lr if train.adamw_lr is None else train.adamw_lr
        self.weight_decay = train.weight_decay
        self.block = train.muon_block
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        decay = [p for p in self.others.values() if p.ndim == 2]
        plain = [p for p in self.others.values() if p.ndim != 2]
        groups = [{"params": decay, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.adamw_lr, betas=BETAS, eps=EPS, fused=True
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        yield from self.matrices.values()
        yield from self.others.values()

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply the gradients, at `factor` of the peak learning rate, and clear them."""
        for name, p in self.matrices.items():
            assert p.grad is not None
            momentum = self.momenta[name].lerp_(p.grad, 1.0 - MOMENTUM)
            update = orthogonalise(p.grad.lerp(momentum, MOMENTUM), self.block)
            # The same size of update as AdamW's, so that one learning rate serves both.
            size = self.lr * factor * 0.2 * math.sqrt(max(p.shape))
            p.mul_(1.0 - self.lr * factor * self.weight_decay).add_(update, alpha=-size)
        for group in self.adamw.param_groups:
            group["lr"] = self.adamw_lr * factor
        self.adamw.step()
        for p in self.parameters():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        found = {f"muon.{name}": m for name, m in self.momenta.items()}
        for name, p in self.others.items():
            found |= {f"adamw.{key}.{name}": value for key, value in self.adamw.state[p].items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, momentum in self.momenta.items():
            momentum.copy_(state[f"muon.{name}"])
        for name, p in self.others.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adamw.state[p] = {key: state[f"adamw.{key}.{name}"].to(p.device) for key in keys}


def rate(step: int, total: int, warmup: float, schedule: Schedule) -> float:
    """Share of the peak learning rate in step `step` of `total`, counted from 0: up over the warm-up, then down to 0.

    `warmup` is a share of all steps; it always takes at least one, which is trained at full rate if it is the only one.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    left = (total - step) / max(1, total - rising)
    if schedule is Schedule.linear:
        return left
    if schedule is Schedule.cosine:
        return 0.5 * (1.0 - math.cos(math.pi * left))
    return 1.0
