"""One artifact on the disk: what its directory says of itself, and whether that is so.

artifact.json    who made it, from what, with which key and digest
manifest.jsonl   path, size and sha256 of every file, sorted by path
data/            the files
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.errors import StageError
from speculators.runner.planning import key as keys

FORMAT = "1"
"""Raised when an older release could not read the layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One published result."""

    stage: str
    key: str
    path: Path
    """Its directory, with artifact.json, manifest.jsonl and data/."""
    digest: str
    """What it is as an input of others: sha256 of its manifest, or the identity that its source declares."""
    preimage: dict[str, Any]
    """What `key` is the digest of."""
    record: dict[str, Any]
    """Facts that the stage wrote down: rows read, rows dropped, seconds."""
    provenance: dict[str, Any]
    """Who made it, when, where, with what."""
    bytes: int
    """Size of data/."""
    manifest: str
    """sha256 of manifest.jsonl."""

    @property
    def data(self) -> Path:
        """What the stage made, read-only."""
        return self.path / "data"


def read_artifact(path: Path) -> Artifact:
    """What a directory's artifact.json says.

    Raises:
        OSError: it cannot be read, or is not there.
        ValueError: it is damaged, or of another layout.
    """
    try:
        plain = json.loads((path / "artifact.json").read_text())
        artifact = Artifact(
            stage=plain["stage"],
            key=plain["key"],
            path=path,
            digest=plain["digest"],
            preimage=plain["preimage"],
            record=plain["record"],
            provenance=plain["provenance"],
            bytes=plain["bytes"],
            manifest=plain["manifest"],
        )
        keys.leaves(artifact.preimage)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks or misspells {error}") from None
    if plain.get("format") != FORMAT:
        raise ValueError(f"it has layout `{plain.get('format')}`")
    return artifact


def is_whole(artifact: Artifact) -> bool:
    """The manifest is the one that was published, and every file of it is there with its size.

    Raises:
        PermissionError: this user may not look.
    """
    try:
        manifest = (artifact.path / "manifest.jsonl").read_bytes()
        if hashlib.sha256(manifest).hexdigest() != artifact.manifest:
            return False
        root = str(artifact.data)
        entries = json.loads(b"[" + b",".join(manifest.splitlines()) + b"]")
        # Strings, because a hundred thousand `Path`s take longer than asking the kernel.
        return all(os.stat(f"{root}/{entry['path']}").st_size == entry["size"] for entry in entries)  # noqa: PTH116
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, TypeError):
        return False


def trouble(artifact: Artifact) -> str:
    """What is wrong with an artifact whose files are all read and hashed again; empty if nothing is."""
    if keys.digest(artifact.preimage) != artifact.key:
        return "its key is not that of what it says it was made from"
    try:
        if not is_whole(artifact):
            return "its manifest is damaged, or a file is missing or has another size"
        lines = (artifact.path / "manifest.jsonl").read_text().splitlines()
        wanted = {entry["path"]: entry["sha256"] for entry in map(json.loads, lines)}
        for name, digest in wanted.items():
            if sha256(artifact.data / name) != digest:
                return f"{name} has other bytes"
        more = {path.relative_to(artifact.data).as_posix() for path in _leaves(artifact.data)} - wanted.keys()
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"{min(more)} is not in its manifest" if more else ""


def manifest_of(data: Path, stage: str, known: Mapping[str, str]) -> list[dict[str, Any]]:
    """Path, size and sha256 of every file, sorted by path; those whose sha256 is `known` by path are not read."""
    found = _leaves(data)
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise StageError(f"{stage}: {path} is not a file", "an artifact holds plain files and nothing else")
    if not found:
        raise StageError(f"{stage}: it left nothing in {data}", "a stage has to make something; see its log")
    named = [(path.relative_to(data).as_posix(), path) for path in found]
    return [{"path": n, "size": p.stat().st_size, "sha256": known.get(n) or sha256(p)} for n, p in named]


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(data: Path) -> list[Path]:
    """Everything below a directory that is not a directory itself, sorted."""
    return sorted(p for p in data.rglob("*") if p.is_symlink() or not p.is_dir())
