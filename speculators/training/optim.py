"""Optimisers and schedules. Parameters, momenta and moments are float32, whatever the products are computed in.

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv:2502.16982) replaces the update of a matrix by the nearest
orthogonal matrix, so that every direction is learnt at the same rate. It is written out here because torch's computes
in bfloat16, which many processors emulate slowly, and takes fifteen products of the whole matrix; this one takes two
and two inverses of the small Gram matrix, comes closer, and goes in blocks if asked.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from speculators.config import Optimizer, Schedule, Train
from speculators.drafts.base import TARGETS
from speculators.training.ranks import Ranks, rows

MOMENTUM = 0.95
"""Muon's, with Nesterov's look-ahead."""
BETAS = (0.9, 0.95)
"""AdamW's."""
EPS = 1e-8
FLOOR = 5e-3
"""Singular values from this share of the largest upwards end near one, smaller ones in between."""


def zolotarev(poles: int, floor: float) -> tuple[float, list[float], list[float]]:
    """The odd rational function with so many pairs of poles that is nearest to 1 on [floor, 1].

    It is scale * x * (1 + sum(weight / (x^2 + pole))). Zolotarev found it in 1877; Nakatsukasa and Freund use it for
    the polar factor (SIAM Review 2016, doi:10.1137/140990334). Its zeros and poles are Jacobi's elliptic functions at
    equal distances, computed here by their descent to circular ones (Abramowitz and Stegun, 16.4).

    Returns:
        scale, the weights, and the poles.
    """
    larger, smaller = 1.0, floor
    descent = []
    while larger - smaller > 1e-15:
        descent.append((larger - smaller) / (larger + smaller))
        larger, smaller = (larger + smaller) / 2, math.sqrt(larger * smaller)
    squares = []
    for place in range(1, 2 * poles + 1):
        amplitude = 2 ** len(descent) * math.pi / 2 * place / (2 * poles + 1)
        for ratio in reversed(descent):
            amplitude = (amplitude + math.asin(ratio * math.sin(amplitude))) / 2
        squares.append((floor * math.tan(amplitude)) ** 2)
    at, zeros = squares[0::2], squares[1::2]
    weights = [
        math.prod(zero - pole for zero in zeros) / math.prod(other - pole for other in at if other != pole)
        for pole in at
    ]
    # It swings evenly about what shall be one, from its lowest at the floor to its highest at one.
    ends = [x * (1.0 + sum(w / (x * x + pole) for w, pole in zip(weights, at, strict=True))) for x in (floor, 1.0)]
    return 2.0 / sum(ends), weights, at


SCALE, WEIGHTS, POLES = zolotarev(2, FLOOR)


