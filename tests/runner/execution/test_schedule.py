"""What may run beside what, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.config.choices import Device, ExecutorName
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.execution import schedule
from speculators.runner.execution.device_locks import DeviceLocks
from speculators.runner.execution.schedule import BASE_MEMORY_BYTES, GIB, Limits, Need, ResourcePool, Split
from speculators.runner.planning import graph
from speculators.runner.planning.graph import Node

WAITING: list[str] = []
"""The stages of which a pool has said that they wait for another run."""


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def a_pool(locks: Path, devices: int = 1, memory: int = 8, slots: int = 4) -> ResourcePool:
    return ResourcePool(
        devices=devices,
        memory=memory * GIB,
        slots=slots,
        locks=DeviceLocks(locks, [str(n) for n in range(devices)]),
        on_wait=WAITING.append,
    )


def test_a_device_goes_to_one_stage_and_comes_back(locks: Path) -> None:
    pool = a_pool(locks)
    assert pool.acquire("train", Need(devices=1)) == (0,)
    assert pool.acquire("extract", Need(devices=1)) is None
    assert pool.acquire("vocab", Need()) == ()
    assert pool.is_running("vocab")
    pool.release("train")
    assert pool.acquire("extract", Need(devices=1)) == (0,)


def test_devices_of_ones_own_server_come_first_and_those_of_others_last(locks: Path) -> None:
    pool = a_pool(locks, devices=4)
    assert pool.acquire("a", Need(devices=1), prefer=(2,)) == (2,)
    assert pool.acquire("b", Need(devices=2), avoid=(0,)) == (1, 3)
    assert pool.acquire("c", Need(devices=1), avoid=(0,)) == (0,)


def test_what_is_larger_than_the_machine_runs_alone_instead_of_never(locks: Path) -> None:
    pool = a_pool(locks, memory=2)
    assert pool.acquire("light", Need()) == ()
    assert pool.acquire("large", Need(devices=8, memory=99 * GIB)) is None
    pool.release("light")
    assert pool.acquire("large", Need(devices=8, memory=99 * GIB)) == (0,)
    assert pool.acquire("light", Need()) is None


def test_nothing_runs_beside_a_measurement(locks: Path) -> None:
    pool = a_pool(locks)
    pool.acquire("vocab", Need())
    assert pool.acquire("evaluate", Need(devices=1, exclusive=True)) is None
    pool.release("vocab")
    assert pool.acquire("evaluate", Need(devices=1, exclusive=True)) == (0,)
    assert pool.acquire("vocab", Need()) is None


def test_two_runs_divide_the_devices_among_themselves_and_say_who_waits(locks: Path) -> None:
    WAITING.clear()
    one, other = a_pool(locks, devices=2), a_pool(locks, devices=2)
    assert one.acquire("a", Need(devices=1)) == (0,)
    assert other.acquire("b", Need(devices=2)) is None
    assert other.acquire("b", Need(devices=2)) is None
    assert WAITING == ["b"]
    assert other.acquire("light", Need()) == ()
    one.release("a")
    assert other.acquire("b", Need(devices=2)) == (0, 1)


def test_a_device_that_another_run_has_is_passed_over(locks: Path) -> None:
    one, other = a_pool(locks, devices=2), a_pool(locks, devices=2)
    assert one.acquire("a", Need(devices=1)) == (0,)
    assert other.acquire("b", Need(devices=1)) == (1,)
    assert other.acquire("c", Need(devices=1)) is None


def test_a_device_stays_a_runs_own_while_its_server_is_there(locks: Path) -> None:
    one, other = a_pool(locks), a_pool(locks)
    one.acquire("regenerate", Need(devices=1))
    one.release("regenerate", servers={0})
    assert other.acquire("train", Need(devices=1)) is None
    assert one.acquire("extract", Need(devices=1)) == (0,)
    one.release("extract")
    assert other.acquire("train", Need(devices=1)) == (0,)


def test_no_other_run_computes_beside_a_measurement(locks: Path) -> None:
    one, other, third = (a_pool(locks, devices=2) for _ in range(3))
    assert one.acquire("evaluate", Need(devices=1, exclusive=True)) == (0,)
    assert other.acquire("train", Need(devices=1)) is None
    one.close()
    assert other.acquire("train", Need(devices=1)) == (0,)
    assert third.acquire("train", Need(devices=1)) == (1,)
    assert one.acquire("evaluate", Need(devices=1, exclusive=True)) is None


def test_what_runs_on_machines_of_its_own_takes_nothing_here_and_waits_for_nothing(locks: Path) -> None:
    pool = a_pool(locks, slots=1)
    assert pool.acquire("extract.1", Need(on_this_machine=False)) == ()
    assert pool.acquire("evaluate", Need(devices=1, exclusive=True)) == (0,)
    assert pool.acquire("extract.2", Need(on_this_machine=False)) == ()
    assert pool.is_running("extract.1")


def test_where_nothing_can_be_locked_a_run_goes_on_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert a_pool(tmp_path / "file").acquire("train", Need(devices=1)) == (0,)


def node(config: Config, name: str) -> Node:
    return graph.build(config)[name]


def test_needs_follow_from_the_servers_the_weights_and_the_machine(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    config.hardware.device, config.serve.kv_cache_gib = Device.cpu, 1.0
    assert schedule.need(node(config, "tokenize"), config, tmp_path) == Need()
    assert schedule.need(node(config, "train"), config, tmp_path) == Need(devices=1, memory=BASE_MEMORY_BYTES + 100)
    served = schedule.need(node(config, "regenerate"), config, tmp_path)
    assert served == Need(devices=1, memory=BASE_MEMORY_BYTES + GIB + 100)
    measured = schedule.need(node(config, "evaluate"), config, None)
    assert measured == Need(devices=1, memory=BASE_MEMORY_BYTES + 2 * GIB, exclusive=True)
    config.hardware.device, config.serve.tensor_parallel = Device.cuda, 2
    assert schedule.need(node(config, "evaluate"), config, None) == Need(devices=2, memory=BASE_MEMORY_BYTES)
    config.serve.url = "http://elsewhere:8000"
    assert schedule.need(node(config, "regenerate"), config, tmp_path) == Need()
    config.executor.name, config.serve.url = ExecutorName.slurm, ""
    assert schedule.need(node(config, "evaluate"), config, tmp_path) == Need(on_this_machine=False)


def drawing(config: Config) -> Node:
    config.pipeline["train"] = {"tokens": "tokenize", "vocab": "vocab", "target": "serve"}
    return node(config, "train")


@pytest.mark.parametrize(
    ("cores", "wanted", "server", "training", "shared"),
    [(2, 0, 1, 1, False), (9, 0, 5, 4, False), (8, 6, 2, 6, False), (4, 9, 1, 3, False), (1, 0, 1, 1, True)],
)
def test_on_a_cpu_a_server_and_the_training_that_draws_from_it_divide_the_cores(
    config: Config, monkeypatch: pytest.MonkeyPatch, cores: int, wanted: int, server: int, training: int, shared: bool
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    config.hardware.device, config.hardware.train_cores = Device.cpu, wanted
    assert schedule.split(node(config, "train"), config) is None
    found = Split(unit="cores", server=server, training=training, shared=shared)
    assert schedule.split(drawing(config), config) == found
    assert schedule.threads(drawing(config), config) == {"OMP_NUM_THREADS": str(training)}
    assert schedule.parts(drawing(config), config, (0,)) == ((0,), (0,))


def test_on_gpus_training_gets_one_beside_those_of_its_server(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    config.hardware.device, config.hardware.gpus, config.serve.tensor_parallel = Device.cuda, 4, 2
    stage = drawing(config)
    assert schedule.split(stage, config) == Split(unit="GPUs", server=2, training=1, shared=False)
    assert schedule.need(stage, config, tmp_path) == Need(devices=3, memory=BASE_MEMORY_BYTES + GIB + 200)
    assert schedule.parts(stage, config, (0, 1, 3)) == ((0, 1), (3,))
    assert schedule.parts(stage, config, (0, 1, 3), prefer=(1, 3)) == ((1, 3), (0,)), "where the server is up"
    assert schedule.threads(stage, config) == {}
    config.serve.url = "http://elsewhere:8000"
    assert schedule.split(stage, config) is None
    assert schedule.need(stage, config, tmp_path) == Need(devices=1, memory=BASE_MEMORY_BYTES + GIB + 100)


def test_a_gpu_is_shared_only_if_the_server_leaves_enough_of_it(config: Config) -> None:
    config.hardware.device, config.hardware.gpus = Device.cuda, 1
    stage = drawing(config)
    with pytest.raises(RecipeError, match=r"serve.gpu_memory_utilization=0.9 leaves it too little") as caught:
        schedule.split(stage, config)
    assert "hardware.gpus=2" in caught.value.hint
    config.serve.gpu_memory_utilization = 0.5
    assert schedule.split(stage, config) == Split(unit="GPUs", server=1, training=1, shared=True)
    assert schedule.need(stage, config, None).devices == 1
    assert schedule.parts(stage, config, (0,)) == ((0,), (0,))


def test_a_stage_sees_its_devices_and_of_the_users_choice_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert schedule.device_environment(config, (0,)) == {}, "how many there are was not said"
    config.hardware.gpus = 2
    assert schedule.device_environment(config, ()) == {}
    assert schedule.device_environment(config, (1,)) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert schedule.device_environment(config, (0, 1)) == {"CUDA_VISIBLE_DEVICES": "4,6"}


def test_what_is_said_of_one_stage_goes_before_what_is_said_of_all(config: Config) -> None:
    config.run.retries, config.run.stages = 1, {"train": {"time_limit": 7200.0}}
    assert schedule.limits(config, "train") == Limits(retries=1, retry_wait=5.0, time_limit=7200.0)
    assert schedule.limits(config, "vocab") == Limits(retries=1, retry_wait=5.0, time_limit=0.0)
    schedule.check_limits(config)
    config.run.stages = {"train": {"timelimit": 1.0}}
    with pytest.raises(RecipeError) as raised:
        schedule.check_limits(config)
    assert raised.value.message == "run.stages.train: there is no option `timelimit`"
    assert raised.value.hint == "did you mean `time_limit`?"
