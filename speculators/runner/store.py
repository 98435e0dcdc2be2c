"""The artifact store: directories named by key, written once, never changed.

    <store>/format                                what layout this is; an unknown one is refused
    <store>/artifacts/<stage>/<key[:2]>/<key>/    artifact.json  manifest.jsonl  data/
    <store>/work/<stage>/<key>/                   kept between attempts, so that a stage resumes
    <store>/locks/                                one kernel lock a key, held from the claim through the publishing
    <store>/aside/                                what failed its check: kept, never read

An artifact is whole or not there: everything is written and synced in the work directory and appears by one
rename. A directory that fails its check is a miss, never a crash. Reading creates nothing, so `plan` works on a
store that is read-only or does not exist yet.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.errors import StageError, StoreError
from speculators.job import write_json
from speculators.runner import key as keys

FORMAT = "1"
"""Raised when an older release could not read the layout."""
CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by speculators-run; backup programs may skip it.\n"
"""See https://bford.info/cachedir/."""
KNOWN = {"format", "CACHEDIR.TAG", "artifacts", "work", "locks", "aside", "services"}
"""What may lie in a store's root; anything else means that the directory is somebody's, not a store."""


def store_root(named: str) -> Path:
    """Where artifacts are kept: what the recipe says as `run.store`, the environment's word, or the user's cache."""
    return Path(named or os.environ.get("SPECULATORS_STORE") or "~/.cache/speculators-run").expanduser().resolve()


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

    @property
    def data(self) -> Path:
        """What the stage made, read-only."""
        return self.path / "data"


