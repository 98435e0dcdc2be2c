"""Optimizers, average of the weights, and learning-rate schedules.

Parameters, momenta and moments are float32, whatever the format of the matrix products.
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
from speculators.drafts.base import TARGET_MATRICES
from speculators.ops.muon import muon_updates, orthogonalize, update_momentum, update_scale
from speculators.ops.weights import apply_update, mark_changed
from speculators.training.ranks import Ranks, rows


class Optimizers:
    """Muon for the draft's matrices if the recipe selects it, AdamW for the rest, and one schedule for both.

    Every rank holds all momenta and moments and passes the same gradients, or holds the rows of its shard and passes
    theirs. Each rank orthogonalises its share of the matrices, which is most of the work, and broadcasts the updates.

    Args:
        model: the draft.
        train: options.
        ranks: processes that train together; this one alone if None.
        shards: this rank's rows of every parameter, where parameters are sharded (`sharding`).
    """

    def __init__(
        self, model: nn.Module, train: Train, ranks: Ranks | None = None,
        shards: Mapping[str, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        full = {name: p for name, p in model.named_parameters() if p.requires_grad}
        named = full if shards is None else shards
        self.sharded = shards is not None
        self.shapes = {name: p.shape for name, p in full.items()}
        muon = train.optimizer is Optimizer.muon
        # Rows of the vocabulary's matrices are independent of each other, and most have no gradient in a step.
        self.matrices = {name: p for name, p in named.items() if muon and p.ndim == 2 and name not in TARGET_MATRICES}
        self.others = {name: p for name, p in named.items() if name not in self.matrices}
        self.lr = train.lr
        self.muon_lr = train.lr if train.muon_lr is None else train.muon_lr
        self.muon_momentum = train.muon_momentum
        self.muon_weight_decay = train.weight_decay if train.muon_weight_decay is None else train.muon_weight_decay
        self.block, self.dtype = train.muon_block, getattr(torch, train.precision.name)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.ranks = ranks or Ranks()
        self.owners = owners({name: self.shapes[name] for name in self.matrices}, self.ranks.size)
        decayed = [p for p in self.others.values() if p.ndim == 2]
        vectors = [p for p in self.others.values() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups, betas = [g for g in groups if g["params"]], (train.adamw_betas[0], train.adamw_betas[1])
        self.adamw = torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=train.adamw_eps, fused=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters that are trained, or this rank's shards of them."""
        yield from self.matrices.values()
        yield from self.others.values()

    @torch.no_grad()
    def step(self, lr_factor: float, grad_factor: float = 1.0) -> None:
        """Apply the gradients times `grad_factor`, at `lr_factor` of the peak learning rate, and clear them."""
        lr = self.muon_lr * lr_factor
        for name, update in self._muon_updates(grad_factor):
            keep = 1.0 - lr * self.muon_weight_decay
            apply_update(self.matrices[name], update, keep, lr * update_scale(self.shapes[name]))
        for p in self.others.values():
            if grad_factor != 1.0 and p.grad is not None:
                p.grad.mul_(grad_factor)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * lr_factor
        self.adamw.step()
        mark_changed(self.others.values())  # fused AdamW does not raise the weights' version counters
        for p in self.parameters():
            p.grad = None

    def _muon_updates(self, grad_factor: float) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the update of each of Muon's matrices, or of this rank's rows of it."""
        names = list(self.matrices)
        if self.sharded:
            yield from self._sharded_updates(names, grad_factor)
        elif self.ranks.size == 1:
            yield from self._updates_of(names, grad_factor)
        else:
            yield from self._shared_updates(names, grad_factor)

    def _updates_of(self, names: list[str], grad_factor: float) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's own updates of full matrices."""
        momenta, grads = [self.momenta[name] for name in names], [self._grad(name) for name in names]
        for index, update in muon_updates(momenta, grads, self.muon_momentum, grad_factor, self.dtype, self.block):
            yield names[index], update

    def _shared_updates(self, names: list[str], grad_factor: float) -> Iterator[tuple[str, Tensor]]:
        """Compute the updates of the matrices that this rank owns, and broadcast those of all ranks."""
        updates = {name: torch.empty_like(self.momenta[name]) for name in names}
        owned = [name for name in names if self.owners[name] == self.ranks.rank]
        for name in names:
            if name not in owned:
                update_momentum(self.momenta[name], self._grad(name), self.muon_momentum, grad_factor)
        for name, update in self._updates_of(owned, grad_factor):
            updates[name].copy_(update)  # contiguous and float32, as broadcasts need them
        self.ranks.broadcast(list(updates.values()), [self.owners[name] for name in names])
        yield from updates.items()

    def _sharded_updates(self, names: list[str], grad_factor: float) -> Iterator[tuple[str, Tensor]]:
        """Send the rows of each matrix's direction to its owner, which sends back the rows of the update."""
        if not names:
            return
        everyone = range(self.ranks.size)
        owned = [[name for name in names if self.owners[name] == owner] for owner in everyone]
        ours = owned[self.ranks.rank]
        directions = {name: torch.empty_like(self.momenta[name]) for name in names}
        for name, direction in directions.items():
            update_momentum(self.momenta[name], self._grad(name), self.muon_momentum, grad_factor, direction)
        parts = {name: [rows(self.shapes[name][0], rank, len(everyone)) for rank in everyone] for name in names}
        sizes = [[(parts[name][rank], self.shapes[name][1]) for name in ours] for rank in everyone]
        shapes = [[(part.stop - part.start, columns) for part, columns in size] for size in sizes]
        received = self.ranks.all_to_all([[directions[name] for name in group] for group in owned], shapes)
        full = [torch.cat(row_slices) for row_slices in zip(*received, strict=True)]
        updates = dict(zip(ours, orthogonalize(full, self.dtype, self.block), strict=True))
        returned = self.ranks.all_to_all(
            [[updates[name][parts[name][rank]] for name in ours] for rank in everyone],
            [[directions[name].shape for name in group] for group in owned],
        )
        yield from zip(itertools.chain(*owned), itertools.chain(*returned), strict=True)

    def _grad(self, name: str) -> Tensor:
        grad = self.matrices[name].grad
        assert grad is not None
        return grad

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        tensors = {f"muon.{name}": m for name, m in self.momenta.items()}
        for name, p in self.others.items():
            tensors |= {f"adamw.{key}.{name}": value for key, value in self.adamw.state[p].items()}
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, momentum in self.momenta.items():
            momentum.copy_(state[f"muon.{name}"])
        for name, p in self.others.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adamw.state[p] = {key: state[f"adamw.{key}.{name}"].to(p.device) for key in keys}


