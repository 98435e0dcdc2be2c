"""Making room takes what is old and unnamed, and nothing that somebody is at work on."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from speculators import cli
from speculators.config.schema import Config
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store
from speculators.runner.store.upkeep import entries, find_unused, keys_of_runs, remove, store_bytes
from tests.conftest import publish_all


@pytest.fixture
def made(store: Store, config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    """Artifacts of every stage by name, last used forty days ago."""
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    planner = Planner(config, store)
    digests = publish_all(store, planner)
    found = {name: planner.step(name, digests).artifact for name in planner.graph}
    artifacts = {name: artifact for name, artifact in found.items() if artifact}
    for artifact in artifacts.values():
        old(artifact.path / "artifact.json")
    return artifacts


def old(path: Path, days: float = 40) -> None:
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_what_was_used_lately_stays(store: Store, made: dict[str, Artifact]) -> None:
    store.touch(made["train"])
    gone = {item.key for item in find_unused(store, set(), days=30)}
    assert gone == {artifact.key for name, artifact in made.items() if name != "train"}
    assert find_unused(store, set(), days=50) == []


def test_what_a_kept_run_names_stays(store: Store, made: dict[str, Artifact], tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"steps": {"vocab": {"key": made["vocab"].key}}}))
    (tmp_path / "runs/cut").mkdir()
    (tmp_path / "runs/cut/run.json").write_text("{")
    kept = keys_of_runs(tmp_path / "runs")
    assert kept == {made["vocab"].key}
    assert made["vocab"].key not in {item.key for item in find_unused(store, kept, days=30)}


def test_what_somebody_is_making_is_not_removed(store: Store, made: dict[str, Artifact]) -> None:
    (item,) = [item for item in find_unused(store, set(), days=30) if item.stage == "vocab"]
    with store.claim("vocab", item.key, waiting=print):
        assert not remove(store, item)
        assert store.find("vocab", item.key) is not None
    assert remove(store, item)
    assert store.find("vocab", item.key) is None
    assert not list((store.root / "quarantine").iterdir())


def test_abandoned_work_and_what_was_set_aside_go_too(store: Store, made: dict[str, Artifact]) -> None:
    work = store.work("train", "f" * 64)
    (work / "scratch").mkdir(parents=True)
    (work / "scratch/step").write_text("12345")
    aside = store.quarantine("vocab", made["vocab"].key)
    assert aside is not None
    assert "quarantine" not in {item.what for item in find_unused(store, set(), days=30)}
    stage, key, _ = aside.name.rsplit("-", 2)
    aside.rename(aside.with_name(f"{stage}-{key}-{time.time_ns() - 40 * 86400 * 10**9}"))
    for path in (work / "scratch/step", work / "scratch", work):
        old(path)
    found = {item.what: item for item in find_unused(store, set(), days=30) if item.what != "artifact"}
    assert found["work"].bytes == 5
    assert found["quarantine"].stage == "vocab"
    assert all(remove(store, item) for item in found.values())
    assert not work.exists()


def test_gc_is_dry_until_it_is_told_to_delete(
    store: Store, made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli._guarded(["gc"]) == 0
    assert "nothing was deleted: add --delete" in capsys.readouterr().err
    assert store.find("train", made["train"].key) is not None
    assert cli._guarded(["gc", "--delete", "--json"]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == len(made)
    assert store.find("train", made["train"].key) is None
    assert cli._guarded(["gc", "days=soon"]) == 1


def test_gc_ls_and_verify_look_at_what_is_named_and_at_nothing_else(
    store: Store, made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    one = f"train:{made['train'].key[:6]}"
    for word in ("train", one):
        capsys.readouterr()
        assert cli._guarded(["ls", word, "--json"]) == 0
        assert [row["key"] for row in json.loads(capsys.readouterr().out)] == [made["train"].key]
        assert cli._guarded(["verify", word]) == 0
        assert len(capsys.readouterr().err.splitlines()) == 1
    for words in (["dasy=1", "--delete"], ["trian", "--delete"]):
        assert cli._guarded(["gc", *words]) == 1
        assert "hint: did you mean" in capsys.readouterr().err
    assert cli._guarded(["gc", one, "--delete"]) == 0
    assert {name for name, artifact in made.items() if store.find(artifact.stage, artifact.key) is None} == {"train"}


def test_what_a_worker_reads_stays(store: Store, made: dict[str, Artifact]) -> None:
    with store.claim("train", "f" * 64, waiting=print, uses=[made["vocab"].key]):
        assert made["vocab"].key not in {item.key for item in find_unused(store, set(), days=0)}
    assert made["vocab"].key in {item.key for item in find_unused(store, set(), days=0)}


def test_what_was_used_since_it_was_looked_at_stays(store: Store, made: dict[str, Artifact]) -> None:
    (item,) = [item for item in find_unused(store, set(), days=30) if item.stage == "vocab"]
    store.touch(made["vocab"])
    assert not remove(store, item)
    assert store.find("vocab", item.key) is not None


def test_a_run_that_goes_on_or_was_killed_keeps_what_it_has_decided(made: dict[str, Artifact], tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    line = {"event": "stage.decided", "node": "vocab", "state": "cached", "reason": "", "key": made["vocab"].key}
    (run / "events.jsonl").write_text(
        json.dumps({"event": "run.started"}) + "\n" + json.dumps(line) + '\n{"event": "st'
    )
    assert keys_of_runs(tmp_path / "runs") == {made["vocab"].key}


def test_gc_knows_several_runs_directories_and_refuses_one_that_is_not_there(
    made: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vocab", "train"):
        run = tmp_path / f"of-{name}/one"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"steps": {name: {"key": made[name].key}}}))
    assert cli._guarded(["gc", f"run.dir={tmp_path}/of-vocab,{tmp_path}/of-train", "--json"]) == 0
    gone = {item["key"] for item in json.loads(capsys.readouterr().out)}
    assert gone == {a.key for name, a in made.items() if name not in ("vocab", "train")}
    assert cli._guarded(["gc", f"run.dir={tmp_path}/of-vocab,{tmp_path}/typo", "--delete"]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_verify_tells_of_everything_that_is_no_whole_artifact(store: Store, made: dict[str, Artifact]) -> None:
    def victim(name: str) -> Path:
        return made[name].path

    (victim("vocab") / "artifact.json").write_text("{")
    (victim("tokenize") / "artifact.json").unlink()
    (victim("train") / "data/more").write_text("not in the manifest")
    shutil.copytree(victim("extract"), victim("extract").with_name("e" * 64))
    (victim("evaluate").parent / "notes.txt").write_text("mine")
    (store.root / "artifacts/README").write_text("mine too")
    (store.root / "artifacts/vocab/.nfs0001").write_text("the file system's")
    told = {entry.path.relative_to(store.root / "artifacts"): entry.damage for entry in entries(store)}
    broken = {path.parts[0]: trouble for path, trouble in told.items() if trouble}
    extract = made["extract"].stage
    assert broken["vocab"].startswith("artifact.json is damaged: ")
    assert broken["tokenize"] == "artifact.json cannot be read: No such file or directory"
    assert broken["train"] == "more is not in its manifest"
    assert broken[extract] == f"its artifact.json is that of {extract} {made['extract'].key[:8]}"
    assert broken["evaluate"] == "it is not an artifact"
    assert broken["README"] == "it is not the directory of a stage"
    assert len(told) == len(made) + 3
    assert [e.stage for e in entries(store, ["prompts"])] == ["prompts"]


def test_verify_moves_aside_what_it_finds_and_deletes_nothing(
    store: Store, made: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    (made["vocab"].path / "artifact.json").write_text("{")
    (store.root / "artifacts/README").write_text("mine")
    assert cli._guarded(["verify"]) == 1
    assert "verify --quarantine" in capsys.readouterr().err
    with store.claim("vocab", made["vocab"].key, waiting=print):
        assert cli._guarded(["verify", "--quarantine"]) == 1
        assert "they are in use" in capsys.readouterr().err
    assert cli._guarded(["verify", "--quarantine"]) == 0
    assert cli._guarded(["verify"]) == 0
    aside = {path.name.rpartition("-")[0]: path for path in (store.root / "quarantine").iterdir()}
    assert (aside[f"vocab-{made['vocab'].key}"] / "data/content").read_text() == "vocab"
    assert aside["README"].read_text() == "mine"
    found = [item for item in find_unused(store, set(), days=0) if item.what == "quarantine"]
    assert len(found) == 2
    assert all(remove(store, item) for item in found)


def test_what_a_store_holds_is_counted_without_its_layers(store: Store, made: dict[str, Artifact]) -> None:
    (store.root / "services/one").mkdir(parents=True)
    (store.root / "services/one/states").write_bytes(bytes(1000))
    artifacts = [path for path in (store.root / "artifacts").rglob("*") if path.is_file()]
    assert store_bytes(store) == sum(path.stat().st_size for path in artifacts) + 1000
    os.link(store.root / "services/one/states", store.root / "services/one/again")
    assert store_bytes(store) == sum(path.stat().st_size for path in artifacts) + 1000  # it takes no more room
    with store.claim("train", "f" * 64, waiting=print):
        pass  # somebody has written there: it is a store
    assert store_bytes(Store(store.root.parent / "empty", [store.root])) == 0


def test_a_clock_that_jumped_back_keeps_everything(
    store: Store, made: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    aside = store.quarantine("vocab", made["vocab"].key)
    assert aside is not None
    assert find_unused(store, set(), days=0.001) == []
    assert {item.days for item in find_unused(store, set(), days=0)} == {0.0}
