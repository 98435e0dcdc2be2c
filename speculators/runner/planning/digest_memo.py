"""Remembers the sha256 of large local files, so that a checkpoint is read once instead of by every command.

The memo is a JSON file for each path in the user's cache directory: `plan` writes nothing into the store. A file counts
as unchanged while its device, inode, size, modification time and status change time are the same; the last cannot be
set back by `touch` or `cp -p`. A memo that is damaged or cannot be written is the same as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

MIN_BYTES = 2**20
"""Smallest file that is remembered; smaller ones are hashed faster than a memo is read."""
SETTLED_NS = 2 * 10**9
"""Age of the last change from which a file is remembered, in nanoseconds. A further change of a younger file could get
the same times, which on some file systems count whole seconds."""


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_size < MIN_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        memo, version = _memo(path), _version(status)
        if digest := _read(memo, version):
            return digest
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        unchanged = _version(os.fstat(stream.fileno())) == version
    if settled and unchanged:
        _write(memo, {"path": str(path.resolve()), "version": version, "sha256": digest})
    return digest


def _version(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _memo(path: Path) -> Path:
    """The memo of a file, by the digest of its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "speculators-run-digests" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"


def _read(memo: Path, version: list[int]) -> str:
    """The remembered digest; empty if there is none for this version of the file."""
    try:
        content = json.loads(memo.read_text())
        digest = str(content["sha256"]) if content["version"] == version else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else ""


def _write(memo: Path, content: dict[str, object]) -> None:
    """Write a memo atomically, since other commands may read and write it; not at all without write access."""
    with contextlib.suppress(OSError):
        memo.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, memo)
