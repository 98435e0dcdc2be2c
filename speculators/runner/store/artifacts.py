"""The artifact store: directories named by key, written once, never changed.

    <store>/format                                what layout this is; an unknown one is refused
    <store>/artifacts/<stage>/<key[:2]>/<key>/    artifact.json  manifest.jsonl  data/
    <store>/work/<stage>/<key>/                   kept between attempts, so that a stage resumes
    <store>/locks/                                one kernel lock a key, held from the claim through the publishing
    <store>/aside/                                what failed its check: kept, never read

An artifact is whole or not there: everything is written and synced in the work directory and appears by one
rename. A directory that fails its check is a miss, never a crash. Reading creates nothing, so `plan` works on a
store that is read-only or does not exist yet.

A store may be shared. What the root's own mode grants to group and others is granted to everything that is made
below it (`chmod 2770 ROOT` once, for a team), whatever the umask of whoever makes it. Further stores may lie
underneath as layers: what is not in this one is looked up there, and nothing is ever written there.
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

from speculators.config.schema import RunOptions
from speculators.errors import StoreError
from speculators.job import write_json
from speculators.runner.planning import key as keys
from speculators.runner.store.artifact import FORMAT, Artifact, is_whole, manifest_of, read_artifact

CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by speculators-run; backup programs may skip it.\n"
"""See https://bford.info/cachedir/."""
KNOWN = {"format", "CACHEDIR.TAG", "artifacts", "work", "locks", "aside", "services"}
"""What may lie in a store's root; anything else means that the directory is somebody's, not a store."""


def store_root(named: str) -> Path:
    """Where artifacts are kept: what the recipe says as `run.store`, the environment's word, or the user's cache."""
    return Path(named or os.environ.get("SPECULATORS_STORE") or "~/.cache/speculators-run").expanduser().resolve()


def open_store(run: RunOptions) -> Store:
    """The store of a recipe over those that it only reads.

    Raises:
        StoreError: one of them cannot be read, or a layer is not there.
    """
    layers = run.stores_read or os.environ.get("SPECULATORS_STORE_READ", "").split(os.pathsep)
    return Store(store_root(run.store), [Path(layer).expanduser().resolve() for layer in layers if layer])


def existing(path: Path) -> Path:
    """A path, or the nearest one above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def free_bytes(root: Path) -> int:
    """Free bytes where the store is, or will be."""
    return shutil.disk_usage(existing(root)).free


def no_space(error: OSError, where: object) -> StoreError:
    """What to say of a disk, or a user's quota, that is full."""
    hint = "make room (`speculators-run gc` tells what nobody uses), then run the same command again: what is finished "
    if error.errno == errno.EDQUOT:
        return StoreError(f"your disk quota is used up: {where}", f"{hint}is kept")
    free = free_bytes(Path(str(where)).absolute()) / 2**20
    return StoreError(f"no space is left for {where}: {free:.1f} MiB are free there", f"{hint}is kept")


