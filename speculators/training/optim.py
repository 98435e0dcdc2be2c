"""Optimisers and schedules. Parameters, momenta and moments are float32, whatever the products are computed in.

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv:2502.16982) replaces the update of a matrix by the nearest
orthogonal matrix, so that every direction is learnt at the same rate. It is written out here because torch's takes
fifteen products in bfloat16, which many processors emulate slowly, one matrix after the other. In float32 this one
takes two products and two inverses of the small Gram matrix; in bfloat16, where that is what the machine is fast at,
twelve products of all matrices of a shape at once. Both come closer, and go in blocks if asked.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from speculators.config.choices import LrSchedule, Optimizer
from speculators.config.schema import Train
from speculators.drafts.base import TARGETS
from speculators.ops import cpu
from speculators.ops.muon import orthogonalise, stacked, together, turned
from speculators.ops.weights import apply_update, mark_changed
from speculators.training.ranks import Ranks, rows


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
        self.muon_lr = train.lr if train.muon_lr is None else train.muon_lr
        self.muon_momentum = train.muon_momentum
        self.muon_weight_decay = train.weight_decay if train.muon_weight_decay is None else train.muon_weight_decay
        self.block, self.dtype = train.muon_block, getattr(torch, train.precision.name)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.ranks = ranks or Ranks()
        self.owners = owners({name: self.shapes[name] for name in self.matrices}, self.ranks.size)
        decay = [p for p in self.others.values() if p.ndim == 2]
        plain = [p for p in self.others.values() if p.ndim != 2]
        groups = [{"params": decay, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(train.adamw_betas[0], train.adamw_betas[1]),
            eps=train.adamw_eps,
            fused=True,
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        yield from self.matrices.values()
        yield from self.others.values()

    @torch.no_grad()
    def step(self, factor: float, shrink: float = 1.0) -> None:
        """Apply the gradients times `shrink`, at `factor` of the peak learning rate, and clear them."""
        for names in self._groups():
            for name, update in zip(names, self._updates(names, shrink), strict=True):
                # The same size of update as AdamW's, so that one learning rate serves both.
                size = self.muon_lr * factor * 0.2 * math.sqrt(max(self.shapes[name]))
                apply_update(self.matrices[name], update, 1.0 - self.muon_lr * factor * self.muon_weight_decay, size)
        for p in self.others.values():
            if shrink != 1.0 and p.grad is not None:
                p.grad.mul_(shrink)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        self.adamw.step()
        mark_changed(self.others.values())  # fused AdamW does not raise the weights' version counters
        for p in self.parameters():
            p.grad = None

    def _groups(self) -> list[list[str]]:
        """Matrices whose updates exist at the same time: those of a shape, or all, so that ranks need not wait."""
        names = list(self.matrices)
        if self.ranks.size > 1:
            return [names]
        return [[names[place] for place in alike] for alike in together([self.shapes[name] for name in names])]

    def _updates(self, names: list[str], shrink: float) -> Sequence[Tensor]:
        """Muon's updates of what is held of these matrices."""
        if self.divided:
            return self._updates_of_rows(names, shrink) if names else []
        if self.ranks.size == 1:
            return self._made(names, shrink)
        own = [name for name in names if self.owners[name] == self.ranks.rank]
        for name in names:
            if name not in own:
                self._move(name, shrink)
        # What is handed on is contiguous and float32; for the others' there is room to take it.
        updates = {name: torch.empty_like(self.momenta[name]) for name in names}
        for alike in together([self.shapes[name] for name in own]):
            its = [own[place] for place in alike]
            for name, update in zip(its, self._made(its, shrink), strict=True):
                updates[name].copy_(update)
        self.ranks.spread(list(updates.values()), [self.owners[name] for name in names])
        return list(updates.values())

    def _updates_of_rows(self, names: list[str], shrink: float) -> list[Tensor]:
        """The rows of all ranks go to the matrix's owner, who hands back those of the update."""
        rank, everyone = self.ranks.rank, range(self.ranks.size)
        owned = [[name for name in names if self.owners[name] == owner] for owner in everyone]
        asked = {name: torch.empty_like(self.momenta[name]) for name in names}
        for name in names:
            self._move(name, shrink, asked[name])
        cut = {name: [rows(self.shapes[name][0], of, len(everyone)) for of in everyone] for name in names}
        shapes = [[(cut[n][of].stop - cut[n][of].start, self.shapes[n][1]) for n in owned[rank]] for of in everyone]
        got = self.ranks.exchange([[asked[name] for name in owned[owner]] for owner in everyone], shapes)
        whole = [torch.cat(parts) for parts in zip(*got, strict=True)]
        made = list(whole)
        for alike in together([matrix.shape for matrix in whole]):
            alike_shapes = [whole[place].shape for place in alike]
            x = stacked(alike_shapes, self.dtype, whole[alike[0]].device)
            for room, place in zip(turned(x, alike_shapes), alike, strict=True):
                room.copy_(whole[place])
            for place, update in zip(alike, orthogonalise(x, alike_shapes, self.block), strict=True):
                made[place] = update.float().contiguous()
        back = self.ranks.exchange(
            [[update[cut[name][of]] for name, update in zip(owned[rank], made, strict=True)] for of in everyone],
            [[asked[name].shape for name in owned[owner]] for owner in everyone],
        )
        found = dict(zip(itertools.chain(*owned), itertools.chain(*back), strict=True))
        return [found[name] for name in names]

    def _made(self, names: list[str], shrink: float) -> list[Tensor]:
        """Move the momenta of matrices of one shape or its transpose, and make of where they are to go the updates."""
        shapes = [self.shapes[name] for name in names]
        x = stacked(shapes, self.dtype, self.momenta[names[0]].device)
        for name, asked in zip(names, turned(x, shapes), strict=True):
            self._move(name, shrink, asked)
        return orthogonalise(x, shapes, self.block)

    def _move(self, name: str, shrink: float, asked: Tensor | None = None) -> None:
        """Let what is held of a matrix's momentum take the gradient in.

        `asked` gets where it is to go, whose size does not matter: the momentum, and once more the gradient (Nesterov).
        """
        momentum, gradient, beta = self.momenta[name], self._gradient(name), self.muon_momentum
        new = (1.0 - beta) * shrink
        if loops := cpu.kernels(momentum, *([] if asked is None else [asked])):
            return loops.nesterov_momentum(momentum, gradient, asked, beta, new, new / beta)
        momentum.mul_(beta).add_(gradient, alpha=new)
        if asked is not None:
            asked.copy_(torch.add(momentum, gradient, alpha=new / beta))
        return None

    def _gradient(self, name: str) -> Tensor:
        gradient = self.matrices[name].grad
        assert gradient is not None
        return gradient

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


def rate(step: int, total: int, warmup_ratio: float, schedule: LrSchedule, decay_ratio: float = 0.2) -> float:
    """Share of the peak learning rate in step `step` of `total`, counted from 0: up over the warm-up, then down to 0.

    `warmup_ratio` is a share of all steps; it always takes at least one, which is trained at full rate if it is the
    only one. So is `decay_ratio`, which only `wsd` looks at.
    """
    rising = max(1, round(warmup_ratio * total))
    if step < rising:
        return (step + 1) / rising
    left = (total - step) / max(1, total - rising)
    if schedule is LrSchedule.linear:
        return left
    if schedule is LrSchedule.cosine:
        return 0.5 * (1.0 - math.cos(math.pi * left))
    if schedule is LrSchedule.wsd:
        return min(1.0, (total - step) / max(1, round(decay_ratio * total)))
    return 1.0
