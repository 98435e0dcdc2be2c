"""The plan says what will run and why, and changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError, ServiceError, SourceError
from speculators.runner.planning import graph, key, lockfile, plan
from speculators.runner.planning.plan import Planner, State, describe
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import OF_CHECKPOINT, publish_all


def states(planner: Planner) -> dict[str, tuple[str, str]]:
    return {s.node.name: (s.state.name, s.reason) for s in planner.plan()}


def test_nothing_made_means_sources_run_and_the_rest_waits(config: Config, store: Store) -> None:
    found = states(Planner(config, store))
    assert found["prompts"] == ("run", "new")
    assert found["target"] == ("run", "new")
    assert found["regenerate"] == ("waits", "upstream: prompts")
    assert found["evaluate"] == ("waits", "upstream: train")


def test_everything_made_means_everything_cached(config: Config, store: Store) -> None:
    publish_all(store, Planner(config, store))
    assert {s.state for s in Planner(config, store).plan()} == {State.cached}


def test_changing_lr_marks_train_and_what_follows_and_names_the_field(config: Config, store: Store) -> None:
    publish_all(store, Planner(config, store))
    changed = compose.compose(["recipe=smollm2_eagle3", "train.lr=3e-4"])
    found = states(Planner(changed, store))
    assert found.pop("train") == ("run", f"changed: train.lr {config.train.lr} -> 0.0003")
    assert found.pop("evaluate") == ("waits", "upstream: train")
    assert {state for state, _ in found.values()} == {"cached"}


def test_a_forced_stage_runs_and_what_follows_waits_for_its_bytes(config: Config, store: Store) -> None:
    publish_all(store, Planner(config, store))
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", "force=vocab"]), store)
    found = states(planner)
    assert found["vocab"] == ("run", "forced")
    assert found["train"] == ("waits", "upstream: vocab")
    assert found["extract"][0] == "cached"
    planner.forced.discard("vocab")
    assert {state for state, _ in states(planner).values()} == {"cached"}


def test_from_forces_all_that_follows(config: Config, store: Store) -> None:
    publish_all(store, Planner(config, store))
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", "from=tokenize"]), store)
    assert planner.forced == {"tokenize", "vocab", "extract", "train", "evaluate"}
    assert states(planner)["regenerate"][0] == "cached"


@pytest.mark.parametrize("word", ["until=tokenize", "only=tokenize"])
def test_until_and_only_leave_what_a_stage_needs(store: Store, word: str) -> None:
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", word]), store)
    assert set(planner.graph) == {"prompts", "dataset.sharegpt", "target", "regenerate", "tokenize"}


@pytest.mark.parametrize("option", ["force", "from", "until", "only"])
def test_a_stage_that_the_recipe_has_not_cannot_be_chosen(store: Store, option: str) -> None:
    with pytest.raises(RecipeError, match=f"{option}=tokenise: the recipe has no stage"):
        Planner(compose.compose(["recipe=smollm2_eagle3", f"{option}=tokenise"]), store)


def test_sources_that_nobody_reads_are_not_fetched(config: Config, store: Store) -> None:
    planner = Planner(config, store)
    publish_all(store, planner)
    step = planner.step("dataset.sharegpt", {})
    assert store.quarantine("fetch", step.key) is not None
    found = states(Planner(config, store))
    assert found.pop("dataset.sharegpt") == ("unneeded", "no stage reads it")
    assert {state for state, _ in found.values()} == {"cached"}


def test_an_artifact_that_lost_a_file_is_a_miss(config: Config, store: Store) -> None:
    planner = Planner(config, store)
    digests = publish_all(store, planner)
    artifact = planner.step("vocab", digests).artifact
    assert artifact is not None
    (artifact.data / "content").unlink()
    assert states(Planner(config, store))["vocab"][0] == "run"


def test_the_same_bytes_upstream_stop_the_rerun(config: Config, store: Store) -> None:
    publish_all(store, Planner(config, store))
    changed = Planner(compose.compose(["recipe=smollm2_eagle3", "tokenize.min_supervised=2"]), store)
    digests = {s.node.name: s.digest for s in changed.plan() if s.digest}
    from tests.conftest import publish

    digests["tokenize"] = publish(store, changed, "tokenize", digests)
    assert {s.state for s in changed.plan()} == {State.cached}


def test_the_name_of_the_target_for_other_programs_is_in_no_key(store: Store, checkpoint: Path) -> None:
    elsewhere = checkpoint.with_name("elsewhere")
    shutil.copytree(checkpoint, elsewhere)
    planners = [
        Planner(compose.compose(["recipe=smollm2_eagle3", f"target.source={path}", *OF_CHECKPOINT]), store)
        for path in (checkpoint, elsewhere)
    ]
    assert [p.verifier() for p in planners] == [{"name": str(p), "revision": ""} for p in (checkpoint, elsewhere)]
    names = {name: name for name in planners[0].graph}
    steps = [{name: p.step(name, names) for name in p.graph if name != "target"} for p in planners]
    assert [s.key for s in steps[0].values()] == [s.key for s in steps[1].values()]
    assert not [s for s in steps[0].values() if "checkpoint" in key.canonical(s.preimage)]
    commit = "0" * 40
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", f"target.source=hub:org/model@{commit}"]), store)
    assert planner.verifier() == {"name": "org/model", "revision": commit}


def test_derived_values_reach_who_declared_them(config: Config, store: Store) -> None:
    planner = Planner(config, store)
    assert planner.derived == {
        "layer_ids": [0, 2, 15, 27],
        "capture_layer_ids": [0, 2, 15, 27, 30],
        "last_state": "everywhere",
    }
    names = {name: name for name in planner.graph}
    layers = {name: planner.derived[name] for name in ("layer_ids", "capture_layer_ids", "last_state")}
    assert planner.step("extract", names).derived == layers
    assert planner.step("tokenize", names).derived == {}


def test_an_unknown_target_makes_only_what_needs_its_depth_wait(config: Config, store: Store) -> None:
    config.target.num_hidden_layers = None
    planner = Planner(config, store)
    names = {name: name for name in planner.graph}
    assert planner.step("extract", names).reason == "upstream: target"
    assert planner.step("tokenize", names).state is State.run


def test_layer_ids_outside_the_target_are_refused(config: Config, store: Store) -> None:
    config.speculator.target_layer_ids = [2, 15, 31]
    with pytest.raises(
        RecipeError, match=r"speculator\.target_layer_ids=\[2, 15, 31\]: must be ascending ids from 0 to 30"
    ):
        Planner(config, store)


def test_a_vocabulary_larger_than_the_targets_is_refused(config: Config, store: Store) -> None:
    config.vocab.size = 50000
    with pytest.raises(RecipeError, match=r"vocab\.size=50000: must be at most 49152"):
        Planner(config, store)


def test_facts_that_contradict_the_checkpoint_are_refused(config: Config, store: Store, checkpoint: Path) -> None:
    config.target.source = str(checkpoint)
    with pytest.raises(ContractError, match=r"target\.num_hidden_layers is 30 in the recipe and 4 in the checkpoint"):
        Planner(config, store)


def test_a_missing_engine_is_said_before_anything_starts(
    config: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: None)
    with pytest.raises(ServiceError, match="vLLM is not installed in this environment"):
        Planner(config, store)


def test_planning_writes_nothing(config: Config, store: Store) -> None:
    Planner(config, store).plan()
    assert not store.root.exists()


def test_a_package_that_a_stage_declares_makes_it_anew_when_its_version_changes(
    config: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(graph.KINDS, "prompts", replace(graph.KINDS["prompts"], packages=("torch",)))
    monkeypatch.setattr(plan, "installed_version", lambda name: "3.0")
    digests = publish_all(store, Planner(config, store))
    monkeypatch.setattr(plan, "installed_version", lambda name: "3.1")
    step = Planner(config, store).step("prompts", digests)
    assert (step.state, step.reason) == (State.run, "changed: package torch 3.0 -> 3.1")


def test_reasons_name_inputs_options_and_versions() -> None:
    changes = [("input tokens", "a", "b"), ("train.lr", 1e-3, 5e-4), ("version", 1, 2)]
    assert describe(changes, "train") == "upstream: tokens; changed: train.lr 0.001 -> 0.0005; version 1 -> 2"


def test_a_miss_that_differs_in_many_options_names_some_and_counts_the_rest() -> None:
    changes = [(f"train.o{number}", 0, 1) for number in range(10)]
    assert describe(changes[:2], "train") == "changed: train.o0 0 -> 1, train.o1 0 -> 1"
    assert describe(changes, "train").endswith("train.o1 0 -> 1, and 8 more: explain train")


def test_parts_are_planned_while_the_whole_is_not_there_and_not_named_once_it_is(store: Store) -> None:
    config = compose.compose(["recipe=smollm2_eagle3", "pipeline=offline"])
    config.extract.workers = 2
    found = states(Planner(config, store))
    assert [name for name in found if name.startswith("extract")] == ["extract.1", "extract.2", "extract"]
    assert found["extract.1"] == ("waits", "upstream: tokenize")
    config.extract.workers = 1
    publish_all(store, Planner(config, store))
    config.extract.workers = 2
    assert {n for n in states(Planner(config, store)) if n.startswith("extract")} == {"extract"}


@pytest.fixture
def offline(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """A recipe whose target is on a hub that does not answer."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config.target.source = "google/gemma-4-31B-it"
    return config


