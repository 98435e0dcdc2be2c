"""The artifact store: directories named by key, each written once and never changed.

    <store>/format                                version of the layout; an unknown one is refused
    <store>/artifacts/<stage>/<key[:2]>/<key>/    artifact.json  manifest.jsonl  data/
    <store>/work/<stage>/<key>/                   kept between attempts, so that a stage resumes
    <store>/locks/                                one `flock` for each key, from the claim until it is published
    <store>/quarantine/                           directories that failed their check: kept, never read

An artifact is complete or absent: all files are written and synced in the work directory, and one rename makes them
visible. A directory that fails its check is a cache miss, never a crash. Reading creates no file, so `plan` works on
a store that is read-only or does not exist yet.

Several users can share a store: everything in it gets the permissions of the root for group and others (`chmod 2770
ROOT` once, for a team), whatever the umask. A store can have further stores as layers: an artifact that is not in this
one is looked up there, and nothing is ever written there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speculators.config.execution import RunOptions
from speculators.errors import StoreError
from speculators.job import write_json
from speculators.runner.planning import key as keys
from speculators.runner.store.artifact import FORMAT, Artifact, is_complete, manifest_of, read_artifact

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by speculators-run; backup programs may skip it.\n"
"""See https://bford.info/cachedir/."""
PREIMAGE = "preimage.json"
"""File in a work directory with the preimage of its key."""
KNOWN = {"format", "CACHEDIR.TAG", "artifacts", "work", "locks", "quarantine", "services"}
"""Names in a store's root; any other name means that the directory is not a store."""


def store_root(directory: str) -> Path:
    """The store's root: `run.store`, else SPECULATORS_STORE, else a directory in the user's cache."""
    return Path(directory or os.environ.get("SPECULATORS_STORE") or "~/.cache/speculators-run").expanduser().resolve()


def open_store(run: RunOptions) -> Store:
    """The store of a recipe, with the stores that it only reads as layers.

    Raises:
        StoreError: one of them cannot be read, or a layer does not exist.
    """
    layers = run.stores_read or os.environ.get("SPECULATORS_STORE_READ", "").split(os.pathsep)
    return Store(store_root(run.store), [Path(layer).expanduser().resolve() for layer in layers if layer])


