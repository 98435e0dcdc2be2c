"""Durations come from earlier artifacts of this machine, scaled by the amount of work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from speculators.config import compose
from speculators.machine import describe_machine
from speculators.runner.planning.durations import Expected, expected
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.planning.reuse import Reuse
from speculators.runner.planning.workload import Workload
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store

WORK = Workload(conversations=20, answer_tokens=2000, tokens=4000, max_tokens=9000, source="sample")
TIMES = {"began": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z", "attempt": 1, "import_seconds": 2.0}
EARLIER: dict[str, dict[str, Any]] = {
    "regenerate": {"seconds": 40.0, "answer_tokens": 1000, "tokens_per_second": 50.0, "resumed": 0},
    "tokenize": {"seconds": 6.0, "tokens": 2000},
    "extract": {"seconds": 60.0, "tokens": 2000, "tokens_per_second": 100.0, "resumed": 5},
    "train": {"seconds": 50.0, "seconds_in_steps": 40.0, "steps": 100, "tokens": 6400, "tokens_per_second": 160.0},
    "evaluate": {"seconds": 60.0, "datasets": {"human_eval": {"prompts": 16}, "sharegpt": {"prompts": 16}}},
}


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def seconds(
    store: Store, earlier: dict[str, dict[str, Any]], *words: str, digest: str = "0", **provenance: Any
) -> dict[str, Expected]:
    """Estimates of a plan whose store has artifacts with these records and the same options."""
    config = compose.compose(
        ["recipe=smollm2_eagle3", "pipeline=offline", "train.max_steps=200", "train.epochs=6", *words]
    )
    planner = Planner(config, store)
    digests = dict.fromkeys(planner.graph, digest) | {"target": planner.step("target", {}).digest}
    for stage, record in earlier.items():
        step = planner.step(stage, digests)
        data = store.work(stage, step.key) / "data"
        data.mkdir(parents=True)
        (data / "content").write_text("1234")
        made = {"preimage": step.preimage, "record": record}
        store.publish(stage, step.key, **made, provenance={**describe_machine(), **TIMES, **provenance}, digest=None)
    steps: dict[str, Step] = {step.node.name: step for step in planner.plan()}
    return expected(planner, steps, WORK)


def test_each_stage_is_scaled_by_its_work_and_one_of_those_that_share_a_server_waits_for_it(store: Store) -> None:
    found = {name: stage.seconds for name, stage in seconds(store, EARLIER).items()}
    assert found["regenerate"] == 20 + 20 + 2 * 20, "start, what does not depend on the tokens, twice the tokens"
    assert found["tokenize"] == 54 + 5 + 2 * 1, "five seconds of imports"
    assert found["extract"] == 2 * 20, "the server is up, and the part that an earlier attempt did is not missing"
    assert found["train"] == 10 + 10 + 2 * 40
    assert found["evaluate"] == 5 + 2 * 55
    assert found["prompts"] is None, "no artifact of these data files"


def test_sizes_grow_with_the_work_where_the_output_does(store: Store) -> None:
    found = seconds(store, EARLIER)
    assert (found["tokenize"].bytes, found["train"].bytes, found["prompts"].bytes) == (8, 4, None)


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"cores": 999}, {"gpus": ["H100"] * 64}])
def test_another_machine_says_nothing(store: Store, change: dict[str, Any]) -> None:
    assert {stage.seconds for stage in seconds(store, EARLIER, **change).values()} == {None}


def test_the_artifact_with_the_fewest_different_options_counts(store: Store) -> None:
    seconds(store, {"train": {**EARLIER["train"], "seconds": 10.0, "seconds_in_steps": 0.0}}, "train.ema=0.5")
    assert seconds(store, {"train": EARLIER["train"]})["train"].seconds == 10 + 10 + 2 * 40
    other = seconds(store, {}, "train.ema=0.5")["train"].seconds
    assert other == 50 + 10 + 2 * 40


def test_of_equally_near_artifacts_the_newest_counts(store: Store) -> None:
    """An amount of work within a factor of four is as near as the same."""
    times = {"4000": ("2026-01-02", 45.0), "2000": ("2026-01-03", 15.0)}
    for tokens, (day, took) in times.items():
        record = {"seconds": took, "tokens": int(tokens)}
        seconds(store, {"tokenize": record}, digest=tokens, finished=f"{day}T00:00:00Z", attempt=2)
    assert seconds(store, {})["tokenize"].seconds == 5 + 2 * 10


@pytest.mark.parametrize(
    ("option", "starts", "share"),
    [
        ("evaluate.num_speculative_tokens=[1,2,3]", 2, 2),
        ("evaluate.concurrency=[1,4,16]", 1, 3),
        ("evaluate.concurrency=[1,4] evaluate.num_speculative_tokens=[1,2,3]", 2, 4),
    ],
)
def test_an_evaluation_is_scaled_by_its_settings(store: Store, option: str, starts: int, share: int) -> None:
    seconds(store, {"evaluate": {**EARLIER["evaluate"], "seconds": 50.0}})
    assert seconds(store, {}, *option.split())["evaluate"].seconds == starts * 10 + 5 + share * 2 * 45


def test_rows_of_earlier_runs_take_no_time(store: Store) -> None:
    seconds(store, EARLIER)
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", "pipeline=offline", "regenerate.seed=5"]), store)
    steps = {step.node.name: step for step in planner.plan()}
    whole = expected(planner, steps, WORK)["regenerate"]
    steps["regenerate"] = replace(steps["regenerate"], reuse=Reuse(sources=(), artifacts=(), rows=20, new=5))
    part = expected(planner, steps, WORK)["regenerate"]
    assert (whole.seconds, part.seconds, part.bytes) == (20 + 20 + 2 * 20, 20 + 20 + 2 * 20 / 4, whole.bytes)


def test_another_type_of_the_target_says_nothing(store: Store) -> None:
    seconds(store, EARLIER)
    assert seconds(store, {}, "target.dtype=bfloat16")["regenerate"].seconds is None
