"""What fits on which devices, on pretended machines; nothing here has a GPU."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction

import pytest

from speculators.config import compose
from speculators.config.choices import Device, Dtype, ExecutorName
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.execution.placement import (
    BASE_MEMORY_BYTES,
    Placement,
    Split,
    device_environment,
    device_names,
    placement_for,
)
from speculators.runner.hardware import GIB, Machine
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node
from speculators.runner.planning.sizes import Sizes
from tests.runner.machines import machine

GPUS, MEMORIES, PARAMETERS = (1, 2, 3, 8), (24, 80, 141), (0, 8_000_000_000, 31_000_000_000, 405_000_000_000)
TENSOR, DATA, PROCESSES = (None, 1, 2, 4, 16), (None, 2), (None, 1, 8)
KINDS = ("regenerate", "train", "drawing", "evaluate")


def sizes(parameters: int) -> Sizes:
    """Of a target with 32 heads, and a draft of a twentieth of its size."""
    return Sizes(
        parameters=parameters, heads=32, key_value_heads=8, cache_values=parameters // 40, trained=parameters // 20,
        frozen_bytes=parameters // 10, activation_bytes=parameters // 4,
    )  # fmt: skip


def on_gpus(config: Config, tensor: int | None = None, data: int | None = None, processes: int | None = None) -> Config:
    config.hardware.device, config.train.device = Device.cuda, Device.auto
    config.target.dtype = Dtype.bfloat16
    config.serve.tensor_parallel, config.serve.data_parallel = tensor, data
    config.train.num_processes, config.train.batch_tokens = processes, 8192
    return config


def node(config: Config, kind: str) -> Node:
    if kind == "drawing":
        config.pipeline["train"] = {"tokens": "tokenize", "vocab": "vocab", "target": "serve"}
    return graph.build(config)["train" if kind == "drawing" else kind]


def check(placed: Placement, config: Config, there: Machine, known: Sizes) -> None:
    """What holds for every placement: no GPU has two servers, none is overfull, and sizes are those of the recipe."""
    assert placed.devices <= len(there.gpus)
    for phase in placed.phases:
        devices = [device for server in phase for device in server.devices]
        assert len(devices) == len(set(devices)), "a GPU has one server"
        assert set(devices) <= set(range(placed.devices))
        for server in phase:
            assert len(server.devices) == server.ranks
            assert server.utilization is not None
            assert config.serve.tensor_parallel in (None, server.tensor)
            assert config.serve.data_parallel in (None, server.data)
            draft = server.serving.mode == "speculative"
            need = known.server_bytes(server.serving.dtype.name, server.tensor, server.pipeline, draft=draft)
            assert need <= server.utilization * there.gpu_memory
        load = dict.fromkeys(range(placed.devices), Fraction(0))
        for server in phase:
            load |= {device: load[device] + Fraction(server.utilization or 0) for device in server.devices}
        for device in placed.worker:
            training = known.training_bytes(config, placed.processes, fsdp=placed.fsdp)
            load[device] += Fraction(training, there.gpu_memory)
        assert max(load.values()) <= 1
    sides = [s for phase in placed.phases for s in phase if s.serving.mode in ("baseline", "speculative")]
    for dtype in {side.serving.dtype for side in sides}:
        same = {(s.tensor, s.pipeline, s.data, s.utilization) for s in sides if s.serving.dtype is dtype}
        assert len(same) == 1, "speeds are compared between servers of the same size"


@pytest.mark.parametrize("kind", KINDS)
def test_no_device_is_overfull_and_what_does_not_fit_is_refused_with_the_options_to_change(
    config: Config, kind: str
) -> None:
    stage = node(config, kind)
    placed, refusals = 0, list[RecipeError]()
    for gpus, memory, parameters in itertools.product(GPUS, MEMORIES, PARAMETERS):
        there, known = machine(gpus, memory), sizes(parameters)
        for tensor, data, processes in itertools.product(TENSOR, DATA, PROCESSES):
            on_gpus(config, tensor, data, processes)
            try:
                check(placement_for(stage, config, there, known), config, there, known)
                placed += 1
            except RecipeError as refusal:
                refusals.append(refusal)
    assert min(placed, len(refusals)) > 50
    for refusal in refusals:
        assert re.search(r"serve\.\w+_parallel=\d+|train\.num_processes=\d+|GiB", refusal.message), refusal
        assert re.search(r"=\w+", refusal.hint), "with what to set"


@pytest.mark.parametrize(
    ("gpus", "gib", "parameters", "kind", "expected"),
    [
        (1, 80, 8e9, "regenerate", [["1"]]),
        (8, 80, 8e9, "regenerate", [["1x8"]]),
        (8, 80, 31e9, "regenerate", [["2x4"]]),
        (8, 24, 31e9, "regenerate", [["4x2"]]),
        (8, 80, 70e9, "regenerate", [["4x2"]]),
        (2, 141, 31e9, "evaluate", [["1", "1"], ["2"], ["2"]]),
        (1, 80, 31e9, "evaluate", [["1"], ["1"]]),  # 124 GB in float32 fit nowhere: compared as it is served
        (4, 80, 31e9, "evaluate", [["2", "2"], ["4"], ["4"]]),
        (8, 80, 31e9, "evaluate", [["2", "2"], ["4", "4"]]),
        (8, 80, 31e9, "drawing", [["2x3"]]),
        (2, 80, 31e9, "drawing", [["1"]]),
        (1, 141, 31e9, "drawing", [["1"]]),
    ],
)
def test_sizes_follow_from_the_targets_bytes_and_the_gpus(
    config: Config, gpus: int, gib: float, parameters: float, kind: str, expected: list[list[str]]
) -> None:
    stage = node(on_gpus(config), kind)
    placed = placement_for(stage, config, machine(gpus, gib), sizes(int(parameters)))
    shape = [[f"{s.tensor}x{s.data}".removesuffix("x1") for s in phase] for phase in placed.phases]
    assert shape == expected


def test_where_two_servers_do_not_fit_the_speculative_one_is_first_since_the_baseline_is_asked_about_differences(
    config: Config,
) -> None:
    stage = node(on_gpus(config), "evaluate")
    placed = placement_for(stage, config, machine(1), sizes(8_000_000_000))
    names = [[server.serving.name for server in phase] for phase in placed.phases]
    assert names == [["speculative"], ["baseline"], ["speculative_float32"], ["baseline_float32"]]


def test_training_gets_gpus_beside_the_server_it_streams_from_or_what_the_server_leaves(config: Config) -> None:
    stage = node(on_gpus(config), "drawing")
    placed = placement_for(stage, config, machine(8), sizes(31_000_000_000))
    assert (placed.phases[0][0].devices, placed.worker, placed.processes) == ((0, 1, 2, 3, 4, 5), (6, 7), 2)
    assert placed.split == Split(unit="GPUs", server=6, training=2, shared=False)
    shared = placement_for(stage, config, machine(1, 141), sizes(31_000_000_000))
    assert (shared.phases[0][0].devices, shared.worker) == ((0,), (0,))
    assert shared.split == Split(unit="GPUs", server=1, training=1, shared=True)
    assert 0.4 < (shared.phases[0][0].utilization or 0) < 0.9
    with pytest.raises(RecipeError, match=r"training about \d+\.\d GiB on a GPU, which do not fit") as caught:
        placement_for(stage, config, machine(1, 80), sizes(31_000_000_000))
    assert "pipeline=offline" in caught.value.hint
    config.serve.gpu_memory_utilization = 0.9
    with pytest.raises(RecipeError) as caught:
        placement_for(stage, config, machine(1, 141), sizes(31_000_000_000))
    assert "serve.gpu_memory_utilization=null" in caught.value.hint


def test_a_training_alone_gets_all_gpus_that_a_step_has_tokens_for_and_is_sharded_only_if_it_must(
    config: Config,
) -> None:
    stage = node(on_gpus(config), "train")
    placed = placement_for(stage, config, machine(8), sizes(8_000_000_000))
    assert (placed.worker, placed.processes, placed.fsdp) == (tuple(range(8)), 8, False)
    assert placement_for(stage, config, machine(8), sizes(90_000_000_000)).fsdp
    config.train.batch_tokens = 2048
    assert placement_for(stage, config, machine(8), sizes(8_000_000_000)).processes == 2
    config.train.num_processes = 5
    resolved = placement_for(stage, config, machine(8), sizes(8_000_000_000)).resolve(config)
    assert (resolved.train.num_processes, resolved.train.fsdp) == (5, False)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tensor_parallel", 16, r"serve\.tensor_parallel=16: a server would need 16 GPUs, and there are 8"),
        ("pipeline_parallel", 16, r"serve\.pipeline_parallel=16: .* need 16 GPUs"),
        ("data_parallel", 9, r"serve\.data_parallel=9: .* need 9 GPUs"),
        ("tensor_parallel", 3, r"serve\.tensor_parallel=3: does not divide the target's 32 query and 8 key"),
        ("gpu_memory_utilization", 0.1, r"need \d+\.\d GiB on each of 8 GPUs, and vLLM may use 8\.0 GiB"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_its_name_with_one_that_can(
    config: Config, option: str, value: float, message: str
) -> None:
    stage = node(on_gpus(config), "regenerate")
    setattr(config.serve, option, value)
    with pytest.raises(RecipeError, match=message) as caught:
        placement_for(stage, config, machine(8), sizes(31_000_000_000))
    hinted = re.search(rf"serve\.{option}=(\w+)", caught.value.hint)
    assert hinted
    setattr(config.serve, option, None if hinted[1] == "null" else int(hinted[1]))
    placement_for(stage, config, machine(8), sizes(31_000_000_000))


def test_what_is_not_known_is_said_and_refuses_nothing(config: Config) -> None:
    stage = node(on_gpus(config), "evaluate")
    unknown_target = placement_for(stage, config, machine(2), Sizes())
    assert [len(phase) for phase in unknown_target.phases] == [2, 2]
    assert "unknown until it is fetched" in unknown_target.notes[0]
    unknown_gpus = placement_for(stage, config, machine(2, 0), sizes(31_000_000_000))
    assert "memory is unknown" in unknown_gpus.notes[0]
    drawing = placement_for(node(on_gpus(config), "drawing"), config, machine(1, 0), sizes(31_000_000_000))
    assert drawing.phases[0][0].utilization == 0.5


def test_workers_of_one_extraction_divide_the_gpus(config: Config) -> None:
    config = on_gpus(compose.compose(["recipe=smollm2_eagle3", "pipeline=offline", "extract.workers=2"]))
    part = graph.build(config)["extract.1"]
    assert placement_for(part, config, machine(8), sizes(31_000_000_000)).devices == 4
    assert placement_for(part, config, machine(2, 60), sizes(31_000_000_000)).devices == 2, "one after the other"
    assert placement_for(graph.build(config)["extract"], config, machine(2), sizes(31_000_000_000)).devices == 0


def test_a_machine_without_a_gpu_has_none_to_give(config: Config) -> None:
    with pytest.raises(RecipeError, match=r"regenerate: its server needs a GPU, and there is none") as caught:
        placement_for(node(on_gpus(config), "regenerate"), config, machine(0), sizes(8_000_000_000))
    assert "hardware=h100x8" in caught.value.hint
    trained = placement_for(node(config, "train"), config, machine(0), sizes(8_000_000_000))
    assert (trained.devices, trained.processes, trained.gpus) == (1, 1, False)


def test_a_job_of_a_cluster_has_the_gpus_that_are_requested_for_it(config: Config) -> None:
    config = on_gpus(config)
    config.executor.name, config.executor.gpus = ExecutorName.slurm, 4
    placed = placement_for(node(config, "regenerate"), config, machine(0), sizes(31_000_000_000))
    assert (placed.on_this_machine, placed.phases[0][0].ranks) == (False, 4)
    assert placed.phases[0][0].tensor == 1, "its memory is unknown"
    config.hardware.gpu_memory_gib = 80.0
    described = replace(machine(8), described=True)
    assert placement_for(node(config, "regenerate"), config, described, sizes(31_000_000_000)).phases[0][0].tensor == 2
    config.serve.tensor_parallel = 8
    with pytest.raises(RecipeError, match=r"serve\.tensor_parallel=8: .*there are 4"):
        placement_for(node(config, "regenerate"), config, described, sizes(31_000_000_000))


def test_on_a_cpu_servers_share_all_cores_and_their_memory_is_counted(config: Config) -> None:
    config.hardware.device, config.serve.kv_cache_gib = Device.cpu, 1.0
    known = Sizes(parameters=25)
    there = machine(0, memory_gib=3)
    assert placement_for(node(config, "tokenize"), config, there, known) == Placement()
    assert placement_for(node(config, "train"), config, there, known).memory == BASE_MEMORY_BYTES + 100
    served = placement_for(node(config, "regenerate"), config, there, known)
    assert (served.devices, served.memory, served.exclusive) == (1, BASE_MEMORY_BYTES + GIB + 100, False)
    both = placement_for(node(config, "evaluate"), config, there, known)
    assert (both.memory, both.exclusive) == (BASE_MEMORY_BYTES + 2 * (GIB + 100), True)
    assert [[s.serving.name for s in phase] for phase in both.phases] == [["baseline", "speculative"]]
    in_turn = placement_for(node(config, "evaluate"), config, machine(0, memory_gib=1.5), known)
    assert [[s.serving.name for s in phase] for phase in in_turn.phases] == [["speculative"], ["baseline"]]
    with pytest.raises(RecipeError, match=r"serve.kv_cache_gib=1 do not fit into this machine's memory"):
        placement_for(node(config, "evaluate"), config, machine(0, memory_gib=1), known)
    config.serve.url = "http://elsewhere:8000"
    external = placement_for(node(config, "regenerate"), config, there, known)
    assert (external.devices, external.phases[0][0].serving.mode) == (0, "extract")


@pytest.mark.parametrize(
    ("cores", "wanted", "server", "training", "shared"),
    [(2, 0, 1, 1, False), (9, 0, 5, 4, False), (8, 6, 2, 6, False), (4, 9, 1, 3, False), (1, 0, 1, 1, True)],
)
def test_on_a_cpu_a_server_and_the_training_that_draws_from_it_divide_the_cores(
    config: Config, cores: int, wanted: int, server: int, training: int, shared: bool
) -> None:
    config.hardware.device, config.hardware.train_cores = Device.cpu, wanted
    there = machine(0, cores=cores)
    assert placement_for(node(config, "train"), config, there, Sizes()).split is None
    split = placement_for(node(config, "drawing"), config, there, Sizes()).split
    assert split == Split(unit="cores", server=server, training=training, shared=shared)


def test_processes_see_their_devices_by_the_numbers_of_the_bus(config: Config) -> None:
    there = machine(2)
    assert device_environment(on_gpus(config), there, (1,)) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert device_environment(config, there, ())["CUDA_VISIBLE_DEVICES"] == "", "a worker of a server needs none"
    config.hardware.device = Device.cpu
    assert device_names(config, there) == ["cpu"]
    assert device_environment(config, there, (0,)) == {}


def test_ranks_that_do_not_divide_the_heads_are_refused_on_a_cpu_too(config: Config) -> None:
    config.serve.tensor_parallel = 3
    with pytest.raises(RecipeError, match=r"serve\.tensor_parallel=3: does not divide the target's 32 query and 8 key"):
        placement_for(node(config, "regenerate"), config, machine(0, memory_gib=64), sizes(300_000_000))