def orthogonalise(matrix: Tensor, block: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal matrix nearest to `matrix` [m, n], about: singular values end between 0.9 and 1.1.

    With X = USV', f(S) is wanted for S, f being `zolotarev`'s function, which is X times a function of its Gram matrix
    [k, k], k = min(m, n). That takes one product to form it, one to apply the function, and in between an inverse for
    each pole, which are far enough from zero that float32 will do.

    With `block`, the shorter side is cut into groups of so many rows, each made orthogonal by itself: k / block
    times less work, and what is lost is that two groups may still move along the same direction.

    `dtype` is the format of the last product, whose result needs no more digits than the function is near to one.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    rows, columns = x.shape
    size = min(block, rows) if block else rows
    groups = -(-rows // size)
    # Rows of zeros stay what they are.
    x = nn.functional.pad(x, (0, 0, 0, groups * size - rows)).reshape(groups, size, columns)
    # First by what keeps the squares within float32, then by the fourth root of the sum of the fourth powers of the
    # singular values, which is hardly above the largest.
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-30)
    gram = x @ x.mT
    norm = (gram.flatten(1).norm(dim=1).sqrt() + 1e-7)[:, None, None]
    gram = gram / norm.square()
    applied: Tensor | None = None
    for weight, pole in zip(WEIGHTS, POLES, strict=True):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
        applied = inverse.mul_(weight) if applied is None else applied.add_(inverse, alpha=weight)
    assert applied is not None
    applied.diagonal(dim1=-2, dim2=-1).add_(1.0)
    x = (applied.mul_(SCALE / norm).to(dtype) @ x.to(dtype)).float().reshape(groups * size, columns)[:rows]
    return x.T if tall else x


class Optimizers:
    """What trains a draft: Muon for its matrices if asked, AdamW for the rest, one schedule for both.

    All ranks hold all of its state and give it the same gradients, or each holds its own rows and gives theirs. Each
    makes only its share of the matrices orthogonal, which is most of the work, and hands them to the others.

    Args:
        model: what is trained.
        train: how.
        ranks: who trains it.
        held: this rank's rows of all parameters, where they are divided (`sharding`).
    """

    def __init__(
        self, model: nn.Module, train: Train, ranks: Ranks | None = None, held: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
        named = whole if held is None else held
        self.divided = held is not None
        self.shapes = {name: p.shape for name, p in whole.items()}
        muon = train.optimizer is Optimizer.muon
        # Rows of the vocabulary's matrices are learnt one by one, and most have no gradient in a step.
        self.matrices = {name: p for name, p in named.items() if muon and p.ndim == 2 and name not in TARGETS}
        self.others = {name: p for name, p in named.items() if name not in self.matrices}
        self.lr = train.lr
        self.adamw_lr = train.lr if train.adamw_lr is None else train.adamw_lr
        self.weight_decay = train.weight_decay
        self.block, self.dtype = train.muon_block, getattr(torch, train.precision.name)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.ranks = ranks or Ranks()
        self.owners = owners({name: self.shapes[name] for name in self.matrices}, self.ranks.size)
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
        for names in self._groups():
            for name, update in zip(names, self._updates(names), strict=True):
                p = self.matrices[name]
                # The same size of update as AdamW's, so that one learning rate serves both.
                size = self.lr * factor * 0.2 * math.sqrt(max(self.shapes[name]))
                p.mul_(1.0 - self.lr * factor * self.weight_decay).add_(update, alpha=-size)
        for group in self.adamw.param_groups:
            group["lr"] = self.adamw_lr * factor
        self.adamw.step()
        for p in self.parameters():
            p.grad = None

    def _groups(self) -> list[list[str]]:
        """Matrices whose updates exist at the same time: one by one, or all, so that the ranks need not wait."""
        names = list(self.matrices)
        return [names] if self.ranks.size > 1 else [[name] for name in names]

    def _updates(self, names: list[str]) -> list[Tensor]:
        """Muon's updates of what is held of these matrices."""
        if self.divided:
            return self._updates_of_rows(names) if names else []
        updates = [self._update(name) for name in names]
        self.ranks.spread(updates, [self.owners[name] for name in names])
        return updates

    def _update(self, name: str) -> Tensor:
        """Muon's update of a matrix, contiguous where it is handed on; room for it on a rank that gets it."""
        gradient, momentum = self._moved(name)
        if self.owners[name] != self.ranks.rank:
            return torch.empty_like(momentum)
        update = orthogonalise(gradient.lerp(momentum, MOMENTUM), self.block, self.dtype)
        return update if self.ranks.size == 1 else update.contiguous()

    def _updates_of_rows(self, names: list[str]) -> list[Tensor]:
        """The rows of all ranks go to the matrix's owner, who hands back those of the update."""
        rank, everyone = self.ranks.rank, range(self.ranks.size)
        owned = [[name for name in names if self.owners[name] == owner] for owner in everyone]
        asked = {name: torch.lerp(*self._moved(name), MOMENTUM) for name in names}
        cut = {name: [rows(self.shapes[name][0], of, len(everyone)) for of in everyone] for name in names}
        shapes = [[(cut[n][of].stop - cut[n][of].start, self.shapes[n][1]) for n in owned[rank]] for of in everyone]
        got = self.ranks.exchange([[asked[name] for name in owned[owner]] for owner in everyone], shapes)
        made = [orthogonalise(torch.cat(parts), self.block, self.dtype) for parts in zip(*got, strict=True)]
        back = self.ranks.exchange(
            [[update[cut[name][of]] for name, update in zip(owned[rank], made, strict=True)] for of in everyone],
            [[asked[name].shape for name in owned[owner]] for owner in everyone],
        )
        found = dict(zip(itertools.chain(*owned), itertools.chain(*back), strict=True))
        return [found[name] for name in names]

    def _moved(self, name: str) -> tuple[Tensor, Tensor]:
        """The gradient of what is held of a matrix, and its momentum once it has taken that in."""
        gradient = self.matrices[name].grad
        assert gradient is not None
        return gradient, self.momenta[name].lerp_(gradient, 1.0 - MOMENTUM)

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


def owners(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """Which rank makes which matrix orthogonal: the dearest first, each to whoever has least to do."""
    cost = {name: math.prod(shape) * min(shape) for name, shape in shapes.items()}
    load, found = [0] * ranks, {}
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        found[name] = load.index(min(load))
        load[found[name]] += cost[name]
    return found


class Average:
    """An exponential average of weights, float32 as they are; `decay` of it stays in every step.

    The first steps count for more, or it would long be what the weights began as.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.weights = dict(weights)
        self.averages = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.weights[name], share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `averages` as they were."""
        for name, average in self.averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        # By value: weights that are divided among ranks are gathered from where they were when they were divided.
        for name, p in self.weights.items():
            kept = p.clone()
            p.copy_(self.averages[name])
            self.averages[name].copy_(kept)


def rate(step: int, total: int, warmup: float, schedule: Schedule, cooldown: float = 0.2) -> float:
    """Share of the peak learning rate in step `step` of `total`, counted from 0: up over the warm-up, then down to 0.

    `warmup` is a share of all steps; it always takes at least one, which is trained at full rate if it is the only one.
    So is `cooldown`, which only `wsd` looks at.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    left = (total - step) / max(1, total - rising)
    if schedule is Schedule.linear:
        return left
    if schedule is Schedule.cosine:
        return 0.5 * (1.0 - math.cos(math.pi * left))
    if schedule is Schedule.wsd:
        return min(1.0, (total - step) / max(1, round(cooldown * total)))
    return 1.0
