"""What may run beside what, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.config import Config, Device
from speculators.errors import RecipeError
from speculators.runner import graph, schedule
from speculators.runner.graph import Node
from speculators.runner.schedule import GIB, LIGHT, Limits, Need, Room


def a_room(devices: int = 1, memory: int = 8, places: int = 4) -> Room:
    return Room(devices=devices, memory=memory * GIB, places=places)


def test_a_device_goes_to_one_stage_and_comes_back() -> None:
    room = a_room()
    assert room.take("train", Need(devices=1)) == (0,)
    assert room.take("extract", Need(devices=1)) is None
    assert room.take("vocab", Need()) == ()
    assert room.holds("vocab")
    room.give_back("train")
    assert room.take("extract", Need(devices=1)) == (0,)


def test_devices_of_ones_own_server_come_first_and_those_of_others_last() -> None:
    room = a_room(devices=4)
    assert room.take("a", Need(devices=1), prefer=(2,)) == (2,)
    assert room.take("b", Need(devices=2), avoid=(0,)) == (1, 3)
    assert room.take("c", Need(devices=1), avoid=(0,)) == (0,)


def test_what_is_larger_than_the_machine_runs_alone_instead_of_never() -> None:
    room = a_room(memory=2)
    assert room.take("light", Need()) == ()
    assert room.take("large", Need(devices=8, memory=99 * GIB)) is None
    room.give_back("light")
    assert room.take("large", Need(devices=8, memory=99 * GIB)) == (0,)
    assert room.take("light", Need()) is None


def test_nothing_runs_beside_a_measurement() -> None:
    room = a_room()
    room.take("vocab", Need())
    assert room.take("evaluate", Need(devices=1, alone=True)) is None
    room.give_back("vocab")
    assert room.take("evaluate", Need(devices=1, alone=True)) == (0,)
    assert room.take("vocab", Need()) is None


def node(config: Config, name: str) -> Node:
    return graph.build(config)[name]


def test_needs_follow_from_the_servers_the_weights_and_the_machine(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    config.hardware.device, config.serve.kv_cache_gib = Device.cpu, 1.0
    assert schedule.need(node(config, "tokenize"), config, tmp_path) == Need()
    assert schedule.need(node(config, "train"), config, tmp_path) == Need(devices=1, memory=LIGHT + 100)
    served = schedule.need(node(config, "regenerate"), config, tmp_path)
    assert served == Need(devices=1, memory=LIGHT + GIB + 100)
    measured = schedule.need(node(config, "evaluate"), config, None)
    assert measured == Need(devices=1, memory=LIGHT + 2 * GIB, alone=True)
    config.hardware.device, config.serve.tensor_parallel = Device.cuda, 2
    assert schedule.need(node(config, "evaluate"), config, None) == Need(devices=2, memory=LIGHT)
    config.serve.url = "http://elsewhere:8000"
    assert schedule.need(node(config, "regenerate"), config, tmp_path) == Need()


def test_a_stage_sees_its_devices_and_of_the_users_choice_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert schedule.environment(config, (0,)) == {}, "how many there are was not said"
    config.hardware.gpus = 2
    assert schedule.environment(config, ()) == {}
    assert schedule.environment(config, (1,)) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert schedule.environment(config, (0, 1)) == {"CUDA_VISIBLE_DEVICES": "4,6"}


def test_what_is_said_of_one_stage_goes_before_what_is_said_of_all(config: Config) -> None:
    config.run.retries, config.run.stages = 1, {"train": {"time_limit": 7200.0}}
    assert schedule.limits(config, "train") == Limits(retries=1, retry_wait=5.0, time_limit=7200.0)
    assert schedule.limits(config, "vocab") == Limits(retries=1, retry_wait=5.0, time_limit=0.0)
    schedule.check(config)
    config.run.stages = {"train": {"timelimit": 1.0}}
    with pytest.raises(RecipeError) as raised:
        schedule.check(config)
    assert raised.value.message == "run.stages.train: there is no option `timelimit`"
    assert raised.value.hint == "did you mean `time_limit`?"
