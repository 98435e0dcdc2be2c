"""One artifact on disk: reads its description and checks its files against its manifest.

artifact.json    key, preimage, digest, provenance and record
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
"""Version of the layout; increased when an older release could not read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One published result."""

    stage: str
    key: str
    path: Path
    """Directory with artifact.json, manifest.jsonl and data/."""
    digest: str
    """Its identity as an input of other stages: sha256 of its manifest, or the identity that its source declares."""
    preimage: dict[str, Any]
    """The JSON whose digest is `key`."""
    record: dict[str, Any]
    """Facts that the stage recorded: rows read, rows dropped, seconds."""
    provenance: dict[str, Any]
    """The run, time, machine and versions that produced it."""
    bytes: int
    """Size of data/."""
    manifest: str
    """sha256 of manifest.jsonl."""

    @property
    def data(self) -> Path:
        """Directory of the stage's output, read-only."""
        return self.path / "data"


def read_artifact(path: Path) -> Artifact:
    """Read the artifact.json of a directory; the files are not checked.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is damaged, or has another layout.
    """
    try:
        description = json.loads((path / "artifact.json").read_text())
        artifact = Artifact(
            stage=description["stage"],
            key=description["key"],
            path=path,
            digest=description["digest"],
            preimage=description["preimage"],
            record=description["record"],
            provenance=description["provenance"],
            bytes=description["bytes"],
            manifest=description["manifest"],
        )
        keys.flatten_preimage(artifact.preimage)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"field {error} is missing or wrong") from None
    if description.get("format") != FORMAT:
        raise ValueError(f"its layout is `{description.get('format')}`")
    return artifact


def is_complete(artifact: Artifact) -> bool:
    """Whether the manifest has the published digest and every file in it exists with its size.

    Raises:
        PermissionError: this user may not read it.
    """
    try:
        manifest = (artifact.path / "manifest.jsonl").read_bytes()
        if hashlib.sha256(manifest).hexdigest() != artifact.manifest:
            return False
        root = str(artifact.data)
        entries = json.loads(b"[" + b",".join(manifest.splitlines()) + b"]")
        # Strings: constructing a hundred thousand `Path`s takes longer than the system calls.
        return all(os.stat(f"{root}/{entry['path']}").st_size == entry["size"] for entry in entries)  # noqa: PTH116
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, TypeError):
        return False


def damage(artifact: Artifact) -> str:
    """Hash all files of an artifact again; describe the first mismatch, or return an empty string."""
    if keys.digest(artifact.preimage) != artifact.key:
        return "its key is not the digest of its preimage"
    try:
        if not is_complete(artifact):
            return "its manifest is damaged, or a file is missing or has another size"
        lines = (artifact.path / "manifest.jsonl").read_text().splitlines()
        digests = {entry["path"]: entry["sha256"] for entry in map(json.loads, lines)}
        for name, digest in digests.items():
            if sha256(artifact.data / name) != digest:
                return f"{name} does not match its sha256"
        extra = {path.relative_to(artifact.data).as_posix() for path in _files_below(artifact.data)} - digests.keys()
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"{min(extra)} is not in its manifest" if extra else ""


def manifest_of(data: Path, stage: str, known: Mapping[str, str]) -> list[dict[str, Any]]:
    """Path, size and sha256 of every file, sorted by path; files whose sha256 is `known`, by path, are not read."""
    paths = _files_below(data)
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise StageError(f"{stage}: {path} is not a regular file", "a stage may write regular files only")
    if not paths:
        raise StageError(f"{stage}: it wrote no file into {data}", "see its log")
    named = [(path.relative_to(data).as_posix(), path) for path in paths]
    return [{"path": n, "size": p.stat().st_size, "sha256": known.get(n) or sha256(p)} for n, p in named]


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_below(data: Path) -> list[Path]:
    """All paths below a directory that are not directories, sorted."""
    return sorted(p for p in data.rglob("*") if p.is_symlink() or not p.is_dir())
