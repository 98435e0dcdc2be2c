"""What a plan will need is known before it is needed, and refused when it is not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from speculators import cli
from speculators.config import compose
from speculators.config.choices import HiddenStatesDtype
from speculators.config.schema import Config
from speculators.errors import StoreError
from speculators.features.encoding import bytes_per_token
from speculators.runner.planning import derive
from speculators.runner.planning import estimate as estimating
from speculators.runner.planning.estimate import Needs, estimate, refuse_if_too_large
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import publish, publish_all

GIB = 2**30


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def needs(config: Config, store: Store) -> Needs:
    planner = Planner(config, store)
    return estimate(planner, {step.node.name: step for step in planner.plan()})


def before_extract(planner: Planner, store: Store) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in planner.graph:
        if name not in ("extract", "train", "evaluate"):
            digests[name] = publish(store, planner, name, digests)
    return digests


def test_what_an_earlier_attempt_has_written_is_not_needed_again(store: Store) -> None:
    config = demo("offline")
    planner = Planner(config, store)
    digests = before_extract(planner, store)
    before = needs(config, store)
    storing = planner.step("extract", digests)
    shard = store.work(storing.node.kind, storing.key) / "data/sub/shard"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(5000))
    assert before.feature_bytes - needs(config, store).feature_bytes == 5000
    shard.write_bytes(b"")
    with shard.open("r+b") as file:
        file.truncate(before.feature_bytes + 1)
    assert needs(config, store).feature_bytes == 0


def test_states_that_answers_were_kept_with_are_only_copied_from_another_file_system(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demo("fused")
    before_extract(Planner(config, store), store)
    assert needs(config, store).feature_bytes == 0
    monkeypatch.setattr(estimating, "_device", lambda path: int("artifacts" in path.parts))
    assert needs(config, store).feature_bytes > 0


def test_float8_halves_the_bytes_and_keeps_the_scales_in_them(config: Config) -> None:
    known = derive.Facts(num_hidden_layers=30, hidden_size=576, vocab_size=49152)
    for dtype in HiddenStatesDtype:
        config.extract.dtype = dtype
        stored = derive.feature_bytes_per_token(config, known)
        assert stored == sum(bytes_per_token(5, 576, dtype.name))


TOKENS = 384 * 1024
"""Of the demo, while it is not known how long its rows are."""
EACH = 5 * 576 * 2
FIT = GIB // EACH


def demo(pipeline: str, *words: str) -> Config:
    return compose.compose(["recipe=smollm2_eagle3", f"pipeline={pipeline}", "train.epochs=3", *words])


@pytest.mark.parametrize(
    ("pipeline", "words", "stored", "prefilled"),
    [
        ("offline", [], TOKENS, TOKENS),
        ("fused", [], TOKENS, 0),
        ("online", ["train.states_memory_gib=0"], 0, 3 * TOKENS),
        ("online", ["train.states_memory_gib=64"], 0, TOKENS),
        ("hybrid", ["train.states_memory_gib=0"], TOKENS, TOKENS),
        ("hybrid", ["train.states_disk_gib=1", "train.states_memory_gib=0"], FIT, 3 * TOKENS - 2 * FIT),
    ],
)
def test_what_is_stored_and_what_is_prefilled_follow_from_where_states_are_kept(
    store: Store, pipeline: str, words: list[str], stored: int, prefilled: int
) -> None:
    now = needs(demo(pipeline, *words), store)
    assert (now.feature_tokens, now.prefill_tokens, now.prefill_seconds) == (stored, prefilled, 0.0)
    assert now.feature_bytes == stored * EACH
    assert list(now.splits) == (["train"] if pipeline in ("online", "hybrid") else [])


def test_a_budget_that_the_disk_does_not_hold_is_refused_and_one_that_is_never_used_up_is_not(store: Store) -> None:
    bound = needs(demo("hybrid", "train.states_disk_gib=10000"), store)
    now = dataclasses.replace(bound, tokens_from="sample")
    refuse_if_too_large(dataclasses.replace(now, free_bytes=TOKENS * EACH))
    small = dataclasses.replace(now, free_bytes=TOKENS * EACH - 1)
    with pytest.raises(StoreError, match=r"need about 2\.1 GiB") as caught:
        refuse_if_too_large(small)
    assert "train.states_disk_gib" in caught.value.hint
    assert "run.ignore_disk_estimate=true" in caught.value.hint
    refuse_if_too_large(small, ignore_estimate=True)
    refuse_if_too_large(dataclasses.replace(bound, free_bytes=1))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("extract", "tokens_per_second"),
        ("train", "prefill_tokens_per_second"),
        ("regenerate", "tokens_per_second"),
    ],
)
def test_the_time_is_told_by_the_speed_of_what_ran_this_target_last(store: Store, stage: str, said: str) -> None:
    config = demo("offline")
    planner = Planner(config, store)
    digests = dict.fromkeys(planner.graph, "d") | {"target": planner.step("target", {}).digest}
    for finished, speed in (("2026-01", 50.0), ("2026-02", 100.0)):
        config.extract.shard_tokens = config.regenerate.max_tokens = int(speed)
        config.train.lr = speed
        step = planner.step(stage, digests)
        data = store.work(stage, step.key) / "data"
        data.mkdir(parents=True)
        (data / "content").write_text("something")
        made = {"preimage": step.preimage, "record": {said: speed}, "provenance": {"finished": finished}}
        store.publish(stage, step.key, **made, digest=None)
    found = needs(demo("offline"), store)
    assert (found.prefill_seconds, found.prefill_at_most) == (TOKENS / 100.0, stage == "regenerate")
    assert needs(demo("offline", "target.dtype=bfloat16"), store).prefill_seconds == 0.0, "it was another type"


def test_a_plan_says_how_a_server_and_the_training_beside_it_share_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cli._guarded(["plan", "recipe=smollm2_eagle3", "pipeline=hybrid", "hardware.train_cores=3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train and its server: 3 and 5 cores" in said
    assert "hidden states: at most 393,216 tokens, 2.1 GiB" in said
    assert "prefill for them: about 393,216 tokens; duration unknown until this target has run" in said


def test_without_a_quota_nothing_is_counted_and_with_one_the_states_must_fit_beside_what_is_there(
    config: Config, store: Store
) -> None:
    publish_all(store, Planner(config, store))
    assert needs(config, store).store_bytes == 0
    config.run.quota_gib = 1.0
    config.train.lr, config.extract.shard_tokens = 0.5, 1  # so that states are to be stored again
    now = needs(config, store)
    assert now.store_bytes > 0
    assert now.quota_bytes == GIB
    said = r"the store holds 0\.0 GiB and the hidden states need about 2\.1 GiB, run\.quota_gib allows 1\.0 GiB"
    with pytest.raises(StoreError, match=said) as caught:
        refuse_if_too_large(dataclasses.replace(now, free_bytes=100 * GIB, feature_bytes=int(2.1 * GIB)))
    assert "speculators-run gc` finds" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store_bytes": 3 * GIB, "quota_bytes": 2 * GIB}, "the store holds 3.0 GiB, run.quota_gib allows 2.0 GiB"),
        ({"feature_bytes": 11 * GIB}, "the hidden states need about 11.0 GiB, the store has 10.0 GiB free"),
        ({"writable": False}, "stages have to run, and the store /s is not writable"),
    ],
)
def test_each_lack_is_said(change: dict[str, int], said: str) -> None:
    enough = Needs(store="/s", free_bytes=10 * GIB)
    refuse_if_too_large(enough)
    with pytest.raises(StoreError) as caught:
        refuse_if_too_large(dataclasses.replace(enough, **change))
    assert caught.value.message == said


def test_a_store_over_its_quota_is_refused_before_any_worker_starts(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_all(store, Planner(config, store))
    monkeypatch.chdir(tmp_path)
    words = ["recipe=smollm2_eagle3", "run.quota_gib=1e-9"]
    assert cli._guarded(words) == 0, "nothing is to be made"
    assert cli._guarded([*words, "train.lr=3e-4"]) == 1
    assert "run.quota_gib allows 0.0 GiB" in capsys.readouterr().err
    assert not list(store.root.glob("work/*/*"))


def test_what_a_worker_has_extracted_is_not_counted_again_and_a_server_is_named_once(store: Store) -> None:
    config = compose.compose(["recipe=smollm2_eagle3", "pipeline=offline"])
    planner = Planner(config, store)
    digests: dict[str, str] = {}
    for name in ("dataset.sharegpt", "target", "prompts", "regenerate", "tokenize"):
        digests[name] = publish(store, planner, name, digests)
    whole = needs(config, store)
    config.extract.workers = 4
    shared = needs(config, store)
    assert (shared.feature_bytes, shared.prefill_tokens) == (whole.feature_bytes, whole.prefill_tokens)
    assert [s.stage for s in shared.servers if s.mode == "extract"] == ["extract, each of 4 workers"]
    planner = Planner(config, store)
    publish(store, planner, "extract.2", digests)
    left = needs(config, store)
    assert (left.feature_bytes * 4, left.prefill_tokens * 4) == (whole.feature_bytes * 3, whole.prefill_tokens * 3)
    for part in ("extract.1", "extract.3", "extract.4"):
        publish(store, planner, part, digests)
    assert needs(config, store).feature_bytes == 0
