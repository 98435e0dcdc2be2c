"""Sections of the recipe's schema that say where and how a run is carried out. Nothing in them enters a cache key."""

from __future__ import annotations

from dataclasses import dataclass

from speculators.config.choices import Device, ExecutorName
from speculators.config.fields import Options, non_negative, not_empty, operational, positive


@dataclass(kw_only=True, slots=True, repr=False)
class Hardware(Options):
    """The devices that a run may use. They are found, unless the recipe describes them."""

    device: Device = operational(Device.auto)
    """Device that vLLM runs on; `auto`: that of the installed vLLM."""
    gpus: int | None = operational(None, positive())
    """GPUs that the run may use, the first ones; null: all that CUDA_VISIBLE_DEVICES leaves visible."""
    gpu_name: str = operational("")
    """Product name of GPUs that the recipe describes, for `plan`."""
    gpu_memory_gib: float | None = operational(None, positive())
    """Memory of each GPU in GiB, with which the recipe describes `gpus` GPUs: `plan` then plans for these on any
    machine, and `run` needs a machine that has them. Null: the GPUs of this machine."""
    train_cores: int = operational(0, non_negative())
    """CPU cores of a training that shares the CPU with a live server, which gets the others; 0: half of them."""


@dataclass(kw_only=True, slots=True, repr=False)
class ExecutorOptions(Options):
    """What starts the workers."""

    name: ExecutorName = operational(ExecutorName.local)
    """Executor; see `ExecutorName`. A stage's section may name another one: `train.executor=slurm`. On a cluster, every
    machine must see the store and the run directory under the same path."""
    partition: str = operational("")
    """Slurm: partition; empty: the cluster's default."""
    time_limit: int = operational(1440, positive())
    """submitit and Slurm: longest duration of a job, in minutes. Slurm then requeues the job, and it resumes."""
    gpus: int = operational(0, non_negative())
    """Slurm and Ray: GPUs requested for each stage, its server included. 0: a stage on this machine sees the GPUs that
    the run sees."""
    cpus: int = operational(1, positive())
    """Slurm and Ray: CPU cores requested for each stage, its server included."""
    address: str = operational("")
    """Ray: cluster address for `ray.init`; empty, without RAY_ADDRESS: a local cluster that ends with the run."""


@dataclass(kw_only=True, slots=True, repr=False)
class StageLimits(Options):
    """Limits of one stage; null: those of `run`."""

    retries: int | None = operational(None, non_negative())
    """`run.retries` of this stage."""
    retry_wait: float | None = operational(None, non_negative())
    """`run.retry_wait` of this stage, in seconds."""
    time_limit: float | None = operational(None, non_negative())
    """`run.time_limit` of this stage, in seconds."""


@dataclass(kw_only=True, slots=True, repr=False)
class RunOptions(Options):
    """How this run is carried out. Nothing here enters a key."""

    store: str = operational("")
    """Directory of the artifact store; empty: $SPECULATORS_STORE, or ~/.cache/speculators-run."""
    stores_read: list[str] = operational([])
    """Read-only stores searched for what `store` lacks; empty: $SPECULATORS_STORE_READ, separated by `:`."""
    quota_gib: float = operational(0.0, non_negative())
    """Largest size of the store, in GiB, checked before every stage; 0: no limit but the disk."""
    ignore_disk_estimate: bool = operational(False)
    """Start although the hidden states are expected to need more space than the store has."""
    dir: str = operational("runs", not_empty())
    """Directory for run directories, relative to the working directory."""
    locked: bool = operational(False)
    """Refuse to start if anything differs from `<recipe>.lock.json`, which `speculators-run lock` writes."""
    parallel: int = operational(0, non_negative())
    """Most stages at the same time on this machine; 0: one per core, and at least two."""
    memory_gib: float = operational(0.0, non_negative())
    """Memory for stages at the same time on this machine, in GiB, by estimate; 0: the machine's memory."""
    retries: int = operational(2, non_negative())
    """Further attempts for a stage that was killed, lost its server or ran out of time; each attempt resumes."""
    retry_wait: float = operational(5.0, non_negative())
    """Seconds before the second attempt; doubles with each further one."""
    time_limit: float = operational(0.0, non_negative())
    """Longest duration of a stage's worker, in seconds; 0: no limit."""
    stages: dict[str, StageLimits] = operational({})
    """`retries`, `retry_wait` and `time_limit` of single stages: `{train: {time_limit: 7200}}`."""


@dataclass(kw_only=True, slots=True, repr=False)
class Mooncake(Options):
    """`serve.mooncake`: the store for `extract.connector=mooncake`. Start its master yourself, for example with
    `mooncake_master --rpc_port 50051`. It has no access control, and its clients listen on every interface: run it only
    in a network whose users are trusted."""

    master: str = operational("127.0.0.1:50051")
    """Address of the master, `HOST:PORT`, as the server and the stages reach it."""
    metadata: str = operational("P2PHANDSHAKE")
    """How clients find each other: `P2PHANDSHAKE` (they ask each other), or the URL of a metadata server."""
    protocol: str = operational("tcp")
    """Transport: `tcp`, `rdma`, or another that Mooncake was built with."""
    device: str = operational("")
    """RDMA devices (`mlx5_0,mlx5_1`); empty: Mooncake chooses."""
    host: str = operational("127.0.0.1")
    """Address at which other clients reach a server that is started here; loopback: only from the same machine."""
    segment_gib: float = operational(4.0, positive())
    """Memory that a server adds to the store, in GiB. It must hold the hidden states of all requests in flight."""
    buffer_gib: float = operational(2.0, positive())
    """Memory of a server's transfer buffer, in GiB."""
