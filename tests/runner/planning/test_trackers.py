"""A tracker that cannot start is refused before the first stage, not when training starts."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators.config import compose
from speculators.errors import RecipeError
from speculators.runner.planning import trackers
from speculators.runner.planning.plan import Planner
from speculators.runner.planning.trackers import check_trackers, wandb_can_start
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.conftest import publish_all

ALL = "train.trackers=[tensorboard,wandb,mlflow]"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, and every tracker installed."""
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def check(store: Store, *words: str) -> None:
    planner = Planner(compose.compose(["recipe=smollm2_eagle3", *words]), store)
    check_trackers(planner.config, planner.plan())


def test_wandb_without_a_key_is_refused_unless_nothing_trains(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="wandb has no API key") as caught:
        check(store, ALL)
    for fix in ("wandb login", "WANDB_MODE=offline", "train.trackers=[tensorboard,mlflow]"):
        assert fix in caught.value.hint
    check(store, "train.trackers=[tensorboard,mlflow]")
    check(store, ALL, "until=tokenize")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(store, ALL)
    monkeypatch.delenv("WANDB_MODE")
    publish_all(store, Planner(compose.compose(["recipe=smollm2_eagle3"]), store))
    check(store, ALL)


@pytest.mark.parametrize(
    ("environment", "files"),
    [
        ({"WANDB_API_KEY": "k"}, {}),
        ({"WANDB_MODE": "disabled"}, {}),
        ({}, {".netrc": "machine api.wandb.ai login user password k\n"}),
        ({"WANDB_BASE_URL": "https://w.local:8080"}, {".netrc": "machine w.local login user password k\n"}),
        ({"NETRC": "other"}, {"other": "machine api.wandb.ai login user password k\n"}),
        ({}, {"wandb/settings": "[default]\nmode = offline\n"}),
        ({}, {".config/wandb/settings": "[default]\napi_key = k\n"}),
    ],
)
def test_wandb_starts_with_a_key_from_wherever_it_reads_one(
    home: Path, environment: dict[str, str], files: dict[str, str]
) -> None:
    assert not wandb_can_start({name: value for name, value in environment.items() if name == "WANDB_BASE_URL"})
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    assert wandb_can_start(environment)


def test_a_damaged_file_is_no_key(home: Path) -> None:
    (home / ".netrc").write_text("machine\n")
    (home / "wandb").mkdir()
    (home / "wandb/settings").write_bytes(b"\xff[")
    assert not wandb_can_start({})


def test_an_mlflow_server_that_does_not_answer_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        check(store, "train.trackers=[mlflow]")
    with pytest.raises(RecipeError, match="does not answer") as caught:
        check(store, "train.trackers=[mlflow]")
    assert "train.trackers=[]" in caught.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    check(store, "train.trackers=[mlflow]")


def test_mlflow_without_a_server_needs_its_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Any = {"mlflow": SimpleNamespace()}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", known.get)
    with pytest.raises(RecipeError, match="needs the package sqlalchemy"):
        check(store, "train.trackers=[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    check(store, "train.trackers=[mlflow]")