class Store:
    """The store at `root`, which need not exist, over the `layers` below it, which must.

    Raises:
        StoreError: the layout there is of another release, a store cannot be read, or a layer is none.
    """

    def __init__(self, root: Path, layers: Sequence[Path] = ()) -> None:
        self.root = root
        self.layers = tuple(Store(layer) for layer in layers if layer != root)
        for layer in self.layers:
            if not (layer.root / "format").exists():
                hint = "name a store that is there in run.stores_read or SPECULATORS_STORE_READ; is its disk mounted?"
                raise StoreError(f"{layer.root} is to be read and is not a store", hint)
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
        """The artifact of this key if it is whole, here or in a layer: every file of its manifest with its size.

        Raises:
            StoreError: it is there and this user may not read it, which making it again would not mend.
        """
        stores = (self, *self.layers)
        return next((found for store in stores if (found := store._find_here(stage, key)) is not None), None)

    def artifacts(self, stage: str) -> Iterator[Artifact]:
        """Every artifact of a stage whose artifact.json can be read, layers included; its files are not looked at."""
        seen = set()
        for store in (self, *self.layers):
            for artifact in store.own(stage):
                if artifact.key not in seen:
                    seen.add(artifact.key)
                    yield artifact

    def own(self, stage: str) -> Iterator[Artifact]:
        """The same without layers: what can be removed."""
        for path in sorted((self.root / "artifacts" / stage).glob("[!.]*/[!.]*")):
            with contextlib.suppress(OSError, ValueError):
                yield read_artifact(path)

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
    def claim(
        self, stage: str, key: str, waiting: Callable[[str], None], run: str = "", uses: Iterable[str] = ()
    ) -> Iterator[None]:
        """Hold the only right to make this artifact; while another process holds it, say who and wait.

        It is a lock of the kernel: it ends with the process that holds it, however that ends. Whoever gets it
        has to look again: the artifact may be there by now. `uses` are the keys of what is read meanwhile.
        """
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)
        with self._rights():
            with self._writing():
                self._prepare()
            holder = self.root / "locks" / f"{stage}-{key}.json"
            lock = self._acquire(stage, key, wait=False)
            if lock is None:
                waiting(_describe(holder))
                lock = self._acquire(stage, key, wait=True)
            assert lock is not None
            try:
                who = {"pid": os.getpid(), "host": os.uname().nodename, "run": run, "since": time.time()}
                with self._writing():
                    write_json(holder, {**who, "uses": sorted(uses)})
                    self._take_back(stage, key)
                yield
            finally:
                holder.unlink(missing_ok=True)
                os.close(lock)

    @contextlib.contextmanager
    def claimed_at_once(self, stage: str, key: str) -> Iterator[bool]:
        """The same right if nobody holds it, false if somebody does."""
        with self._rights():
            lock = self._acquire(stage, key, wait=False)
            try:
                yield lock is not None
            finally:
                if lock is not None:
                    os.close(lock)

    def in_use(self) -> set[str]:
        """Keys that somebody holds the claim of now, and those that they read meanwhile."""
        found: set[str] = set()
        for holder in (self.root / "locks").glob("[!.]*.json"):
            stage, _, key = holder.stem.rpartition("-")
            try:
                with self.claimed_at_once(stage, key) as ended:
                    pass  # if it is ours now, whoever wrote this was killed
            except StoreError:
                ended = False  # nothing can be locked here, so it cannot be known
            if not ended:
                found |= {key, *_said(holder).get("uses", ())}
        return found

    def touch(self, artifact: Artifact) -> None:
        """Note that an artifact was used now, where it is ours and the store can be written."""
        if artifact.path.is_relative_to(self.root):
            with contextlib.suppress(OSError):
                os.utime(artifact.path / "artifact.json")

    def set_aside(self, stage: str, key: str) -> Path | None:
        """Move a directory that `find` refuses out of the way; where to, or None if there is none. Needs the claim."""
        path = self._place(stage, key)
        return self.move_aside(path, f"{stage}-{key}") if path.exists() else None

    def move_aside(self, path: Path, name: str) -> Path:
        """Move what lies at a path of the store out of the way, under a name that tells what it was."""
        now = time.time_ns()
        with self._writing():
            while (aside := self.root / "aside" / f"{name}-{now}").exists():
                now += 1  # the clock was set back to that very moment
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
        written: Mapping[str, str] = MappingProxyType({}),
        anew: bool = False,
    ) -> Artifact:
        """Make the work directory's data/ the artifact of this key, then remove the work directory. Needs the claim.

        `digest` is the identity that a source declares; without one it is the digest of the content. `written` is the
        sha256 of files, by path below data/, that were hashed while they were written. If the artifact is there
        already (the lock did not hold everywhere), that one stays and this one is discarded; with `anew` it is the
        other way round, and the old one is set aside, unless both hold the same bytes.

        Raises:
            StageError: data/ is empty, or holds something else than files and directories.
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
            (work / "data").rename(staging / "data")
        return self.adopt(stage, key, staging, anew=anew)

    def adopt(self, stage: str, key: str, staging: Path, *, anew: bool = False) -> Artifact:
        """Make a directory of the work directory, with all that an artifact has, the artifact of this key.

        Then remove the work directory. If the artifact is there already, see `publish`. Needs the claim.

        Raises:
            StoreError: the store cannot be written, or what is there then is not whole.
        """
        place = self._place(stage, key)
        with self._writing():
            self._allow(staging / "data", 0o444)
            _sync_tree(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            if anew and not _same_files(place, staging):
                self.set_aside(stage, key)
            self._move_into_place(staging, place, stage, key)
            self.discard_work(stage, key)
        artifact = self._find_here(stage, key)
        if artifact is None:
            raise StoreError(f"{place} was just written and is not whole", "is another program writing in the store?")
        return artifact

    def discard_work(self, stage: str, key: str) -> None:
        """Remove what attempts left behind; the artifact is there. Needs the claim."""
        shutil.rmtree(self.work(stage, key), ignore_errors=True)

    def _find_here(self, stage: str, key: str) -> Artifact | None:
        path = self._place(stage, key)
        try:
            artifact = read_artifact(path)
            return artifact if artifact.key == key and is_whole(artifact) else None
        except PermissionError as error:
            hint = f"ask {_owner(path)} for the right to read it, or use a store of your own: run.store=DIRECTORY"
            raise StoreError(f"{error.filename} cannot be read: {error.strerror}", hint) from None
        except (OSError, ValueError):
            return None  # not there, or damaged

    def _move_into_place(self, staging: Path, place: Path, stage: str, key: str) -> None:
        try:
            staging.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self._find_here(stage, key) is None:
                self.set_aside(stage, key)
                staging.rename(place)
        _sync(place.parent)

    def _take_back(self, stage: str, key: str) -> None:
        """An attempt was killed between moving its data to be published and publishing it: the data is work again."""
        work = self.work(stage, key)
        sealed = work / "publish" / "data"
        if sealed.is_dir() and not (work / "data").exists():
            self._allow(sealed, 0o666)
            sealed.rename(work / "data")

    def _allow(self, root: Path, files: int) -> None:
        """Let the store's users do this with the files below a directory; tools leave some that only one may read."""
        mode = self._mode()
        for path in [*root.rglob("*"), root]:
            path.chmod(mode if path.is_dir() else mode & files)

    def _acquire(self, stage: str, key: str, *, wait: bool) -> int | None:
        """Take the lock of a key and return its descriptor; None if somebody holds it and we do not wait."""
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
            raise StoreError(f"nothing can be locked in the store {self.root}: {error.strerror}", hint) from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _mode(self) -> int:
        """What may be done in the store, by its root's mode; the owner may do everything."""
        return self.root.stat().st_mode & 0o077 | 0o700

    @contextlib.contextmanager
    def _rights(self) -> Iterator[None]:
        """Give what is made meanwhile the rights of the root. The umask is the process's: no other thread may care."""
        before = os.umask(~self._mode() & 0o777)
        try:
            yield
        finally:
            os.umask(before)

    def _place(self, stage: str, key: str) -> Path:
        return self.root / "artifacts" / stage / key[:2] / key

    def _prepare(self) -> None:
        """Make the root a store. A directory that holds something else is left alone."""
        if (self.root / "format").exists():
            return
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
            where = error.filename or self.root
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(error, where) from error
            hint = "mend its permissions, or use another directory: run.store=DIRECTORY"
            raise StoreError(f"the store cannot be written: {where}: {error.strerror}", hint) from error


def _same_files(place: Path, staging: Path) -> bool:
    """Whether a whole artifact lies there that has just the files of the one that is to come."""
    try:
        made = read_artifact(place)
        return is_whole(made) and made.manifest == read_artifact(staging).manifest
    except (OSError, ValueError):
        return False


def _owner(path: Path) -> str:
    """Whose a path is, or the nearest directory above it that can be seen."""
    while True:
        try:
            return path.owner()
        except KeyError:
            return f"user {path.stat().st_uid}"
        except OSError:
            path = path.parent


def _sync_tree(root: Path) -> None:
    """Put a directory and all that is below it on the disk."""
    for path in [*root.rglob("*"), root]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _said(holder: Path) -> dict[str, Any]:
    """What the holder of a claim wrote down; the lock itself is the kernel's, this is for messages and for `gc`."""
    try:
        plain = json.loads(holder.read_text())
        return plain if isinstance(plain, dict) else {}
    except (OSError, ValueError):
        return {}


def _describe(holder: Path) -> str:
    """Who holds a claim, in words."""
    plain = _said(holder)
    run = f" of run {plain['run']}" if plain.get("run") else ""
    return f"pid {plain['pid']} on {plain['host']}{run}" if {"pid", "host"} <= plain.keys() else "another process"
