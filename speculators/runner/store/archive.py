"""Exports artifacts to one file and imports them: an uncompressed tar that is read sequentially.

    artifacts.json                        {"format": 1, "artifacts": [{stage, key, digest, bytes, files}, ...]}
    <stage>/<key>/artifact.json           then, of each of them, in this order
    <stage>/<key>/manifest.jsonl
    <stage>/<key>/data/<path>             in the manifest's order

The same artifacts always give the same bytes. An imported file is not trusted: each member must have exactly the name,
size and sha256 that the header and the manifest give, and an artifact becomes visible in the store only once it is
complete, by the store's own rename.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from speculators.errors import StoreError
from speculators.runner.planning import key as keys
from speculators.runner.planning.graph import KINDS
from speculators.runner.store.artifact import Artifact, read_artifact
from speculators.runner.store.artifacts import Store, no_space

FORMAT = 1
"""Version of the file format; increased when an older release could not read it."""
HEADER = "artifacts.json"
MAX_TEXT_BYTES = 2**30
"""Longest header, artifact.json or manifest that is read into memory."""
CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One artifact in the header of a file."""

    stage: str
    key: str
    digest: str
    bytes: int
    files: int


def export_artifacts(artifacts: Sequence[Artifact], path: Path) -> None:
    """Write artifacts to a file, which appears once it is complete.

    Raises:
        StoreError: the file exists or cannot be written, or an artifact does not match its manifest.
    """
    if path.exists():
        raise StoreError(f"{path} exists", "remove it, or name another file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            listed = [asdict(_listed(artifact)) for artifact in artifacts]
            _add_text(tar, HEADER, keys.canonical({"format": FORMAT, "artifacts": listed}).encode())
            for artifact in artifacts:
                _add(tar, artifact)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise StoreError(
                f"{path}: {error}", "another program has changed the store: run the same command again"
            ) from error
        if error.filename in (None, str(temporary)):
            raise _cannot_write(error, path) from error
        raise StoreError(f"{error.filename} cannot be read: {error.strerror}", "`speculators-run verify`") from error
    finally:
        temporary.unlink(missing_ok=True)


def contents(path: Path) -> list[Listed]:
    """Read the list of artifacts in a file.

    Raises:
        StoreError: it is not an exported file, or has a format that this release does not read.
    """
    with _opened(path) as tar:
        return _header(tar, path)


def import_artifacts(path: Path, store: Store, waiting: Callable[[str], None]) -> Iterator[tuple[Listed, bool]]:
    """Import the artifacts of a file one by one; yield each with whether it was missing in the store.

    Raises:
        StoreError: a member is not as listed, the file is truncated, or the store cannot be written. Artifacts that
            were imported before stay; of the failing one nothing does.
    """
    with _opened(path) as tar:
        for item in _header(tar, path):
            if store.find(item.stage, item.key) is not None:
                for _ in range(item.files + 2):
                    _next(tar, path)
                yield item, False
                continue
            with store.claim(item.stage, item.key, waiting, run="import"):
                staging = store.work(item.stage, item.key) / "import"
                try:
                    shutil.rmtree(staging, ignore_errors=True)
                    _extract(tar, path, item, staging)
                    store.adopt(item.stage, item.key, staging)
                except OSError as error:
                    raise _cannot_write(error, staging) from error
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
                    with suppress(OSError):
                        staging.parent.rmdir()  # only if no attempt at building it left files
            yield item, True
        if tar.next() is not None:
            raise _wrong(path, "it contains more than it lists")


def _listed(artifact: Artifact) -> Listed:
    files = (artifact.path / "manifest.jsonl").read_bytes().count(b"\n")
    return Listed(
        stage=artifact.stage, key=artifact.key, digest=artifact.digest, bytes=artifact.bytes, files=files
    )  # fmt: skip


def _add(tar: tarfile.TarFile, artifact: Artifact) -> None:
    inside = f"{artifact.stage}/{artifact.key}"
    for name in ("artifact.json", "manifest.jsonl"):
        _add_text(tar, f"{inside}/{name}", (artifact.path / name).read_bytes())
    for line in (artifact.path / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        with (artifact.data / entry["path"]).open("rb") as file:
            hashed = _Hashed(file)
            tar.addfile(_member(f"{inside}/data/{entry['path']}", entry["size"]), hashed)
        _forget(tar)
        if hashed.hexdigest() != entry["sha256"]:
            hint = "`speculators-run verify --quarantine` moves it to quarantine; the next run builds it again"
            raise StoreError(f"{inside}: {entry['path']} does not match its sha256", hint)


def _add_text(tar: tarfile.TarFile, name: str, text: bytes) -> None:
    tar.addfile(_member(name, len(text)), io.BytesIO(text))


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A member without time and owner, so that the same content gives the same file."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def _forget(tar: tarfile.TarFile) -> None:
    """Free the list of members that tarfile keeps, which is not needed."""
    members: list[tarfile.TarInfo] = vars(tar)["members"]
    members.clear()


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._sha256.update(block)
        return block

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Open the file; convert errors of tarfile into StoreErrors."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", "name a file of `export`") from error
    except tarfile.TarError as error:
        raise _wrong(path, str(error)) from error


def _header(tar: tarfile.TarFile, path: Path) -> list[Listed]:
    try:
        header = json.loads(_text(tar, path, HEADER))
        if header["format"] != FORMAT:
            hint = "import it with the release that exported it, or export it again with this one"
            raise StoreError(f"{path} has format {header['format']}, this release reads {FORMAT}", hint)
        listed = [Listed(**item) for item in header["artifacts"]]
    except (ValueError, LookupError, TypeError) as error:
        raise _wrong(path, f"its list of artifacts is damaged: {error}") from None
    for item in listed:
        if item.stage not in KINDS:
            raise _wrong(path, f"it contains an artifact of stage `{item.stage}`, which this release does not have")
        counts = all(isinstance(count, int) and count >= 0 for count in (item.bytes, item.files))
        if not counts or not re.fullmatch("[0-9a-f]{64}", str(item.key)):
            raise _wrong(path, "its list of artifacts is damaged")
    return listed


def _next(tar: tarfile.TarFile, path: Path) -> tarfile.TarInfo:
    member = tar.next()
    _forget(tar)
    if member is None:
        raise _wrong(path, "it is truncated")
    return member


def _expected(tar: tarfile.TarFile, path: Path, name: str, size: int | None = None) -> IO[bytes]:
    """The next member, which must be a regular file of this name, and of `size` if that is given."""
    member = _next(tar, path)
    if member.name != name:
        raise _wrong(path, f"it contains `{member.name}` where `{name}` should be")
    if not member.isreg() or (size is not None and member.size != size):
        raise _wrong(path, f"`{name}` is not a regular file of the listed size")
    content = tar.extractfile(tarfile.data_filter(member, "."))
    assert content is not None, "it is a regular file"
    return content


def _text(tar: tarfile.TarFile, path: Path, name: str) -> bytes:
    text = _expected(tar, path, name).read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise _wrong(path, f"`{name}` is too long")
    return text


def _extract(tar: tarfile.TarFile, path: Path, item: Listed, staging: Path) -> None:
    """Extract one artifact into a directory and check every file's sha256."""
    inside = f"{item.stage}/{item.key}"
    staging.mkdir(parents=True)
    for name in ("artifact.json", "manifest.jsonl"):
        (staging / name).write_bytes(_text(tar, path, f"{inside}/{name}"))
    entries = _checked_manifest(path, item, staging)
    for entry in entries:
        target = staging / "data" / entry["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        content = _expected(tar, path, f"{inside}/data/{entry['path']}", entry["size"])
        digest = hashlib.sha256()
        with target.open("xb") as file:
            while block := content.read(CHUNK_BYTES):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != entry["sha256"]:
            raise _wrong(path, f"`{inside}/data/{entry['path']}` does not match its sha256")


def _checked_manifest(path: Path, item: Listed, staging: Path) -> list[dict[str, Any]]:
    """The manifest's entries, after checks that artifact.json, manifest and header agree and all paths are safe."""
    where = f"{item.stage} {item.key[:8]}"
    text = (staging / "manifest.jsonl").read_bytes()
    try:
        artifact = read_artifact(staging)
        entries: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        names = [entry["path"] for entry in entries]
        total = sum(entry["size"] for entry in entries)
        fits = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in entries)
    except (ValueError, LookupError, TypeError) as error:
        raise _wrong(path, f"{where} is damaged: {error}") from None
    if not fits or names != sorted(set(names)) or not all(map(_stays_inside, names)) or not names:
        raise _wrong(path, f"the manifest of {where} has invalid entries")
    described = (artifact.stage, artifact.key, artifact.digest, artifact.bytes)
    if described != (item.stage, item.key, item.digest, item.bytes) or total != item.bytes or len(names) != item.files:
        raise _wrong(path, f"{where} does not match the list of artifacts")
    declared = artifact.digest if item.stage == "fetch" else hashlib.sha256(text).hexdigest()
    if hashlib.sha256(text).hexdigest() != artifact.manifest or declared != artifact.digest:
        raise _wrong(path, f"the manifest of {where} does not match its sha256")
    if keys.digest(artifact.preimage) != item.key:
        raise _wrong(path, f"the key of {where} is not the digest of its preimage")
    return entries


def _stays_inside(name: Any) -> bool:
    """Whether a manifest's path is normalized and stays below the directory that it is joined to."""
    if not isinstance(name, str) or "\0" in name:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts


def _wrong(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path} cannot be imported: {reason}", "export it again, and copy the complete file")


def _cannot_write(error: OSError, path: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(error, path)
    return StoreError(f"{path} cannot be written: {error.strerror}", "name a path that you may write to")