def owners(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """Assign each matrix to the rank that orthogonalises it: the most expensive first, each to the least loaded."""
    cost = {name: math.prod(shape) * min(shape) for name, shape in shapes.items()}
    load, owner = [0] * ranks, {}
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += cost[name]
    return owner


class Average:
    """Exponential moving average (EMA) of the weights, in float32: average = decay * average + (1 - decay) * weight.

    In the first steps the decay is smaller, or the initial weights would dominate for long.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.weights = dict(weights)
        self.averages = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` steps."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for name, average in self.averages.items():
            average.lerp_(self.weights[name], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages as its weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved `averages`."""
        for name, average in self.averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        # By value: FSDP gathers sharded weights from the memory that they had when they were sharded.
        for name, p in self.weights.items():
            weight = p.clone()
            p.copy_(self.averages[name])
            self.averages[name].copy_(weight)


def rate(step: int, total: int, warmup_ratio: float, schedule: LrSchedule, decay_ratio: float = 0.2) -> float:
    """Return the share of the peak learning rate in a step: linear warm-up, then the schedule's decay towards 0.

    Args:
        step: from 0.
        total: number of steps.
        warmup_ratio: share of all steps; at least one step, at full rate if it is the only one.
        schedule: shape of the decay.
        decay_ratio: share of all steps in which `wsd` decays, at least one.
    """
    warmup_steps = max(1, round(warmup_ratio * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (total - step) / max(1, total - warmup_steps)
    if schedule is LrSchedule.linear:
        return left
    if schedule is LrSchedule.cosine:
        return 0.5 * (1.0 - math.cos(math.pi * left))
    if schedule is LrSchedule.wsd:
        return min(1.0, (total - step) / max(1, round(decay_ratio * total)))
    return 1.0
