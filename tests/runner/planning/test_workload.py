"""Tokens are expected from what the same data gave before, else from its first rows, else from the options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.config import compose
from speculators.config.choices import DataFormat
from speculators.config.schema import Config, Dataset
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.planning.workload import SAMPLED_CONVERSATIONS, Workload, workload
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import OF_CHECKPOINT

RECORDS = {
    "prompts": {"kept": 10},
    "regenerate": {"conversations": 10, "turns": 10, "answer_tokens": 800, "finish_reasons": {"length": 5, "stop": 5}},
    "tokenize": {"conversations": 10, "rows": 10, "tokens": 1300, "supervised tokens": 800},
}
"""Of ten conversations with a prompt of 50 tokens; half of the answers are cut at 100 tokens, the others have 60."""


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def recipe(data: Path, checkpoint: Path, *words: str, min_chars: int = 1) -> Config:
    options = ["regenerate.max_tokens=100", "prompts.num_conversations=10", f"target.source={checkpoint}"]
    config = compose.compose(["recipe=smollm2_eagle3", "pipeline=offline", *OF_CHECKPOINT, *options, *words])
    config.data = {"mine": Dataset(source=str(data), format=DataFormat.messages, min_chars=min_chars)}
    config.evaluate.datasets = dict(config.data)
    return config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Conversations with a prompt of 400 bytes and an answer of 200."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": i, "messages": [{"role": "user", "content": f"{i:04d}" * 100},
                               {"role": "assistant", "content": "a" * 200}]} for i in range(SAMPLED_CONVERSATIONS + 100)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def publish(store: Store, config: Config, records: dict[str, dict[str, Any]]) -> None:
    """Put the artifacts of a run with these records in the store."""
    planner, keys = Planner(config, store), dict[str, str]()
    digests = {n: s.digest for n, s in ((n, planner.step(n, {})) for n in ("target", "dataset.mine"))}
    for stage, record in records.items():
        step = planner.step(stage, digests)
        data = store.work(stage, step.key) / "data"
        data.mkdir(parents=True)
        (data / "content").write_text(step.key)
        inputs = {slot: keys[name] for slot, name in step.node.inputs.items() if name in keys}
        made = {"preimage": step.preimage, "record": record, "provenance": {"finished": "2026", "inputs": inputs}}
        digests[stage] = store.publish(stage, step.key, **made, digest=None).digest
        keys[stage] = step.key


def expected(store: Store, config: Config) -> Workload:
    planner = Planner(config, store)
    steps: dict[str, Step] = {step.node.name: step for step in planner.plan()}
    return workload(planner, steps["tokenize"], steps)


def test_more_conversations_are_as_long_as_the_earlier_ones(store: Store, data: Path, checkpoint: Path) -> None:
    publish(store, recipe(data, checkpoint), RECORDS)
    assert expected(store, recipe(data, checkpoint)).source == "artifact"
    more = expected(store, recipe(data, checkpoint, "prompts.num_conversations=40"))
    assert (more.source, more.conversations, more.tokens, more.answer_tokens) == ("earlier run", 40, 5200, 3200)
    assert more.max_tokens == 40 * 1024


@pytest.mark.parametrize(("limit", "answer"), [(200, (200 + 60) / 2), (40, 40.0)])
def test_answers_that_were_cut_are_as_long_as_the_new_limit(
    store: Store, data: Path, checkpoint: Path, limit: int, answer: float
) -> None:
    publish(store, recipe(data, checkpoint), RECORDS)
    changed = expected(store, recipe(data, checkpoint, f"regenerate.max_tokens={limit}"))
    assert (changed.source, changed.tokens) == ("earlier run", round(10 * (50 + answer)))


@pytest.mark.parametrize("change", [{"prompts.max_turns": 2}, {"data.mine.min_chars": 2}])
def test_other_prompts_are_sampled(store: Store, data: Path, checkpoint: Path, change: dict[str, int]) -> None:
    publish(store, recipe(data, checkpoint), RECORDS)
    words = [f"{name}={value}" for name, value in change.items() if name.startswith("prompts")]
    other = expected(store, recipe(data, checkpoint, *words, min_chars=change.get("data.mine.min_chars", 1)))
    assert other.source == "sample"
    assert other.tokens == pytest.approx(10 * (400 + 200) / 4, rel=0.3)
    assert other.answer_tokens == 10 * 200 / 4


def test_the_number_of_conversations_is_estimated_where_the_recipe_takes_all(
    store: Store, data: Path, checkpoint: Path
) -> None:
    config = recipe(data, checkpoint, "prompts.num_conversations=null")
    assert expected(store, config).conversations == pytest.approx(SAMPLED_CONVERSATIONS + 100, rel=0.2)


def test_a_file_that_cannot_be_read_leaves_the_bound(store: Store, data: Path, checkpoint: Path) -> None:
    data.write_text("[1, 2]\n")
    bound = expected(store, recipe(data, checkpoint))
    assert (bound.source, bound.tokens, bound.max_tokens) == ("options", 10 * 1024, 10 * 1024)


def test_a_bad_data_file_is_named_with_the_reason(store: Store, data: Path, checkpoint: Path) -> None:
    config = recipe(data, checkpoint, "prompts.num_conversations=null")
    good = expected(store, config)
    assert (good.source, good.unread) == ("sample", [])
    data.write_text('{"id": 1, "text": "no messages"}\n')
    bad = expected(store, config)
    assert bad.tokens == 0
    assert bad.unread == [
        f"no estimate by data.mine.source ({data}): data set `mine` has no usable row among 1: 1 no messages "
        "(columns: id, text)"
    ]


@pytest.mark.parametrize("rows", [SAMPLED_CONVERSATIONS // 2, SAMPLED_CONVERSATIONS + 100])
def test_rows_of_token_ids_are_as_long_as_they_are(store: Store, data: Path, checkpoint: Path, rows: int) -> None:
    lines = [{"id": i, "input_ids": list(range(i, i + 50)), "loss_mask": [0] * 20 + [1] * 30} for i in range(rows)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    unused = recipe(data, checkpoint)
    unused.data["mine"].format = None
    assert expected(store, unused).unread == [
        f"no estimate by data.mine.source ({data}): its rows are token ids, which only pipeline=off_policy uses"
    ]
    config = recipe(data, checkpoint, "pipeline=off_policy", "prompts.num_conversations=null")
    config.data["mine"].format = None
    tokens = expected(store, config)
    assert tokens.conversations == pytest.approx(rows, rel=0.2)
    assert (tokens.tokens, tokens.answer_tokens) == (50 * tokens.conversations, 30 * tokens.conversations)


def test_answers_of_the_data_are_not_cut_at_the_limit_of_the_target(store: Store, data: Path, checkpoint: Path) -> None:
    limit = "regenerate.max_tokens=10"
    assert expected(store, recipe(data, checkpoint, limit)).answer_tokens == 10 * 10
    assert expected(store, recipe(data, checkpoint, limit, "pipeline=off_policy")).answer_tokens == 10 * 200 / 4
