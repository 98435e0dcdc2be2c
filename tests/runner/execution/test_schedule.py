"""What may run beside what, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.config.execution import StageLimits
from speculators.config.schema import Config
from speculators.runner.execution import schedule
from speculators.runner.execution.device_locks import DeviceLocks
from speculators.runner.execution.placement import Placement
from speculators.runner.execution.schedule import Limits, ResourcePool
from speculators.runner.hardware import GIB

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
    assert pool.acquire("train", Placement(devices=1)) == (0,)
    assert pool.acquire("extract", Placement(devices=1)) is None
    assert pool.acquire("vocab", Placement()) == ()
    assert pool.is_running("vocab")
    pool.release("train")
    assert pool.acquire("extract", Placement(devices=1)) == (0,)


def test_devices_of_ones_own_server_come_first_and_those_of_others_last(locks: Path) -> None:
    pool = a_pool(locks, devices=4)
    assert pool.acquire("a", Placement(devices=1), prefer=(2,)) == (2,)
    assert pool.acquire("b", Placement(devices=2), avoid=(0,)) == (1, 3)
    assert pool.acquire("c", Placement(devices=1), avoid=(0,)) == (0,)


def test_what_is_larger_than_the_machine_runs_alone_instead_of_never(locks: Path) -> None:
    pool = a_pool(locks, memory=2)
    assert pool.acquire("light", Placement()) == ()
    assert pool.acquire("large", Placement(devices=8, memory=99 * GIB)) is None
    pool.release("light")
    assert pool.acquire("large", Placement(devices=8, memory=99 * GIB)) == (0,)
    assert pool.acquire("light", Placement()) is None


def test_nothing_runs_beside_a_measurement(locks: Path) -> None:
    pool = a_pool(locks)
    pool.acquire("vocab", Placement())
    assert pool.acquire("evaluate", Placement(devices=1, exclusive=True)) is None
    pool.release("vocab")
    assert pool.acquire("evaluate", Placement(devices=1, exclusive=True)) == (0,)
    assert pool.acquire("vocab", Placement()) is None


def test_two_runs_divide_the_devices_among_themselves_and_say_who_waits(locks: Path) -> None:
    WAITING.clear()
    one, other = a_pool(locks, devices=2), a_pool(locks, devices=2)
    assert one.acquire("a", Placement(devices=1)) == (0,)
    assert other.acquire("b", Placement(devices=2)) is None
    assert other.acquire("b", Placement(devices=2)) is None
    assert WAITING == ["b"]
    assert other.acquire("light", Placement()) == ()
    one.release("a")
    assert other.acquire("b", Placement(devices=2)) == (0, 1)


def test_a_device_that_another_run_has_is_passed_over(locks: Path) -> None:
    one, other = a_pool(locks, devices=2), a_pool(locks, devices=2)
    assert one.acquire("a", Placement(devices=1)) == (0,)
    assert other.acquire("b", Placement(devices=1)) == (1,)
    assert other.acquire("c", Placement(devices=1)) is None


def test_a_device_stays_a_runs_own_while_its_server_is_there(locks: Path) -> None:
    one, other = a_pool(locks), a_pool(locks)
    one.acquire("regenerate", Placement(devices=1))
    one.release("regenerate", servers={0})
    assert other.acquire("train", Placement(devices=1)) is None
    assert one.acquire("extract", Placement(devices=1)) == (0,)
    one.release("extract")
    assert other.acquire("train", Placement(devices=1)) == (0,)


def test_no_other_run_computes_beside_a_measurement(locks: Path) -> None:
    one, other, third = (a_pool(locks, devices=2) for _ in range(3))
    assert one.acquire("evaluate", Placement(devices=1, exclusive=True)) == (0,)
    assert other.acquire("train", Placement(devices=1)) is None
    one.close()
    assert other.acquire("train", Placement(devices=1)) == (0,)
    assert third.acquire("train", Placement(devices=1)) == (1,)
    assert one.acquire("evaluate", Placement(devices=1, exclusive=True)) is None


def test_what_runs_on_machines_of_its_own_takes_nothing_here_and_waits_for_nothing(locks: Path) -> None:
    pool = a_pool(locks, slots=1)
    assert pool.acquire("extract.1", Placement(on_this_machine=False)) == ()
    assert pool.acquire("evaluate", Placement(devices=1, exclusive=True)) == (0,)
    assert pool.acquire("extract.2", Placement(on_this_machine=False)) == ()
    assert pool.is_running("extract.1")


def test_where_nothing_can_be_locked_a_run_goes_on_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert a_pool(tmp_path / "file").acquire("train", Placement(devices=1)) == (0,)


def test_what_is_said_of_one_stage_goes_before_what_is_said_of_all(config: Config) -> None:
    config.run.retries, config.run.stages = 1, {"train": StageLimits(time_limit=7200.0)}
    assert schedule.limits(config, "train") == Limits(retries=1, retry_wait=5.0, time_limit=7200.0)
    assert schedule.limits(config, "vocab") == Limits(retries=1, retry_wait=5.0, time_limit=0.0)
    schedule.check_limits(config)
