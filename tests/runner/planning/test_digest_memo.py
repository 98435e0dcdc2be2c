"""A large file is hashed once; any change, and any damage of the memo, hashes it again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speculators.runner.planning import digest_memo
from speculators.runner.planning.digest_memo import MIN_BYTES, file_digest

CONTENT = b"1" * MIN_BYTES


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that is hashed; the memo's clock is an hour ahead, so that all files have settled."""
    names: list[str] = []
    real, now = hashlib.file_digest, time.time_ns

    def count(stream: Any, name: str) -> Any:
        names.append(stream.name)
        return real(stream, name)

    monkeypatch.setattr(digest_memo.hashlib, "file_digest", count)
    monkeypatch.setattr(digest_memo.time, "time_ns", lambda: now() + 3600 * 10**9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def test_a_large_file_is_hashed_once_and_a_small_one_leaves_no_memo(weights: Path, hashed: list[str]) -> None:
    assert file_digest(weights) == file_digest(weights) == hashlib.sha256(CONTENT).hexdigest()
    assert len(hashed) == 1
    memos = list((weights.parent / "cache").rglob("*.json"))
    (weights.parent / "small").write_bytes(b"1")
    file_digest(weights.parent / "small")
    assert list((weights.parent / "cache").rglob("*.json")) == memos
    assert len(memos) == 1


def _touch_back(path: Path) -> None:
    """Other content of the same size and modification time, in place."""
    before = path.stat()
    path.write_bytes(b"2" * MIN_BYTES)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    before = path.stat()
    sibling = path.with_name("sibling")
    sibling.write_bytes(b"3" * MIN_BYTES)
    os.utime(sibling, ns=(before.st_atime_ns, before.st_mtime_ns))
    sibling.replace(path)


@pytest.mark.parametrize("change", [_touch_back, _replace])
def test_a_changed_file_is_hashed_again(weights: Path, hashed: list[str], change: Callable[[Path], None]) -> None:
    file_digest(weights)
    time.sleep(0.02)  # the clock of a file system has a resolution of some milliseconds
    change(weights)
    assert file_digest(weights) == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"version": 1}', b"\xff"])
def test_a_damaged_memo_is_none(weights: Path, hashed: list[str], damage: bytes) -> None:
    file_digest(weights)
    (memo,) = (weights.parent / "cache").rglob("*.json")
    memo.write_bytes(damage)
    assert file_digest(weights) == hashlib.sha256(CONTENT).hexdigest()
    assert len(hashed) == 2


def test_a_file_that_was_just_written_is_not_remembered(
    weights: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_memo.time, "time_ns", lambda: weights.stat().st_mtime_ns + 10**9)
    file_digest(weights)
    assert not (weights.parent / "cache").exists()


def test_without_a_place_for_memos_every_command_hashes(
    weights: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))
    assert file_digest(weights) == file_digest(weights)
    assert len(hashed) == 2