class Store:
    """The store at `root`, which need not exist.

    Raises:
        StoreError: the layout there is of another release, or a store cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            layout = (root / "format").read_text().strip()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"the store {root} cannot be read: {error.strerror}", "set run.store=DIRECTORY") from None
        if layout != FORMAT:
            hint = "use the release that made it, or another directory: run.store=DIRECTORY"
            raise StoreError(f"the store {root} has layout `{layout}`, this release reads `{FORMAT}`", hint)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact of this key if it is whole: every file of its manifest is there with its size."""
        path = self._place(stage, key)
        artifact = _read(path)
        return artifact if artifact is not None and artifact.key == key and _whole(path) else None

    def trouble(self, artifact: Artifact) -> str:
        """What is wrong with an artifact whose files are all read and hashed again; empty if nothing is."""
        if not _whole(artifact.path):
            return "its manifest is damaged, or a file is missing or has another size"
        for line in (artifact.path / "manifest.jsonl").read_text().splitlines():
            entry = json.loads(line)
            try:
                if _sha256(artifact.data / entry["path"]) != entry["sha256"]:
                    return f"{entry['path']} has other bytes"
            except OSError as error:
                return f"{entry['path']} cannot be read: {error.strerror}"
        return ""

    def artifacts(self, stage: str) -> Iterator[Artifact]:
        """Every artifact of a stage whose artifact.json can be read; its files are not looked at."""
        for path in sorted((self.root / "artifacts" / stage).glob("[!.]*/[!.]*")):
            artifact = _read(path)
            if artifact is not None:
                yield artifact

    def nearest(self, stage: str, preimage: Mapping[str, Any]) -> Artifact | None:
        """The artifact whose preimage differs least from this one, in leaves; of several, the newest."""

        def closeness(artifact: Artifact) -> tuple[int, str]:
            different = keys.differences(artifact.preimage, preimage)
            return -len(different), str(artifact.provenance.get("finished", ""))

        return max(self.artifacts(stage), key=closeness, default=None)

    def work(self, stage: str, key: str) -> Path:
        """Where the stage of this key works. Only the holder of the claim may write there."""
        return self.root / "work" / stage / key

    @contextlib.contextmanager
    def claim(self, stage: str, key: str, waiting: Callable[[str], None], run: str = "") -> Iterator[None]:
        """Hold the only right to make this artifact; while another process holds it, say who and wait.

        It is a lock of the kernel: it ends with the process that holds it, however that ends. Whoever gets it
        has to look again: the artifact may be there by now.
        """
        import filelock  # not at the top: it costs tens of ms, and `plan` never claims

        with self._writing():
            self._prepare()
        lock, holder = self._lock(stage, key), self.root / "locks" / f"{stage}-{key}.json"
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                waiting(_describe(holder))
                lock.acquire(poll_interval=0.2)
        except (OSError, NotImplementedError) as error:
            hint = "put the store on a file system whose locks work: run.store=DIRECTORY"
            raise StoreError(f"nothing can be locked in the store {self.root}: {error}", hint) from None
        try:
            with self._writing():
                write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "run": run, "since": time.time()})
                self._take_back(stage, key)
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    @contextlib.contextmanager
    def claimed_at_once(self, stage: str, key: str) -> Iterator[bool]:
        """The same right if nobody holds it, false if somebody does."""
        import filelock

        lock = self._lock(stage, key)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def touch(self, artifact: Artifact) -> None:
        """Note that an artifact was used now, where the store can be written."""
        with contextlib.suppress(OSError):
            os.utime(artifact.path / "artifact.json")

    def set_aside(self, stage: str, key: str) -> Path | None:
        """Move a directory that `find` refuses out of the way; where to, or None if there is none. Needs the claim."""
        path = self._place(stage, key)
        if not path.exists():
            return None
        aside = self.root / "aside" / f"{stage}-{key}-{time.time_ns()}"
        with self._writing():
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
        return aside

    def publish(
        self,
        stage: str,
        key: str,
        *,
        preimage: Mapping[str, Any],
        record: Mapping[str, Any],
        provenance: Mapping[str, Any],
        digest: str | None,
        anew: bool = False,
    ) -> Artifact:
        """Make the work directory's data/ the artifact of this key, then remove the work directory. Needs the claim.

        `digest` is the identity that a source declares; without one it is the digest of the content. If the
        artifact is there already (the lock did not hold everywhere), that one stays and this one is discarded;
        with `anew` it is the other way round, and the old one is set aside, unless both hold the same bytes.

        Raises:
            StageError: data/ is empty, or holds something else than files and directories.
            StoreError: the store cannot be written.
        """
        work, place = self.work(stage, key), self._place(stage, key)
        with self._writing():
            entries = _manifest(work / "data", stage)
            manifest = "".join(keys.canonical(entry) + "\n" for entry in entries)
            content = hashlib.sha256(manifest.encode()).hexdigest()
            staging = work / "publish"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            (staging / "manifest.jsonl").write_text(manifest)
            described = {
                "format": FORMAT,
                "stage": stage,
                "key": key,
                "digest": digest or content,
                "manifest": content,
                "bytes": sum(entry["size"] for entry in entries),
                "preimage": dict(preimage),
                "record": dict(record),
                "provenance": dict(provenance),
            }
            write_json(staging / "artifact.json", described)
            _sync_tree(work / "data")
            (work / "data").rename(staging / "data")
            for entry in entries:
                (staging / "data" / entry["path"]).chmod(0o444)
            _sync_tree(staging, deep=False)
            place.parent.mkdir(parents=True, exist_ok=True)
            if anew and not _holds(place, manifest):
                self.set_aside(stage, key)
            self._move_into_place(staging, place, stage, key)
            self.discard_work(stage, key)
        artifact = self.find(stage, key)
        if artifact is None:
            raise StoreError(f"{place} was just written and is not whole", "is another program writing in the store?")
        return artifact

    def discard_work(self, stage: str, key: str) -> None:
        """Remove what attempts left behind; the artifact is there. Needs the claim."""
        shutil.rmtree(self.work(stage, key), ignore_errors=True)

    def _move_into_place(self, staging: Path, place: Path, stage: str, key: str) -> None:
        try:
            staging.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.find(stage, key) is None:
                self.set_aside(stage, key)
                staging.rename(place)
        _sync(place.parent)

    def _take_back(self, stage: str, key: str) -> None:
        """An attempt was killed between moving its data to be published and publishing it: the data is work again."""
        work = self.work(stage, key)
        sealed = work / "publish" / "data"
        if sealed.is_dir() and not (work / "data").exists():
            for path in sealed.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            sealed.rename(work / "data")

    def _lock(self, stage: str, key: str) -> Any:
        import filelock

        locks = self.root / "locks"
        with self._writing():
            locks.mkdir(exist_ok=True)
        return filelock.FileLock(locks / f"{stage}-{key}.lock", fallback_to_soft=False)

    def _place(self, stage: str, key: str) -> Path:
        return self.root / "artifacts" / stage / key[:2] / key

    def _prepare(self) -> None:
        """Make the root a store. A directory that holds something else is left alone."""
        if (self.root / "format").exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        foreign = sorted(p.name for p in self.root.iterdir() if p.name not in KNOWN and not p.name.startswith("."))
        if foreign:
            hint = "give an empty directory, or one that does not exist: run.store=DIRECTORY"
            raise StoreError(f"{self.root} is not a store: it holds {', '.join(foreign[:3])}", hint)
        for name, text in (("CACHEDIR.TAG", CACHEDIR_TAG), ("format", FORMAT + "\n")):
            beside = self.root / f".{name}.{os.getpid()}"
            beside.write_text(text)
            os.replace(beside, self.root / name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in the user's words why the store cannot be written."""
        try:
            yield
        except OSError as error:
            hint = "mend its permissions, or use another directory: run.store=DIRECTORY"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room, then run the same command again: what is finished is kept"
            where = error.filename or self.root
            raise StoreError(f"the store cannot be written: {where}: {error.strerror}", hint) from error


def _read(path: Path) -> Artifact | None:
    """What artifact.json says; None if it cannot be read or is not one of ours."""
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
        )
        keys.differences(artifact.preimage, artifact.preimage)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return artifact if plain.get("format") == FORMAT else None


