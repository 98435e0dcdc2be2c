"""Artifacts as one file: an uncompressed tar, so that it can be read from its beginning to its end and no further.

    artifacts.json                        {"format": 1, "artifacts": [{stage, key, digest, bytes, files}, ...]}
    <stage>/<key>/artifact.json           then, of each of them, in this order
    <stage>/<key>/manifest.jsonl
    <stage>/<key>/data/<path>             in the manifest's order

The same artifacts give the same bytes. A file that comes from elsewhere is not trusted: each member must have just the
name, the size and the sha256 that what came before says, whatever else it claims to be; nothing becomes visible in a
store before all of its artifact is there, and then by the store's own rename.
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
"""Raised when an older release could not read the file."""
HEADER = "artifacts.json"
LARGEST_TEXT = 2**30
"""Bytes of the longest header, artifact.json or manifest that is read into memory."""
CHUNK = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One artifact as the header names it."""

    stage: str
    key: str
    digest: str
    bytes: int
    files: int


def write(artifacts: Sequence[Artifact], path: Path) -> None:
    """Write artifacts to a file, which appears when it is whole.

    Raises:
        StoreError: the file exists, it cannot be written, or an artifact has other bytes than its manifest says.
    """
    if path.exists():
        raise StoreError(f"{path} exists", "remove it, or name another file")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            listed = [asdict(_listed(artifact)) for artifact in artifacts]
            _add_text(tar, HEADER, keys.canonical({"format": FORMAT, "artifacts": listed}).encode())
            for artifact in artifacts:
                _add(tar, artifact)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise StoreError(f"{path}: {error}", "another program changes the store; try again") from error
        if error.filename in (None, str(beside)):
            raise _cannot_write(error, path) from error
        raise StoreError(f"{error.filename} cannot be read: {error.strerror}", "`speculators-run verify`") from error
    finally:
        beside.unlink(missing_ok=True)


def contents(path: Path) -> list[Listed]:
    """What a file says that it holds.

    Raises:
        StoreError: it is no such file, or one that this release does not read.
    """
    with _opened(path) as tar:
        return _header(tar, path)


def read(path: Path, store: Store, waiting: Callable[[str], None]) -> Iterator[tuple[Listed, bool]]:
    """Put each artifact of a file into a store, in turn; with each, whether it is new there.

    Raises:
        StoreError: a member is not what it should be, the file is cut off, or the store cannot be written. The
            artifacts before it are whole and stay, of this one nothing does.
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
                        staging.parent.rmdir()  # only if no attempt at making it has left anything
            yield item, True
        if tar.next() is not None:
            raise _wrong(path, "it holds more than it lists")


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
            hint = "`speculators-run verify --aside` puts it aside; the next run makes it again"
            raise StoreError(f"{inside}: {entry['path']} has other bytes than were stored", hint)


def _add_text(tar: tarfile.TarFile, name: str, text: bytes) -> None:
    tar.addfile(_member(name, len(text)), io.BytesIO(text))


def _member(name: str, size: int) -> tarfile.TarInfo:
    """No time, no owner: the same content is the same file, whoever exports it when."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def _forget(tar: tarfile.TarFile) -> None:
    """Drop the members so far: tarfile keeps all of them for a listing that nobody asks for."""
    members: list[tarfile.TarInfo] = vars(tar)["members"]
    members.clear()


class _Hashed(io.RawIOBase):
    """A file that is hashed while somebody reads it."""

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
    """The file, with what tarfile says of a bad one in a user's words."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", "name a file of `export`") from error
    except tarfile.TarError as error:
        raise _wrong(path, str(error)) from error


def _header(tar: tarfile.TarFile, path: Path) -> list[Listed]:
    try:
        plain = json.loads(_text(tar, path, HEADER))
        if plain["format"] != FORMAT:
            hint = "import it with the release that exported it, or export it again with this one"
            raise StoreError(f"{path} has format {plain['format']}, this release reads {FORMAT}", hint)
        listed = [Listed(**item) for item in plain["artifacts"]]
    except (ValueError, LookupError, TypeError) as error:
        raise _wrong(path, f"its list of artifacts is damaged: {error}") from None
    for item in listed:
        if item.stage not in KINDS:
            raise _wrong(path, f"it holds an artifact of a stage `{item.stage}`, which this release does not have")
        counts = all(isinstance(count, int) and count >= 0 for count in (item.bytes, item.files))
        if not counts or not re.fullmatch("[0-9a-f]{64}", str(item.key)):
            raise _wrong(path, "its list of artifacts is damaged")
    return listed


def _next(tar: tarfile.TarFile, path: Path) -> tarfile.TarInfo:
    member = tar.next()
    _forget(tar)
    if member is None:
        raise _wrong(path, "it is cut off")
    return member


def _expected(tar: tarfile.TarFile, path: Path, name: str, size: int | None = None) -> IO[bytes]:
    """The next member, which has to be a plain file of this name, and of this size if that is known."""
    member = _next(tar, path)
    if member.name != name:
        raise _wrong(path, f"`{member.name}` stands where `{name}` should")
    if not member.isreg() or (size is not None and member.size != size):
        raise _wrong(path, f"`{name}` is not the file that it should be")
    content = tar.extractfile(tarfile.data_filter(member, "."))
    assert content is not None, "it is a plain file"
    return content


def _text(tar: tarfile.TarFile, path: Path, name: str) -> bytes:
    text = _expected(tar, path, name).read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise _wrong(path, f"`{name}` is too long")
    return text


def _extract(tar: tarfile.TarFile, path: Path, item: Listed, staging: Path) -> None:
    """Bring one artifact into a directory, checking each byte on its way."""
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
            while block := content.read(CHUNK):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != entry["sha256"]:
            raise _wrong(path, f"`{inside}/data/{entry['path']}` has other bytes than its manifest says")


def _checked_manifest(path: Path, item: Listed, staging: Path) -> list[dict[str, Any]]:
    """The manifest's entries, if artifact.json, manifest and header belong together and no name leads elsewhere."""
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
        raise _wrong(path, f"the manifest of {where} names files that no artifact has")
    told = (artifact.stage, artifact.key, artifact.digest, artifact.bytes)
    if told != (item.stage, item.key, item.digest, item.bytes) or total != item.bytes or len(names) != item.files:
        raise _wrong(path, f"{where} is not what the list of artifacts says")
    declared = artifact.digest if item.stage == "fetch" else hashlib.sha256(text).hexdigest()
    if hashlib.sha256(text).hexdigest() != artifact.manifest or declared != artifact.digest:
        raise _wrong(path, f"the manifest of {where} is not the one that was published")
    if keys.digest(artifact.preimage) != item.key:
        raise _wrong(path, f"the key of {where} is not that of what it says it was made from")
    return entries


def _stays_inside(name: Any) -> bool:
    """Whether a manifest's path is a plain one, below the directory that it is joined to."""
    if not isinstance(name, str) or "\0" in name:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts


def _wrong(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} cannot be imported: {what}", "export it again, and copy the whole of it")


def _cannot_write(error: OSError, path: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(error, path)
    return StoreError(f"{path} cannot be written: {error.strerror}", "name a place that you may write to")
