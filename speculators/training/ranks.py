"""Ranks: the processes of one distributed training, and the collectives between them.

Rank 0 is the stage's process. It starts the other ranks of its machine as children in its own process group, which end
with it, however it ends. Under `torchrun` (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set), on one machine or
several, each process is a rank and starts none.

Every rank trains on its share of each step's rows, and all_reduce sums the gradients. A rank stores the whole draft and
its optimizer state, or shards of them (`sharding`); only rank 0 writes the outputs. Collectives of CPU tensors go
through gloo, those of GPU tensors through NCCL.
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
from speculators.timeouts import COLLECTIVE_TIMEOUT_SECONDS, RANK_GRACE_SECONDS

T = TypeVar("T")
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
"""torch has no type annotations for it."""


class Ranks:
    """This process as rank `rank` of `size`, with its collectives. With one rank they return their input."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the outputs."""
        return self.rank == 0

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value, which is pickled, on every rank."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        first: T = values[0]
        return first

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, which are pickled, in rank order on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, bit-identical on all of them and in every run."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def broadcast(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> None:
        """Replace each contiguous tensor by the one of its source rank."""
        if self.size > 1:
            pairs = zip(tensors, sources, strict=True)
            for work in [dist.broadcast(tensor, src=source, async_op=True) for tensor, source in pairs]:
                work.wait()

    def all_to_all(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """Send `sent[r]` to each rank r, and return what each rank sent to this one, of `shapes[r]`."""
        flat = torch.cat([tensor.flatten() for tensors in sent for tensor in tensors])
        sizes = [[math.prod(shape) for shape in each] for each in shapes]
        received = flat.new_empty(sum(map(sum, sizes)))
        counts = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        dist.all_to_all_single(received, flat, [sum(each) for each in sizes], counts)
        tensors = iter(received.split([size for each in sizes for size in each]))
        return [[next(tensors).view(*shape) for shape in each] for each in shapes]


def rows(count: int, rank: int, size: int) -> slice:
    """The rows of a matrix of `count` rows that rank `rank` of `size` stores; FSDP shards it the same way."""
    shard = -(-count // size)
    return slice(min(rank * shard, count), min((rank + 1) * shard, count))


@contextlib.contextmanager
def process_group(processes: int, child_main: Callable[..., object], *args: object) -> Iterator[Ranks]:
    """Start the other ranks of a training, and join them as rank 0.

    Args:
        processes: number of ranks on this machine; ignored under torchrun.
        child_main: called in a child as `child_main(ranks, *args)`; pickled, so it has to be a module's function.

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
        with _children(processes, store.port, child_main, args), _group(0, processes, 0, store) as ranks:
            yield ranks


def check_devices(processes: int, device: torch.device) -> None:
    """Check that each process has a GPU of its own.

    Raises:
        RecipeError: there are fewer GPUs than processes.
    """
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise RecipeError(
            f"train.num_processes is {processes}, and there are {torch.cuda.device_count()} GPUs",
            "lower train.num_processes, or raise hardware.gpus: each process needs a GPU of its own",
        )


@contextlib.contextmanager
def _group(rank: int, size: int, local: int, store: Any = None) -> Iterator[Ranks]:
    """Join the process group as `rank` of `size`; `local` is the rank within this machine."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // size))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
    dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=timeout)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _children(processes: int, port: int, child_main: Callable[..., object], args: tuple[object, ...]) -> Iterator[None]:
    """Run ranks 1 and up as children of this process, and leave none behind."""
    started: list[tuple[int, SpawnProcess, Connection]] = []
    try:
        for rank in range(1, processes):
            here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
            child = multiprocessing.get_context("spawn").Process(
                target=_child, args=(rank, processes, port, there, child_main, args), name=f"rank {rank}", daemon=True
            )
            child.start()
            there.close()
            started.append((rank, child, here))
        for _, _, here in started:
            here.recv()  # it is about to join; EOFError if it has already ended
        yield
        for _, child, _ in started:
            child.join(RANK_GRACE_SECONDS)
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
    """The error of the first child that failed or died, if one did."""
    for rank, child, pipe in started:
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll(RANK_GRACE_SECONDS):
                error: RunError = pipe.recv()
                return error
        child.join(RANK_GRACE_SECONDS)
        if child.exitcode:
            return StageError(
                f"process {rank} of the training ended with exit code {child.exitcode}",
                "see its output above; a negative code is the signal that ended it (-9: often out of memory)",
            )
    return None


def _child(
    rank: int, size: int, port: int, pipe: Connection, child_main: Callable[..., object], args: tuple[object, ...]
) -> None:
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    try:
        pipe.send(None)
        with _group(rank, size, rank, TCPStore("127.0.0.1", port, is_master=False)) as ranks:
            child_main(ranks, *args)
    except RunError as error:
        pipe.send(error)
        sys.exit(1)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
