"""Making room takes what is old and unnamed, and nothing that somebody is at work on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from speculators import cli
from speculators.config import Config
from speculators.runner import vllm
from speculators.runner.artifact import Artifact
from speculators.runner.plan import Planner
from speculators.runner.store import Store
from speculators.runner.upkeep import named_by_runs, remove, rubbish
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
    gone = {item.key for item in rubbish(store, set(), days=30)}
    assert gone == {artifact.key for name, artifact in made.items() if name != "train"}
    assert rubbish(store, set(), days=50) == []


def test_what_a_kept_run_names_stays(store: Store, made: dict[str, Artifact], tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"steps": {"vocab": {"key": made["vocab"].key}}}))
    (tmp_path / "runs/cut").mkdir()
    (tmp_path / "runs/cut/run.json").write_text("{")
    kept = named_by_runs(tmp_path / "runs")
    assert kept == {made["vocab"].key}
    assert made["vocab"].key not in {item.key for item in rubbish(store, kept, days=30)}


def test_what_somebody_is_making_is_not_removed(store: Store, made: dict[str, Artifact]) -> None:
    (item,) = [item for item in rubbish(store, set(), days=30) if item.stage == "vocab"]
    with store.claim("vocab", item.key, waiting=print):
        assert not remove(store, item)
        assert store.find("vocab", item.key) is not None
    assert remove(store, item)
    assert store.find("vocab", item.key) is None
    assert not list((store.root / "aside").iterdir())


def test_abandoned_work_and_what_was_set_aside_go_too(store: Store, made: dict[str, Artifact]) -> None:
    work = store.work("train", "f" * 64)
    (work / "scratch").mkdir(parents=True)
    (work / "scratch/step").write_text("12345")
    aside = store.set_aside("vocab", made["vocab"].key)
    assert aside is not None
    assert "aside" not in {item.what for item in rubbish(store, set(), days=30)}
    stage, key, _ = aside.name.rsplit("-", 2)
    aside.rename(aside.with_name(f"{stage}-{key}-{time.time_ns() - 40 * 86400 * 10**9}"))
    for path in (work / "scratch/step", work / "scratch", work):
        old(path)
    found = {item.what: item for item in rubbish(store, set(), days=30) if item.what != "artifact"}
    assert found["work"].bytes == 5
    assert found["aside"].stage == "vocab"
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
