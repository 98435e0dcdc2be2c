"""Training from a live server: the same batches and bytes as from files, within its bounds, whatever ends early."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import states_server
import tiny
import torch
from run_train import make_job
from states_server import Known, StatesServer

from speculators import timeouts
from speculators.config.algorithms import Init
from speculators.config.choices import Dtype
from speculators.config.schema import Extract
from speculators.data.packing import RowSlice
from speculators.data.token_table import prediction_mask
from speculators.errors import ContractError, RunError, ServiceError, StageError
from speculators.features import disk_cache
from speculators.features.contract import feature_contract
from speculators.features.dataloader import DataLoader
from speculators.features.disk_cache import HiddenStatesCache
from speculators.features.encoding import LAST, decode, encode, last_layer_part
from speculators.job import Job
from speculators.stages import train
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.targets.fidelity_check import check_server
from speculators.targets.readings import checkpoint_reading
from speculators.training import checkpoint
from speculators.training.live_features import LiveFeatures, RowShape

EPOCHS = 3
TOKEN = 4 * tiny.H * 2
"""Bytes of one token's states, stored."""
NO_MEMORY = 1e-9
"""GiB that hold no row: everything is fetched when it is waited for."""


@dataclasses.dataclass
class World:
    path: Path
    known: Known
    trained: dict[str, bytes]
    """What training from the files comes to."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.known))


@pytest.fixture(scope="module")
def world(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world")
    known = states_server.write_world(path)
    job = make_job(path, path / "work")
    job.config.target.dtype = Dtype.float32
    train.main(job)
    assert job.record["seconds_waited"] <= job.record["seconds_in_steps"]
    return World(path, known, files(job.output))


@pytest.fixture
def serve(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StatesServer]]:
    monkeypatch.setattr(timeouts, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(disk_cache, "SET_TOKENS", 64)
    servers: list[StatesServer] = []

    def start(**options: Any) -> StatesServer:
        servers.append(StatesServer(world.known, tmp_path / f"states-{len(servers)}", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def feed_of(world: World, server: StatesServer, memory: int) -> LiveFeatures:
    shape = RowShape(layers=4, hidden_size=tiny.H, compute=torch.float32, stored="bfloat16", everywhere=False)
    options = Extract(concurrency=2, retries=1, timeout=20.0)
    return LiveFeatures(
        server.endpoint, world.path / "tokens", shape, options, memory=memory, prefetch_batches=16, cache=None
    )


def drawn(feed: LiveFeatures, world: World, row: int) -> torch.Tensor:
    """The states of a row, as training asks for them, NaN where they are not kept."""
    ids = np.array(list(world.known)[row])
    places = torch.from_numpy(feed.last_layer_mask(row, len(ids)))
    into = room(feed, places)
    feed.fill([(row, len(ids))], ids, into)
    return joined(into, places)


def room(feed: LiveFeatures, places: torch.Tensor) -> dict[str, torch.Tensor]:
    counts = {name: int(places.sum()) if name in LAST.values() else len(places) for name in feed.layout}
    return {name: torch.empty(counts[name], *each, dtype=dtype) for name, (dtype, each) in feed.layout.items()}


def joined(into: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    states = decode(into)
    last = torch.full((len(states), 1, tiny.H), torch.nan, dtype=states.dtype)
    last[places, 0] = decode(last_layer_part(into))
    return torch.cat([states, last], 1)


def times_asked(server: StatesServer, world: World) -> list[int]:
    counted = Counter(server.asked)
    return [counted[ids] for ids in world.known]


@pytest.mark.parametrize(
    "bounds",
    [{}, {"states_memory_gib": NO_MEMORY}, {"states_disk_gib": 1.0}, {"states_disk_gib": 9e4 / 2**30}],
    ids=["online", "online without memory", "hybrid", "hybrid with too little disk"],
)
def test_training_from_a_server_ends_in_the_bytes_of_training_from_files(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer], bounds: dict[str, float]
) -> None:
    job = make_job(world.path, tmp_path / "work", serve().endpoint, **bounds)
    train.main(job)
    assert files(job.output) == world.trained
    assert job.record["prefilled_rows"] >= len(world.known)
    assert job.record["prefill_tokens_per_second"] > 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_that_would_be_stored_in_float8_are_trained_on_as_they_would_be_read(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer], on_disk: bool
) -> None:
    server = serve()
    shape = RowShape(layers=4, hidden_size=tiny.H, compute=torch.float32, stored="float8_e4m3fn", everywhere=False)
    assert shape.bytes(1, 1) == TOKEN // 2 + 4 * 2, "a scale a layer"
    options = Extract(concurrency=2, retries=1, timeout=20.0)
    contract = feature_contract(
        target="t", tokens="k", dtype="float8_e4m3fn", compute_dtype="float32",
        layer_ids=states_server.LAYER_IDS, hidden_size=tiny.H,
    )  # fmt: skip
    kept = HiddenStatesCache(tmp_path / "kept", contract, 2**30) if on_disk else None
    feed = LiveFeatures(
        server.endpoint, world.path / "tokens", shape, options, memory=0, prefetch_batches=2, cache=kept
    )
    feed.expect([])
    read = decode(encode("row 3", list(world.known.values())[3], "float8_e4m3fn"))
    places = torch.from_numpy(feed.last_layer_mask(3, len(read)))
    assert 0 < int(places.sum()) < len(places)
    read[~places, -1] = torch.nan
    torch.testing.assert_close(drawn(feed, world, 3), read, rtol=0, atol=0, equal_nan=True)
    feed.close()
    if kept is not None:
        reopened = HiddenStatesCache(tmp_path / "kept", contract, 2**30)
        assert reopened.rows_reused == 1
        into = room(feed, places)
        reopened.fill(3, into)
        torch.testing.assert_close(joined(into, places), read, rtol=0, atol=0, equal_nan=True)


def test_while_there_is_memory_a_row_is_prefilled_once_for_all_epochs(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server = serve()
    job = make_job(world.path, tmp_path / "work", server.endpoint, batch_tokens=16, epochs=EPOCHS)
    train.main(job)
    assert set(times_asked(server, world)) == {1}
    assert job.record["peak_states_bytes"] <= world.tokens * TOKEN
    assert list(server.directory.iterdir()) == []


def test_memory_is_bounded_by_what_the_recipe_allows(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server, room = serve(), 300 * TOKEN
    bounds = {"states_memory_gib": room / 2**30, "prefetch_batches": 2}
    job = make_job(world.path, tmp_path / "work", server.endpoint, **bounds, epochs=EPOCHS)
    job.config.speculator.init = Init.random  # which looks at rows before the first epoch
    train.main(job)
    assert job.record["peak_states_bytes"] <= room, "a batch has 64 tokens, so two always fit"
    asked = times_asked(server, world)
    assert len(world.known) < sum(asked) < EPOCHS * len(world.known), "some rows stayed from one epoch to the next"


def test_the_server_runs_ahead_of_training_and_no_further_than_memory_goes(
    world: World, serve: Callable[..., StatesServer]
) -> None:
    server, enough = serve(), threading.Event()
    server.before = lambda number: enough.set() if number == 5 else None
    lengths = [len(key) for key in world.known]
    feed = feed_of(world, server, memory=sum(lengths[:5]) * TOKEN)
    feed.expect([[row] for row in range(len(lengths))])
    assert enough.wait(20), "nobody has waited for a row yet"
    found = drawn(feed, world, 0)
    feed.close()
    torch.testing.assert_close(found[:, :-1], next(iter(world.known.values()))[:, :-1].bfloat16(), rtol=0, atol=0)
    assert len(server.asked) < len(lengths)
    assert feed.peak_bytes <= sum(lengths[:5]) * TOKEN


def test_a_hybrid_training_prefills_again_only_what_its_budget_did_not_hold(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server, budget = serve(), world.tokens * TOKEN // 2
    options = {"states_disk_gib": budget / 2**30, "states_memory_gib": NO_MEMORY}
    job = make_job(world.path, tmp_path / "work", server.endpoint, epochs=EPOCHS, **options)
    job.config.speculator.init = Init.random
    train.main(job)
    on_disk = sum(path.stat().st_size for path in (job.scratch / "states").rglob("*") if path.is_file())
    assert on_disk == job.record["kept_bytes"] <= budget
    asked = times_asked(server, world)
    assert job.record["kept_rows"] == asked.count(1) > 0
    assert {count for count in asked if count != 1} == {EPOCHS}


def test_a_training_killed_in_mid_feed_goes_on_from_its_seal_and_asks_for_no_kept_row_again(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server, work = serve(), tmp_path / "work"
    plain = dataclasses.asdict(server.endpoint) | {"api_key": "k"}
    (tmp_path / "endpoint.json").write_text(json.dumps(plain, default=str))
    paths = os.pathsep.join([str(Path(tiny.__file__).parent), str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(Path(__file__).parent / "run_train.py"), str(world.path), str(work), "0", "eagle3"]
    command += [str(tmp_path / "endpoint.json"), str(9e4 / 2**30)]
    dying = threading.Event()

    def kill(number: int) -> None:
        sealed = list((work / "scratch").glob("step-*/sealed.json")) if number > len(world.known) else []
        if sealed and not dying.is_set():
            dying.set()
            os.kill(process.pid, signal.SIGKILL)

    server.before = kill
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stderr=log)
        assert process.wait(120) == -signal.SIGKILL, (tmp_path / "log").read_text()
    found = checkpoint.newest(work / "scratch")
    assert found is not None
    assert checkpoint.read_checkpoint(found)[1]["step"] > 0
    kept = {p.name for p in (work / "scratch" / "states").iterdir()}
    before = Counter(server.asked)
    job = make_job(world.path, work, server.endpoint, states_disk_gib=9e4 / 2**30)
    train.main(job)
    assert files(job.output) == world.trained
    assert job.record["reused_rows"] == len(kept) > 0
    again = Counter(server.asked) - before
    assert len([key for key in world.known if again[key] == 0]) >= len(kept)


def test_a_server_that_dies_in_mid_flight_ends_the_attempt_and_another_one_takes_over(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server, work = serve(), tmp_path / "work"
    server.endpoint.log.write_text("the log's last line\n")

    def die(number: int) -> None:
        if number == 30:
            threading.Thread(target=server.stop).start()
        if number >= 30:
            raise ConnectionResetError

    server.before = die
    bounds = {"states_memory_gib": NO_MEMORY, "states_disk_gib": 9e4 / 2**30, "checkpoint_seconds": 0.0}
    with pytest.raises(ServiceError, match="the log's last line"):
        train.main(make_job(world.path, work, server.endpoint, **bounds))
    job = make_job(world.path, work, serve().endpoint, **bounds)
    train.main(job)
    assert files(job.output) == world.trained
    assert job.record["reused_rows"] > 0


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["hidden_states"][0, 2] = float("nan")


def other_tokens(tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_ids"][0] += 1


def other_layers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"][:, :3].contiguous()


def other_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"].half()


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (nan, StageError, r"row \d+: the target's hidden states are not finite \(captured layers number \[2\]\)"),
        (other_tokens, ContractError, r"row \d+: the server exported the hidden states of other tokens"),
        (other_layers, ContractError, r"the hidden states of row \d+ have shape \[\d+, 3, 32\], not \[\d+, 4, 32\]"),
        (other_type, ContractError, r"row \d+: the server computes in torch.float16"),
    ],
)
def test_bad_states_stop_the_training_and_are_neither_trained_on_nor_kept(
    world: World,
    tmp_path: Path,
    serve: Callable[..., StatesServer],
    spoil: Callable[[dict[str, torch.Tensor]], None],
    kind: type[RunError],
    message: str,
) -> None:
    server = serve()
    server.spoil = spoil
    job = make_job(world.path, tmp_path / "work", server.endpoint, states_disk_gib=1.0)
    with pytest.raises(kind, match=message):
        train.main(job)
    assert list((job.scratch / "states").iterdir()) == []
    assert list(job.output.iterdir()) == []


def test_a_server_of_another_run_on_the_port_is_refused(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    server = serve(model="target-old")
    endpoint = dataclasses.replace(server.endpoint, model="target-new")
    with pytest.raises(ServiceError, match=r"answered 404: The model `target-new` does not exist"):
        train.main(make_job(world.path, tmp_path / "work", endpoint))
    assert server.asked == []


def test_a_training_that_is_stopped_while_it_waits_leaves_no_thread(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, asked = serve(), threading.Event()
    held = threading.Event()

    def hold(number: int) -> None:
        asked.set()
        held.wait(20)

    def interrupt(self: threading.Condition, predicate: Callable[[], bool]) -> None:
        while not asked.is_set():
            self.wait(0.01)
        raise KeyboardInterrupt

    server.before = hold
    monkeypatch.setattr(threading.Condition, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main(make_job(world.path, tmp_path / "work", server.endpoint))
    held.set()
    assert "feed" not in [thread.name for thread in threading.enumerate()]


def test_rows_that_were_not_expected_come_too(world: World, serve: Callable[..., StatesServer]) -> None:
    server = serve()
    feed = feed_of(world, server, memory=0)
    corpus = DataLoader(world.path / "tokens", feed)
    corpus.expect([[RowSlice(0, 0, 8)]])
    for row in (7, 0, 3):
        pack = corpus.pack([RowSlice(row, 0, corpus.lengths[row])], torch.device("cpu"))
        known = world.known[tuple(pack.token_ids.tolist())].bfloat16()
        assert torch.equal(pack.hidden_states, known[:, :-1])
        assert torch.equal(pack.last_hidden_states, known[torch.from_numpy(prediction_mask(pack.loss_mask)), -1])
    feed.close()


def test_progress_says_how_much_of_the_time_training_waits(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer]
) -> None:
    job = make_job(world.path, tmp_path / "work", serve().endpoint)
    train.main(job)
    note = json.loads((job.work / "progress.json").read_text())["note"]
    assert note.get("waiting", "0%").endswith("%")
    assert note["loss"] > 0
    assert 0 <= job.record["seconds_waited"] <= job.record["seconds_in_steps"]


def test_options_of_a_stage_that_reads_files_are_not_there_for_it(world: World, tmp_path: Path) -> None:
    job: Job = make_job(world.path, tmp_path / "work")
    with pytest.raises(AttributeError):
        _ = job.config.extract


@pytest.mark.parametrize("captured", ["right", "other layers", "other picks"])
def test_nothing_is_trained_on_what_a_server_does_not_compute_with(
    world: World, tmp_path: Path, serve: Callable[..., StatesServer], captured: str
) -> None:
    server = serve()
    reading = checkpoint_reading(TargetCheckpoint(world.path / "target"))

    def pick(states: torch.Tensor) -> int:
        return int(reading.logits(reading.normed(states[None])).argmax())

    server.pick = pick if captured != "other picks" else server.pick
    if captured == "other layers":
        server.spoil = lambda tensors: tensors.update(
            hidden_states=tensors["hidden_states"][:, [1, 0, 2, 3]].contiguous()
        )
    job = make_job(world.path, tmp_path / "work", server.endpoint)
    job.config.target.min_greedy_agreement = 0.98
    if captured == "right":
        check_server(job)
        assert job.record["fidelity"]["agree"] == job.record["fidelity"]["picks"] == 16
        return
    said = (
        "3 instead of 1, 1 instead of 3"
        if captured == "other layers"
        else r"reproduce \d of 16 greedy tokens of the server, .*no reading of norm and head agrees$"
    )
    with pytest.raises(ContractError, match=said):
        train.main(job)
    assert list(job.output.iterdir()) == []
