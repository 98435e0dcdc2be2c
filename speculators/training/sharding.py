"""Who holds what of the weights that are trained: every rank all of them, or each rank its own rows.

Whole weights (`Weights`) are the simplest: each rank makes gradients of its share of a step, and all add them up.

Divided weights (`Shards`) are torch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277): of every matrix, a
rank has the rows that `ranks.rows` gives it, as float32 masters, with their gradient, their momentum or moments and
their average. For a step, the ranks hand each other their rows, cast to `train.precision`; each computes with whole
matrices; and of the gradients, summed in float32, each gets back those of its own rows. Vectors, which are weights of
norms, are small, and norms are computed in float32: they stay whole everywhere, as does what is frozen.

The draft is wrapped as one unit, because its parts are called piece by piece, and its head where the loss is made. So
what is divided by the number of ranks n is what lasts from step to step: of P weights, 16 P bytes become 16 P / n
under AdamW, 12 P become 12 P / n under Muon. What comes and goes within a step is not: P weights in
`train.precision`, and P gradients in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from speculators.config.choices import Dtype, Optimizer
from speculators.config.schema import Train
from speculators.drafts.base import Draft, Predictions
from speculators.drafts.layers import Linear
from speculators.ops.weights import grad_norm, keep_grad_dtype
from speculators.training.losses import Outcome
from speculators.training.optim import Optimizers
from speculators.training.ranks import Ranks

Forward = Callable[[], tuple[Predictions, Outcome]]


class Weights:
    """What is trained of a draft, whole on every rank."""

    part = (0, 1)
    """Of the matrices, which of so many parts this rank has."""

    def __init__(self, draft: Draft, ranks: Ranks, short: torch.dtype | None = None) -> None:
        """Hold the weights; with `short`, gradients of matrices stay in that format, in which products make them."""
        self.draft, self.ranks = draft, ranks
        for part in draft.modules():
            if short is not None and isinstance(part, Linear):
                keep_grad_dtype(part.weight, short)
        self.held = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        """What this rank has of each weight, float32; whoever writes there changes the draft."""

    def optimizers(self, train: Train) -> Optimizers:
        """What changes the weights by their gradients."""
        return Optimizers(self.draft, train, self.ranks)

    def backward(self, forward: Forward, last: bool) -> tuple[Predictions, Outcome]:
        """Compute forward and backward; `last`: nothing else adds to the gradients of this rank's step."""
        predictions, outcome = forward()
        outcome.loss.backward()
        return predictions, outcome

    def sit_out(self) -> None:
        """Do what the others wait for where a rank has no share of a step."""

    def add_up(self) -> None:
        """Make the gradients of what is held those of the whole step; zeros where nobody has any."""
        self.ranks.add(_gradients(self.held.values()))

    def norm(self) -> float:
        """Of the gradients, over all weights."""
        return float(_norm(self.held.values()))

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """The draft can be called, on any number of packs, without a gradient."""
        yield

    def whole(self) -> dict[str, Tensor]:
        """On the first rank, float32 weights to write in the place of those that the draft itself shows."""
        return {}

    def sealed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of this rank's state, by name, what it has to write so that all ranks together write all of it once."""
        return tensors if self.ranks.first else {}


class Shards(Weights):
    """What is trained of a draft, each matrix divided by rows among at least two ranks."""

    def __init__(self, draft: Draft, ranks: Ranks, device: torch.device, precision: Dtype) -> None:
        self.draft, self.ranks, self.part = draft, ranks, (ranks.rank, ranks.size)
        self.root = _Root(draft)
        self.unit = fully_shard(
            self.root,
            mesh=init_device_mesh(device.type, (ranks.size,)),
            reshard_after_forward=False,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=getattr(torch, precision.name), reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            ignored_params={p for p in draft.parameters() if p.ndim < 2},
        )
        # The losses of the parts add up, and so do their gradients; gloo cannot take a mean.
        self.unit.set_gradient_divide_factor(1.0)
        self.unit.set_force_sum_reduction_for_comms(True)
        self.divided: dict[str, DTensor] = {}
        self.held = {}
        for name, p in draft.named_parameters():
            self.held[name] = p
            if isinstance(p, DTensor):
                self.divided[name] = p
                self.held[name] = nn.Parameter(p.to_local().detach())

    def optimizers(self, train: Train) -> Optimizers:
        return Optimizers(self.draft, train, self.ranks, self.held)

    def backward(self, forward: Forward, last: bool) -> tuple[Predictions, Outcome]:
        found: list[tuple[Predictions, Outcome]] = []

        def loss() -> Tensor:
            found.append(forward())
            return found[0][1].loss

        self._backward(loss, last)
        return found[0]

    def sit_out(self) -> None:
        self._backward(lambda: torch.stack([p.flatten()[0].float() * 0.0 for p in self.draft.parameters()]).sum(), True)

    def _backward(self, loss: Callable[[], Tensor], last: bool) -> None:
        """The first of a step gathers the matrices; the last one sums the gradients, and leaves only rows behind."""
        self.unit.set_requires_gradient_sync(last)
        self.unit.set_reshard_after_backward(last)
        self.unit.set_is_last_backward(last)
        self.root(loss).backward()

    def add_up(self) -> None:
        for name, p in self.divided.items():
            assert isinstance(p.grad, DTensor)
            self.held[name].grad, p.grad = p.grad.to_local(), None
        self.ranks.add(_gradients(p for name, p in self.held.items() if name not in self.divided))

    def norm(self) -> float:
        squares = _norm(self.held[name] for name in self.divided).square()
        self.ranks.add([squares])
        vectors = _norm(p for name, p in self.held.items() if name not in self.divided)
        return float((squares + vectors.square()).sqrt())

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        self.unit.unshard()
        try:
            yield
        finally:
            self.unit.reshard()

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self.divided.items():
            tensor = p.full_tensor()
            if self.ranks.first:
                found[name] = tensor.cpu()
        return found

    def sealed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.ranks.first else {name: t for name, t in tensors.items() if t.ndim > 1}


class _Root(nn.Module):
    """The unit that is gathered: whatever is called inside of it finds whole weights."""

    def __init__(self, draft: Draft) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss()


def weights(draft: Draft, train: Train, ranks: Ranks, device: torch.device) -> Weights:
    """The weights of a draft, which are the same on all ranks, held as the recipe says."""
    if train.fsdp and ranks.size > 1:
        return Shards(draft, ranks, device, train.precision)
    # Nothing is added to the gradient of a step's only pack.
    alone = ranks.size == 1 and train.gradient_accumulation_steps == 1 and device.type == "cpu"
    # AdamW needs gradients of the weights' own format.
    short = alone and train.optimizer is Optimizer.muon
    return Weights(draft, ranks, getattr(torch, train.precision.name) if short else None)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Those of all of them, zeros where a rank had no share of the step."""
    found = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        found.append(p.grad)
    return found


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all gradients together, float32."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return grad_norm(gradients)
