"""Ranks: the processes that share one training, and what they say to each other.

Rank 0 is the stage's own process. It starts the others of its machine as its children, in its own process group, so
that whoever owns it owns them; they end with it, however it ends. Under `torchrun` (RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT are set), on one machine or on several, each process is a rank and starts none.

Every rank trains on its share of each step's rows and adds up the gradients with the others. It holds the whole draft
and all the state of its optimisers, or rows of them (`sharding`); only rank 0 writes what is kept. gloo carries tensors
of a CPU, NCCL those of GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from speculators.errors import RecipeError, RunError, StageError

T = TypeVar("T")
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
"""torch has no types for it."""
PATIENCE = datetime.timedelta(minutes=30)
"""How long a rank waits for the others: one of them may write a checkpoint, or wait for hidden states."""
GRACE = 5.0
"""Seconds that the children have to end by themselves once rank 0 is through, or to say why they failed."""


class Ranks:
    """One process among `size`. With one there is nobody to talk to, and nothing happens."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """What rank 0 says."""
        if self.size == 1:
            return value
        said: list[Any] = [value]
        dist.broadcast_object_list(said, src=0)
        agreed: T = said[0]
        return agreed

    def gather(self, value: T) -> list[T]:
        """What each rank says, in their order, for all of them."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks: the same bits on all of them, and the same every time."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def spread(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> None:
        """Replace each tensor, contiguous, by that of its source."""
        if self.size > 1:
            pairs = zip(tensors, sources, strict=True)
            for work in [dist.broadcast(tensor, src=source, async_op=True) for tensor, source in pairs]:
                work.wait()

    def exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """Give each rank its own tensors and get those that each rank has for this one, of these shapes."""
        flat = torch.cat([tensor.flatten() for tensors in sent for tensor in tensors])
        sizes = [[math.prod(shape) for shape in each] for each in shapes]
        got = flat.new_empty(sum(map(sum, sizes)))
        counts = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        dist.all_to_all_single(got, flat, [sum(each) for each in sizes], counts)
        parts = iter(got.split([size for each in sizes for size in each]))
        return [[next(parts).view(*shape) for shape in each] for each in shapes]


def rows(count: int, rank: int, size: int) -> slice:
    """The rows that one of `size` ranks has of a divided matrix with `count`; FSDP cuts at the same places."""
    most = -(-count // size)
    return slice(min(rank * most, count), min((rank + 1) * most, count))


@contextlib.contextmanager
def joined(processes: int, follow: Callable[..., object], *args: object) -> Iterator[Ranks]:
    """The ranks of a training, of which this process is one.

    Args:
        processes: how many this machine is to have; not looked at under torchrun, and by a child.
        follow: what a child does: `follow(ranks, *args)`. All of it is pickled, so it has a name in a module.

    Raises:
        RunError: what a child raised, if this process failed only because of that.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        with _group(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0"))) as ranks:
            yield ranks
    elif processes == 1:
        yield Ranks()
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with _children(processes, store.port, follow, args), _group(0, processes, 0, store) as ranks:
            yield ranks


def check_devices(processes: int, device: torch.device) -> None:
    """Raises RecipeError where there are fewer GPUs than processes."""
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise RecipeError(
            f"train.num_processes is {processes}, and there are {torch.cuda.device_count()} GPUs",
            "a process needs a GPU of its own: lower train.num_processes, or raise hardware.gpus",
        )


@contextlib.contextmanager
def _group(rank: int, size: int, local: int, store: Any = None) -> Iterator[Ranks]:
    """Join the others, as `rank` of `size`; `local` numbers those of this machine."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // size))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=PATIENCE)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _children(processes: int, port: int, follow: Callable[..., object], args: tuple[object, ...]) -> Iterator[None]:
    """Ranks 1 and up as children of this process; none is left at the end."""
    started: list[tuple[int, SpawnProcess, Connection]] = []
    try:
        for rank in range(1, processes):
            here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
            child = multiprocessing.get_context("spawn").Process(
                target=_child, args=(rank, processes, port, there, follow, args), name=f"rank {rank}", daemon=True
            )
            child.start()
            there.close()
            started.append((rank, child, here))
        for _, _, here in started:
            here.recv()  # it is about to join; EOFError if it has ended before
        yield
        for _, child, _ in started:
            child.join(GRACE)
    except RunError:
        raise
    except Exception as error:
        cause = _cause(started)
        if cause is None:
            raise
        raise cause from error
    finally:
        for _, child, _ in started:
            child.kill()
            child.join()


def _cause(started: list[tuple[int, SpawnProcess, Connection]]) -> RunError | None:
    """Why a child failed or died, if one did."""
    for rank, child, pipe in started:
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll(GRACE):
                said: RunError = pipe.recv()
                return said
        child.join(GRACE)
        if child.exitcode:
            return StageError(
                f"process {rank} of the training ended with exit code {child.exitcode}",
                "its last words are above; a negative code is the signal that ended it (-9: often too little memory)",
            )
    return None


def _child(
    rank: int, size: int, port: int, pipe: Connection, follow: Callable[..., object], args: tuple[object, ...]
) -> None:
    threading.Thread(target=_end_with_the_parent, name="parent-watch", daemon=True).start()
    try:
        pipe.send(None)
        with _group(rank, size, rank, TCPStore("127.0.0.1", port, is_master=False)) as ranks:
            follow(ranks, *args)
    except RunError as error:
        pipe.send(error)
        sys.exit(1)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