def test_offline_everything_that_needs_the_target_waits_and_only_a_run_refuses(offline: Config, store: Store) -> None:
    planner = Planner(offline, store)
    found = states(planner)
    assert found["target"] == ("waits", "revision not resolved (offline)")
    assert found["prompts"] == ("run", "new")
    assert found["regenerate"][0] == found["evaluate"][0] == "waits"
    assert any(note.startswith("target.source: revision not resolved (offline)") for note in planner.notes)
    with pytest.raises(SourceError, match=r"target\.source: revision not resolved") as caught:
        planner.refuse_unresolved()
    assert len(planner.unresolved) == 1
    assert "target.source=hub:google/gemma-4-31B-it@" in caught.value.hint
    offline.until = "prompts"
    Planner(offline, store).refuse_unresolved()


def test_a_locked_revision_needs_no_hub(
    offline: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lock = {"revisions": {"model google/gemma-4-31B-it@main": "a" * 40}}
    (tmp_path / "smollm2_eagle3.lock.json").write_text(json.dumps(lock))
    planner = Planner(offline, store)
    planner.refuse_unresolved()
    assert planner.step("target", {}).preimage["config"]["source"]["revision"] == "a" * 40
    assert lockfile.lock_contents(planner)["revisions"] == lock["revisions"]


def test_a_chat_template_that_would_write_todays_date_gets_one_that_the_key_holds(
    checkpoint: Path, store: Store
) -> None:
    def planner(*words: str) -> Planner:
        target = f"target.source={checkpoint}"
        return Planner(compose.compose(["recipe=smollm2_eagle3", *OF_CHECKPOINT, target, *words]), store)

    call = "strftime_now('%d %b %Y')"
    guarded = f"{{% if date_string is not defined %}}{{% set date_string = {call} %}}{{% endif %}}{{{{ messages }}}}"
    (checkpoint / "chat_template.jinja").write_text(guarded)
    fixed = planner()
    assert fixed.config.target.chat_template_kwargs == {"date_string": "01 Jan 2026"}
    assert [note for note in fixed.notes if "date_string" in note]
    named = planner("target.chat_template_kwargs={date_string: 26 Jul 2024}")
    assert named.config.target.chat_template_kwargs == {"date_string": "26 Jul 2024"}
    assert not [note for note in named.notes if "date_string" in note]
    (checkpoint / "chat_template.jinja").write_text(f"{{{{ {call} }}}}{{{{ messages }}}}")
    assert [note for note in planner().notes if "chat template writes today's date" in note]


@pytest.mark.parametrize("stage", ["regenerate", "evaluate"])
def test_sampling_of_a_target_that_names_none_is_refused_before_it_is_served(
    checkpoint: Path, store: Store, stage: str
) -> None:
    words = ["recipe=smollm2_eagle3", *OF_CHECKPOINT, f"target.source={checkpoint}", f"{stage}.sampling=model"]
    with pytest.raises(RecipeError, match=rf"{stage}\.sampling=model: the target has no generation_config\.json"):
        Planner(compose.compose(words), store)
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Planner(compose.compose(words), store).facts is not None