def _whole(path: Path) -> bool:
    """The manifest is the one that was published, and every file of it is there with its size."""
    try:
        manifest = (path / "manifest.jsonl").read_bytes()
        if hashlib.sha256(manifest).hexdigest() != json.loads((path / "artifact.json").read_text())["manifest"]:
            return False
        root = str(path / "data")
        entries = json.loads(b"[" + b",".join(manifest.splitlines()) + b"]")
        # Strings, because a hundred thousand `Path`s take longer than asking the kernel.
        return all(os.stat(f"{root}/{entry['path']}").st_size == entry["size"] for entry in entries)  # noqa: PTH116
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _holds(place: Path, manifest: str) -> bool:
    """Whether the artifact there has just these files."""
    return _whole(place) and (place / "manifest.jsonl").read_text() == manifest


def _manifest(data: Path, stage: str) -> list[dict[str, Any]]:
    """Path, size and sha256 of every file, sorted by path."""
    found = sorted(p for p in data.rglob("*") if p.is_symlink() or not p.is_dir())
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise StageError(f"{stage}: {path} is not a file", "an artifact holds plain files and nothing else")
    if not found:
        raise StageError(f"{stage}: it left nothing in {data}", "a stage has to make something; see its log")
    return [{"path": p.relative_to(data).as_posix(), "size": p.stat().st_size, "sha256": _sha256(p)} for p in found]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(root: Path, *, deep: bool = True) -> None:
    """Put a directory and what is in it on the disk; of directories below it only their names unless `deep`."""
    for path in [*(root.rglob("*") if deep else root.iterdir()), root]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(holder: Path) -> str:
    """Who holds a claim, in words; the lock itself is the kernel's, this is only for messages."""
    try:
        plain = json.loads(holder.read_text())
        run = f" of run {plain['run']}" if plain["run"] else ""
        return f"pid {plain['pid']} on {plain['host']}{run}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
