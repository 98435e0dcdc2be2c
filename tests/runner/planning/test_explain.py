"""Explanations name what differs, all of it and nothing else, at every stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning.explain import LIBRARIES, Explanation, changes_outside_key, explain_stage
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import publish, publish_all

CHANGES = {
    "prompts": [
        "prompts.num_conversations=5",
        "prompts.seed=9",
        "prompts.eval_holdout_ratio=0.2",
        "data.sharegpt.max_chars=99",
    ],
    "regenerate": [
        "regenerate.max_tokens=7",
        "regenerate.temperature=0.5",
        "regenerate.top_p=0.9",
        "regenerate.seed=4",
        "max_seq_len=512",
        "target.dtype=bfloat16",
    ],
    "tokenize": ["tokenize.min_supervised=3", "max_seq_len=512"],
    "vocab": ["vocab.size=100"],
    "extract": ["extract.dtype=float32", "target.dtype=bfloat16", "speculator.target_layer_ids=[1,2,3]"],
    "train": [
        "train.lr=3e-4",
        "train.epochs=9",
        "train.batch_tokens=7",
        "train.optimizer=adamw",
        "train.muon_block=7",
        "train.weight_decay=0.5",
        "train.schedule=cosine",
        "train.warmup_ratio=0.5",
        "train.max_grad_norm=2",
        "train.precision=bfloat16",
        "train.validation_ratio=0.3",
        "train.seed=3",
        "speculator.num_layers=2",
        "speculator.ttt_steps=5",
        "speculator.norm_output=false",
    ],
    "evaluate": [
        "evaluate.num_prompts=3",
        "evaluate.max_tokens=9",
        "evaluate.concurrency=[4]",
        "prompts.eval_holdout_ratio=0.2",
    ],
}
"""Of every stage, single options that it reads."""


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def asked(store: Store, name: str, *words: str) -> Explanation:
    return explain_stage(Planner(compose.compose(["recipe=smollm2_eagle3", *words]), store), name)


def reachable(store: Store, config: Config, name: str, word: str) -> Explanation:
    """The stage's explanation when everything above it is made anew and gives the same bytes as before."""
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", word]), store)
    digests: dict[str, str] = {}
    for upstream in planner.graph:
        if upstream == name:
            return explain_stage(planner, name)
        step = planner.step(upstream, digests)
        digests[upstream] = step.artifact.digest if step.artifact else publish(store, planner, upstream, digests)
    raise AssertionError(name)


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in CHANGES.items() for word in words])
def test_one_changed_option_is_named_and_nothing_else(store: Store, config: Config, name: str, word: str) -> None:
    publish_all(store, Planner(config, store))
    found = reachable(store, config, name, word)
    assert found.state == "run"
    derived = {"speculator.target_layer_ids": ["capture_layer_ids", "layer_ids"]}
    option = word.partition("=")[0]
    assert [change.name for change in found.changes] == derived.get(option, [option])
    assert found.nearest["run"] == "earlier"


def test_a_hit_says_which_run_made_it_and_what_is_in_its_key(store: Store, config: Config) -> None:
    publish_all(store, Planner(config, store))
    found = asked(store, "train")
    assert (found.state, found.reason, found.changes) == ("cached", "made by earlier", [])
    assert found.nearest["finished"] == "2026"
    assert found.key_values["train.lr"] == config.train.lr
    assert "input tokens" in found.key_values


def test_a_changed_input_names_the_runs_that_made_both(store: Store, config: Config) -> None:
    planner = Planner(config, store)
    publish_all(store, planner)
    changed = Planner(compose.compose(["recipe=smollm2_eagle3", "vocab.size=99"]), store)
    digests = {step.node.name: step.digest for step in changed.plan() if step.digest}
    publish(store, changed, "vocab", digests, content="another vocabulary")
    found = explain_stage(changed, "train")
    assert [(change.name, change.runs) for change in found.changes] == [("input vocab", "earlier -> earlier")]


def test_a_stage_that_waits_names_the_one_it_waits_for(store: Store, config: Config) -> None:
    publish_all(store, Planner(config, store))
    found = asked(store, "evaluate", "vocab.size=99")
    assert found.state == "waits"
    assert found.because == f"vocab: changed: vocab.size {config.vocab.size} -> 99"


def test_without_an_earlier_artifact_there_is_nothing_to_compare(store: Store) -> None:
    found = asked(store, "prompts")
    assert (found.reason, found.changes, found.nearest) == ("new", [], {})
    assert "prompts.num_conversations" in found.key_values


def test_a_stage_that_the_recipe_has_not_is_refused(store: Store) -> None:
    with pytest.raises(RecipeError, match="no stage `trian`"):
        asked(store, "trian")


def test_explaining_writes_nothing(store: Store, tmp_path: Path) -> None:
    asked(store, "train")
    assert not store.root.exists()


def test_versions_that_are_in_no_key_are_told_apart_from_those_that_are(
    store: Store,
) -> None:
    planner = Planner(compose.compose(["recipe=smollm2_eagle3"]), store)
    assert planner.packages.keys() == {"transformers", "tokenizers"}
    publish_all(store, planner)
    made = dict.fromkeys(LIBRARIES, "0.1")
    steps = {step.node.name: step for step in planner.plan()}
    artifacts = {name: steps[name].artifact for name in ("tokenize", "train")}
    for artifact in artifacts.values():
        assert artifact is not None
        artifact.provenance["versions"] = made
    found = {
        name: {change.name for change in changes_outside_key(artifact)}
        for name, artifact in artifacts.items()
        if artifact
    }
    assert found["train"] == set(LIBRARIES), "its key holds none of them"
    assert found["tokenize"] == {"torch", "datasets"}


def test_an_artifact_of_another_recipe_explains_nothing(store: Store, config: Config) -> None:
    publish_all(store, Planner(config, store))
    other = ["data=[human_eval]", "evaluate.datasets=[human_eval]", "prompts.seed=7", "prompts.eval_holdout_ratio=0.3"]
    explained = asked(store, "prompts", *other)
    assert (explained.state, explained.reason, explained.changes, dict(explained.nearest)) == ("run", "new", [], {})
    assert explained.key_values["prompts.seed"] == 7
    near = asked(store, "prompts", "prompts.seed=7")
    assert near.reason.startswith("changed: prompts.seed 0 -> 7")
