"""The trained weights of a draft: replicated on every rank, or sharded by rows.

`ReplicatedWeights`: each rank computes gradients of its share of a step, and all_reduce sums them.

`ShardedWeights` are torch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv:2304.11277): of every matrix, a rank stores
the rows that `ranks.rows` assigns to it as float32 master weights, with their gradient, optimizer state and average.
For a step, the ranks gather whole matrices, cast to `train.precision`; the gradients are summed in float32 and
scattered, so that each rank gets those of its rows. Vectors (weights of norms, computed in float32) and frozen tensors
are replicated.

The draft is one FSDP unit, because its submodules are called one by one, and its LM head in the loss. So what is
divided by the number of ranks n is what persists between steps: of P weights, 16 P bytes become 16 P / n with AdamW,
12 P become 12 P / n with Muon. What exists within a step is not divided: P weights in `train.precision` and P gradients
in float32.
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


class ReplicatedWeights:
    """The trained weights of a draft, all of them on every rank.

    Args:
        draft: on its device; the same on all ranks.
        ranks: this process among the others.
        grad_dtype: of the matrices' gradients if not float32; the products that compute them have it already.
    """

    shard = (0, 1)
    """(index, count): which of how many row shards of the matrices this rank stores."""

    def __init__(self, draft: Draft, ranks: Ranks, grad_dtype: torch.dtype | None = None) -> None:
        self.draft, self.ranks = draft, ranks
        for module in draft.modules():
            if grad_dtype is not None and isinstance(module, Linear):
                keep_grad_dtype(module.weight, grad_dtype)
        self.local = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        """What this rank stores of each weight, by name, float32; writing to it changes the draft."""

    def optimizers(self, train: Train) -> Optimizers:
        """The optimizers of the local weights."""
        return Optimizers(self.draft, train, self.ranks)

    def backward(self, forward: Forward, last: bool) -> tuple[Predictions, Outcome]:
        """Run forward and backward; `last`: no other batch adds to the gradients of this rank's step."""
        predictions, outcome = forward()
        outcome.loss.backward()
        return predictions, outcome

    def backward_without_batch(self) -> None:
        """Take part in the step's collectives on a rank that has no batch of the step."""

    def all_reduce_gradients(self) -> None:
        """Replace the local gradients by those of the whole step; zeros where no rank has any."""
        self.ranks.all_reduce(_gradients(self.local.values()))

    def grad_norm(self) -> float:
        """Euclidean norm of all weights' gradients."""
        return float(_norm(self.local.values()))

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Let the draft be called without gradients, any number of times on each rank."""
        yield

    def full_state_dict(self) -> dict[str, Tensor]:
        """On rank 0, the float32 weights that the draft's own `state_dict` holds a shard of only, by name."""
        return {}

    def checkpoint_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of this rank's state, the tensors that it has to write so that all ranks together write everything once."""
        return tensors if self.ranks.first else {}


class ShardedWeights(ReplicatedWeights):
    """The trained weights of a draft, each matrix sharded by rows among at least two ranks."""

    def __init__(self, draft: Draft, ranks: Ranks, device: torch.device, precision: Dtype) -> None:
        self.draft, self.ranks, self.shard = draft, ranks, (ranks.rank, ranks.size)
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
        # The batches' losses add up, and so do their gradients; gloo has no mean.
        self.unit.set_gradient_divide_factor(1.0)
        self.unit.set_force_sum_reduction_for_comms(True)
        self.sharded: dict[str, DTensor] = {}
        self.local = {}
        for name, p in draft.named_parameters():
            self.local[name] = p
            if isinstance(p, DTensor):
                self.sharded[name] = p
                self.local[name] = nn.Parameter(p.to_local().detach())

    def optimizers(self, train: Train) -> Optimizers:
        return Optimizers(self.draft, train, self.ranks, self.local)

    def backward(self, forward: Forward, last: bool) -> tuple[Predictions, Outcome]:
        results: list[tuple[Predictions, Outcome]] = []

        def loss() -> Tensor:
            results.append(forward())
            return results[0][1].loss

        self._backward(loss, last)
        return results[0]

    def backward_without_batch(self) -> None:
        self._backward(lambda: torch.stack([p.flatten()[0].float() * 0.0 for p in self.draft.parameters()]).sum(), True)

    def _backward(self, loss: Callable[[], Tensor], last: bool) -> None:
        """The first backward of a step gathers the matrices; the last one reduces the gradients and reshards."""
        self.unit.set_requires_gradient_sync(last)
        self.unit.set_reshard_after_backward(last)
        self.unit.set_is_last_backward(last)
        self.root(loss).backward()

    def all_reduce_gradients(self) -> None:
        for name, p in self.sharded.items():
            assert isinstance(p.grad, DTensor)
            self.local[name].grad, p.grad = p.grad.to_local(), None
        self.ranks.all_reduce(_gradients(p for name, p in self.local.items() if name not in self.sharded))

    def grad_norm(self) -> float:
        squares = _norm(self.local[name] for name in self.sharded).square()
        self.ranks.all_reduce([squares])
        vectors = _norm(p for name, p in self.local.items() if name not in self.sharded)
        return float((squares + vectors.square()).sqrt())

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        self.unit.unshard()
        try:
            yield
        finally:
            self.unit.reshard()

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        weights = {}
        for name, p in self.sharded.items():
            tensor = p.full_tensor()
            if self.ranks.first:
                weights[name] = tensor.cpu()
        return weights

    def checkpoint_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.ranks.first else {name: t for name, t in tensors.items() if t.ndim > 1}


class _Root(nn.Module):
    """The FSDP unit: whatever runs inside its forward pass sees whole weights."""

    def __init__(self, draft: Draft) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss()


def trained_weights(draft: Draft, train: Train, ranks: Ranks, device: torch.device) -> ReplicatedWeights:
    """The weights of a draft, which is the same on all ranks, replicated or sharded as `train.fsdp` says."""
    if train.fsdp and ranks.size > 1:
        return ShardedWeights(draft, ranks, device, train.precision)
    # Where a step has one batch only, nothing is added to its gradients, which can keep the format of their products.
    # AdamW needs gradients in the weights' format.
    one_batch = ranks.size == 1 and train.gradient_accumulation_steps == 1 and device.type == "cpu"
    keeps_dtype = one_batch and train.optimizer is Optimizer.muon
    return ReplicatedWeights(draft, ranks, getattr(torch, train.precision.name) if keeps_dtype else None)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The parameters' gradients, zeros where a rank had no batch of the step."""
    gradients = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        gradients.append(p.grad)
    return gradients


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, float32."""
    return grad_norm([p.grad for p in parameters if p.grad is not None])