def existing(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    while not path.exists():
        path = path.parent
    return path


def free_bytes(root: Path) -> int:
    """Free bytes on the disk of the store, which need not exist."""
    return shutil.disk_usage(existing(root)).free


def no_space(error: OSError, where: object) -> StoreError:
    """The error for a full disk, or an exhausted disk quota of the user."""
    hint = "free space (`speculators-run gc` lists unused artifacts), then run the same command again: finished work "
    if error.errno == errno.EDQUOT:
        return StoreError(f"your disk quota is exhausted: {where}", f"{hint}is kept")
    free = free_bytes(Path(str(where)).absolute()) / 2**20
    return StoreError(f"no space is left for {where}: {free:.1f} MiB are free", f"{hint}is kept")


class Store:
    """The store at `root`, which need not exist, and its read-only `layers`, which must.

    Raises:
        StoreError: a store has the layout of another release or cannot be read, or a layer is not a store.
    """

    def __init__(self, root: Path, layers: Sequence[Path] = ()) -> None:
        self.root = root
        self.layers = tuple(Store(layer) for layer in layers if layer != root)
        for layer in self.layers:
            if not (layer.root / "format").exists():
                hint = "fix run.stores_read or SPECULATORS_STORE_READ, or mount its disk"
                raise StoreError(f"the read-only store {layer.root} is not a store", hint)
        try:
            layout = (root / "format").read_text().strip()
        except FileNotFoundError:
            return
        except OSError as error:
            hint = "name another directory: run.store, or run.stores_read for one that is only read"
            raise StoreError(f"the store {root} cannot be read: {error.strerror}", hint) from None
        if layout != FORMAT:
            hint = "use the release that created it, or another directory: run.store=DIRECTORY"
            raise StoreError(f"the store {root} has layout `{layout}`, this release reads `{FORMAT}`", hint)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact of this key, here or in a layer; None if it is missing or a file does not have its size.

        Raises:
            StoreError: it exists but this user may not read it, so building it again would not help.
        """
        stores = (self, *self.layers)
        return next((artifact for store in stores if (artifact := store._find_here(stage, key)) is not None), None)

    def artifacts(self, stage: str) -> Iterator[Artifact]:
        """Every artifact of a stage with a readable artifact.json, layers included; files are not checked."""
        seen = set()
        for store in (self, *self.layers):
            for artifact in store.own_artifacts(stage):
                if artifact.key not in seen:
                    seen.add(artifact.key)
                    yield artifact

    def own_artifacts(self, stage: str) -> Iterator[Artifact]:
        """The same without layers: the artifacts that can be removed."""
        for path in sorted((self.root / "artifacts" / stage).glob("[!.]*/[!.]*")):
            with contextlib.suppress(OSError, ValueError):
                yield read_artifact(path)

    def nearest(self, stage: str, preimage: Mapping[str, Any]) -> Artifact | None:
        """The artifact whose preimage differs from this one in the fewest values; the newest of several."""

        def closeness(artifact: Artifact) -> tuple[int, str]:
            different = keys.preimage_differences(artifact.preimage, preimage)
            return -len(different), str(artifact.provenance.get("finished", ""))

        return max(self.artifacts(stage), key=closeness, default=None)

    def work(self, stage: str, key: str) -> Path:
        """The work directory of this key. Only the holder of the claim may write there."""
        return self.root / "work" / stage / key

    def attempts(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The work directories of unfinished attempts at a stage in this store, with the preimages of their keys."""
        for path in sorted((self.root / "work" / stage).glob("[!.]*")):
            with contextlib.suppress(OSError, ValueError):
                yield path, json.loads((path / PREIMAGE).read_text())

    @contextlib.contextmanager
    def claim(
        self, stage: str, key: str, waiting: Callable[[str], None], run: str = "", uses: Iterable[str] = ()
    ) -> Iterator[None]:
        """Hold the exclusive right to build an artifact; while another process holds it, call `waiting` and wait.

        The claim is a `flock`, which the kernel releases when the process ends. After it is acquired the artifact may
        exist, so `find` has to be called again. `uses` are the keys of artifacts that are read while it is held.
        """
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)
        with self._root_permissions():
            with self._writing():
                self._prepare()
            holder = self.root / "locks" / f"{stage}-{key}.json"
            lock = self._acquire(stage, key, wait=False)
            if lock is None:
                waiting(_describe(holder))
                lock = self._acquire(stage, key, wait=True)
            assert lock is not None
            try:
                owner = {"pid": os.getpid(), "host": os.uname().nodename, "run": run, "since": time.time()}
                with self._writing():
                    write_json(holder, {**owner, "uses": sorted(uses)})
                    self._restore_work(stage, key)
                yield
            finally:
                holder.unlink(missing_ok=True)
                os.close(lock)

    @contextlib.contextmanager
    def claimed_at_once(self, stage: str, key: str) -> Iterator[bool]:
        """Acquire the claim without waiting; yields False if another process holds it."""
        with self._root_permissions():
            lock = self._acquire(stage, key, wait=False)
            try:
                yield lock is not None
            finally:
                if lock is not None:
                    os.close(lock)

    def in_use(self) -> set[str]:
        """Keys that are claimed now, and those that the claiming processes read."""
        keys_in_use: set[str] = set()
        for holder in (self.root / "locks").glob("[!.]*.json"):
            stage, _, key = holder.stem.rpartition("-")
            try:
                with self.claimed_at_once(stage, key) as ended:
                    pass  # the claim is free, so the process that wrote this file was killed
            except StoreError:
                ended = False  # no lock can be acquired here, so the claim may be held
            if not ended:
                keys_in_use |= {key, *_read_holder(holder).get("uses", ())}
        return keys_in_use

    def touch(self, artifact: Artifact) -> None:
        """Record that an artifact was used now, if it is in this store and the store is writable."""
        if artifact.path.is_relative_to(self.root):
            with contextlib.suppress(OSError):
                os.utime(artifact.path / "artifact.json")

    def quarantine(self, stage: str, key: str) -> Path | None:
        """Move the directory of a key to quarantine; return its new path, None if there is none. Needs the claim."""
        path = self._path(stage, key)
        return self.quarantine_path(path, f"{stage}-{key}") if path.exists() else None

    def quarantine_path(self, path: Path, name: str) -> Path:
        """Move a path of the store to quarantine, under `name` with the time; return its new path."""
        now = time.time_ns()
        with self._writing():
            while (target := self.root / "quarantine" / f"{name}-{now}").exists():
                now += 1  # only if the clock was set back
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        return target

    def publish(
        self,
        stage: str,
        key: str,
        *,
        preimage: Mapping[str, Any],
        record: Mapping[str, Any],
        provenance: Mapping[str, Any],
        digest: str | None,
        written: Mapping[str, str] = MappingProxyType({}),
        replace: bool = False,
    ) -> Artifact:
        """Publish the work directory's data/ as the artifact of this key and remove the rest. Needs the claim.

        `digest` is the identity that a source declares; None: the digest of the content. `written` maps paths below
        data/ to the sha256 that was computed while they were written. If the artifact exists already (file systems
        without working locks), it stays and the new one is discarded; with `replace` the old one goes to quarantine,
        unless both have the same bytes.

        Raises:
            StageError: data/ is empty, or contains something other than regular files and directories.
            StoreError: the store cannot be written.
        """
        work = self.work(stage, key)
        with self._writing():
            entries = manifest_of(work / "data", stage, written)
            manifest = "".join(keys.canonical(entry) + "\n" for entry in entries)
            content = hashlib.sha256(manifest.encode()).hexdigest()
            staging = work / "publish"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            (staging / "manifest.jsonl").write_text(manifest)
            description = {
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
            write_json(staging / "artifact.json", description)
            (work / "data").rename(staging / "data")
        return self.adopt(stage, key, staging, replace=replace)

    def adopt(self, stage: str, key: str, staging: Path, *, replace: bool = False) -> Artifact:
        """Publish `staging`, a complete artifact in the work directory, and remove the rest. Needs the claim.

        If the artifact exists already, see `publish`.

        Raises:
            StoreError: the store cannot be written, or the published artifact is not complete.
        """
        path = self._path(stage, key)
        with self._writing():
            self._allow(staging / "data", 0o444)
            _sync_tree(staging)
            path.parent.mkdir(parents=True, exist_ok=True)
            if replace and not _same_files(path, staging):
                self.quarantine(stage, key)
            self._rename_into_store(staging, path, stage, key)
            self.discard_work(stage, key)
        artifact = self._find_here(stage, key)
        if artifact is None:
            raise StoreError(
                f"{path} was just written and is not complete", "end other programs that write into the store"
            )
        return artifact

    def discard_work(self, stage: str, key: str) -> None:
        """Remove the work directory of a published artifact. Needs the claim."""
        shutil.rmtree(self.work(stage, key), ignore_errors=True)

    def _find_here(self, stage: str, key: str) -> Artifact | None:
        path = self._path(stage, key)
        try:
            artifact = read_artifact(path)
            return artifact if artifact.key == key and is_complete(artifact) else None
        except PermissionError as error:
            hint = f"ask {_owner(path)} for permission to read it, or use another store: run.store=DIRECTORY"
            raise StoreError(f"{error.filename} cannot be read: {error.strerror}", hint) from None
        except (OSError, ValueError):
            return None  # missing or damaged

    def _rename_into_store(self, staging: Path, path: Path, stage: str, key: str) -> None:
        try:
            staging.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self._find_here(stage, key) is None:
                self.quarantine(stage, key)
                staging.rename(path)
        _sync(path.parent)

    def _restore_work(self, stage: str, key: str) -> None:
        """Move data/ back to the work directory if an attempt was killed while it published."""
        work = self.work(stage, key)
        sealed = work / "publish" / "data"
        if sealed.is_dir() and not (work / "data").exists():
            self._allow(sealed, 0o666)
            sealed.rename(work / "data")

    def _allow(self, root: Path, files: int) -> None:
        """Give everything below a directory the root's permissions; `files` masks those of files."""
        mode = self._mode()
        for path in [*root.rglob("*"), root]:
            path.chmod(mode if path.is_dir() else mode & files)

    def _acquire(self, stage: str, key: str, *, wait: bool) -> int | None:
        """Lock a key and return the lock's descriptor; None if another process holds it and `wait` is false."""
        path = self.root / "locks" / f"{stage}-{key}.lock"
        with self._writing():
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, self._mode() & 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            hint = "put the store on a file system whose locks work: run.store=DIRECTORY"
            raise StoreError(f"file locks do not work in the store {self.root}: {error.strerror}", hint) from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _mode(self) -> int:
        """The mode of the store's files: the root's for group and others, all permissions for the owner."""
        return self.root.stat().st_mode & 0o077 | 0o700

    @contextlib.contextmanager
    def _root_permissions(self) -> Iterator[None]:
        """Create files with the permissions of the root. Sets the process's umask, so only one thread may use it."""
        before = os.umask(~self._mode() & 0o777)
        try:
            yield
        finally:
            os.umask(before)

    def _path(self, stage: str, key: str) -> Path:
        return self.root / "artifacts" / stage / key[:2] / key

    def _prepare(self) -> None:
        """Make the root a store; refuse a directory that has other content."""
        if (self.root / "format").exists():
            return
        foreign = sorted(p.name for p in self.root.iterdir() if p.name not in KNOWN and not p.name.startswith("."))
        if foreign:
            hint = "name an empty directory, or one that does not exist: run.store=DIRECTORY"
            raise StoreError(f"{self.root} is not a store: it contains {', '.join(foreign[:3])}", hint)
        for name, text in (("CACHEDIR.TAG", CACHEDIR_TAG), ("format", FORMAT + "\n")):
            temporary = self.root / f".{name}.{os.getpid()}"
            temporary.write_text(text)
            os.replace(temporary, self.root / name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert an OSError of writing into a StoreError with a hint."""
        try:
            yield
        except OSError as error:
            where = error.filename or self.root
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(error, where) from error
            hint = "fix its permissions, or use another directory: run.store=DIRECTORY"
            raise StoreError(f"the store cannot be written: {where}: {error.strerror}", hint) from error


def _same_files(path: Path, staging: Path) -> bool:
    """Whether the artifact at `path` is complete and has the same files as the one in `staging`."""
    try:
        published = read_artifact(path)
        return is_complete(published) and published.manifest == read_artifact(staging).manifest
    except (OSError, ValueError):
        return False


def _owner(path: Path) -> str:
    """The owner of a path, or of its nearest visible parent."""
    while True:
        try:
            return path.owner()
        except KeyError:
            return f"user {path.stat().st_uid}"
        except OSError:
            path = path.parent


def _sync_tree(root: Path) -> None:
    """Flush a directory and everything below it to disk."""
    for path in [*root.rglob("*"), root]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_holder(path: Path) -> dict[str, Any]:
    """The record that the holder of a claim wrote for messages and for `gc`; {} if there is none."""
    try:
        record = json.loads(path.read_text())
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _describe(holder: Path) -> str:
    """The holder of a claim, for a message."""
    record = _read_holder(holder)
    run = f" of run {record['run']}" if record.get("run") else ""
    return f"pid {record['pid']} on {record['host']}{run}" if {"pid", "host"} <= record.keys() else "another process"
