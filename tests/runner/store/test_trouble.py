"""A full disk, a read-only store, locks that do not work, a clock that jumps: it is said, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from speculators import cli, worker
from speculators.config.schema import Config
from speculators.errors import StoreError
from speculators.job import Job
from speculators.runner.planning.plan import Planner, State
from speculators.runner.servers import vllm
from speculators.runner.store import artifacts as stores
from speculators.runner.store.artifacts import Store
from speculators.runner.store.upkeep import find_unused
from tests.conftest import publish_all, publish_files
from tests.requests import make_request

DEMO = "recipe=smollm2_eagle3"


class Disk:
    """A file system of its own, of a few MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path))

    def remount(self, option: str) -> None:
        self._mount("-o", f"remount,{option}", str(self.path))

    def fill(self) -> Path:
        """Write until nothing fits any more; the file that does it."""
        filler = self.path / ".filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return filler

    @staticmethod
    def _mount(*words: str) -> None:
        try:
            done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here")
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[int, Path]]]:
    """Run the worker in this process on a stage that is a function; gives its exit code and the work directory."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(root: Path, stage: Callable[[Job], None]) -> tuple[int, Path]:
        module = types.ModuleType("fill")
        module.main = stage  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "speculators.stages.fill", module)
        request = make_request("fill", root)
        request.write(tmp_path / "request.json")
        return worker.main([str(tmp_path / "request.json")]), Path(request.work)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def count_blocks(job: Job) -> None:
    """A stage of 2 MiB in blocks, each of which it writes once."""
    job.record["found"] = len(list(job.output.iterdir()))
    for number in range(job.record["found"], 128):
        beside = job.scratch / "block"
        beside.write_bytes(bytes([number]) * 16384)
        beside.rename(job.output / f"{number:03}")


def test_a_stage_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(
    disk: Disk, attempt: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = disk.path / "store"
    code, work = attempt(root, count_blocks)
    assert code == 1
    err = capsys.readouterr().err
    assert f"error: no space is left for {work}: 0.0 MiB are free" in err
    assert "hint: free space (`speculators-run gc` lists unused artifacts)" in err
    finished = len(list((work / "data").iterdir()))
    assert finished > 20
    disk.remount("size=4m")
    assert attempt(root, count_blocks)[0] == 0
    made = Store(root).find("fill", work.name)
    assert made is not None
    assert made.record["found"] == finished
    assert made.bytes == 2 << 20


def test_a_disk_that_is_full_when_the_work_is_done_loses_none_of_it(
    disk: Disk, attempt: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fill_up(job: Job) -> None:
        with (job.scratch / "runs").open("a") as runs:
            runs.write("x")
        if not (job.output / "result").exists():
            (job.output / "result").write_text("of hours")
            disk.fill()

    root = disk.path / "store"
    code, work = attempt(root, fill_up)
    assert code == 1
    assert "no space is left for" in capsys.readouterr().err
    assert Store(root).find("fill", work.name) is None
    (disk.path / ".filler").unlink()
    assert attempt(root, fill_up)[0] == 0
    made = Store(root).find("fill", work.name)
    assert made is not None
    assert (made.data / "result").read_text() == "of hours"


def test_plan_works_on_a_full_disk(
    disk: Disk, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(disk.path / "store")
    publish_all(store, Planner(config, store))
    disk.fill()
    monkeypatch.chdir(disk.path)
    assert cli._guarded(["plan", DEMO, f"run.store={store.root}", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"].values()
    assert {step["state"] for step in steps} == {"cached"}


def _rust() -> None:
    raise RuntimeError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')


def _chained() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/shards/7")
    except OSError as error:
        raise ValueError("a shard could not be written") from error


def _quota() -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/home/me/shard")


@pytest.mark.parametrize(
    ("full", "said"),
    [
        (_rust, "no space is left for"),
        (_chained, "no space is left for /shards/7"),
        (_quota, "your disk quota is exhausted"),
    ],
)
def test_a_full_disk_is_recognised_whichever_library_meets_it(
    full: Callable[[], None], said: str, tmp_path: Path, attempt: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, work = attempt(tmp_path / "store", lambda job: full())
    assert code == 1
    assert said in capsys.readouterr().err
    assert json.loads((work / "failure.json").read_text())["kind"] == "StoreError"


def test_another_error_of_a_stage_is_still_a_defect(
    tmp_path: Path, attempt: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(tmp_path / "store", lambda job: (job.output / "none").rmdir())[0] == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_heartbeat_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(worker, "write_json", full)
    with worker._Heartbeat(tmp_path, "now") as beating:
        assert beating is None  # an error in the thread would fail this test


def test_a_read_only_store_is_read_and_refused_before_anything_starts(
    disk: Disk, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(disk.path / "store")
    digests = publish_all(store, Planner(config, store))
    with store.claim("train", "f" * 64, waiting=print):
        left = (store.root / f"locks/train-{'f' * 64}.json").read_text()
    (store.root / f"locks/train-{'f' * 64}.json").write_text(left)  # as after a kill
    disk.remount("ro")
    monkeypatch.chdir(disk.path)
    monkeypatch.setenv("SPECULATORS_STORE", str(store.root))
    assert cli._guarded(["plan", DEMO]) == 0
    assert cli._guarded(["plan", DEMO, "train.lr=3e-4"]) == 0
    assert cli._guarded(["ls"]) == cli._guarded(["verify"]) == cli._guarded(["gc", "days=0"]) == 0
    runs = f"run.dir={tmp_path}/runs"
    assert cli._guarded([DEMO, runs]) == 0, "everything is there"
    capsys.readouterr()
    assert cli._guarded([DEMO, runs, "train.lr=3e-4"]) == 1
    assert f"stages have to run, and the store {store.root} is not writable" in capsys.readouterr().err
    assert cli._guarded(["gc", "days=0", "--delete"]) == 1
    assert "Read-only file system" in capsys.readouterr().err
    with pytest.raises(StoreError, match="cannot be written"), store.claim("train", "e" * 64, waiting=print):
        pass
    artifact = Planner(config, store).step("vocab", digests).artifact
    assert artifact is not None
    store.touch(artifact)


def test_what_is_not_in_a_read_only_store_is_made_in_the_one_above_it(
    disk: Disk, tmp_path: Path, attempt: Callable[..., tuple[int, Path]]
) -> None:
    below = Store(disk.path / "store")
    there = publish_files(below, {"a.txt": "alpha"})
    disk.remount("ro")
    store = Store(tmp_path / "own", [below.root])
    assert store.find("train", there.key) == there
    store.touch(there)
    code, work = attempt(store.root, lambda job: (job.output / "result").touch())
    assert code == 0
    assert store.find("fill", work.name) is not None


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A directory of the superuser's in which this process acts as somebody else while it is in `as_nobody`."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can act as somebody else")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("hidden", ["", "artifact.json", "manifest.jsonl", "data"])
def test_an_artifact_that_this_user_may_not_read_is_named_with_its_owner(nobody: Path, hidden: str) -> None:
    artifact = publish_files(Store(nobody / "store"), {"a.txt": "alpha"})
    (artifact.path / hidden).chmod(0)
    with as_nobody(), pytest.raises(StoreError, match=str(artifact.path)) as caught:
        Store(nobody / "store").find("train", artifact.key)
    assert "cannot be read: Permission denied" in caught.value.message
    assert "ask root for permission to read it" in caught.value.hint


def test_a_store_of_somebody_else_is_read_by_all_and_written_by_none(nobody: Path) -> None:
    store = Store(nobody / "store")
    artifact = publish_files(store, {"a.txt": "alpha"})
    with as_nobody():
        assert store.find("train", artifact.key) == artifact
        store.touch(artifact)
        with pytest.raises(StoreError, match=r"cannot be written: .*Permission denied") as caught:
            publish_files(store, {"a.txt": "beta"}, lr=0.2)
    assert "fix its permissions" in caught.value.hint


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_where_locks_do_not_work_nothing_is_made_and_plan_works(
    number: int, store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    attempt: Callable[..., tuple[int, Path]],
) -> None:  # fmt: skip
    publish_all(store, Planner(config, store))

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    ran: list[Job] = []
    assert attempt(store.root, ran.append)[0] == 1
    err = capsys.readouterr().err
    assert f"file locks do not work in the store {store.root}" in err
    assert "hint: put the store on a file system whose locks work" in err
    assert ran == []
    assert cli._guarded(["gc", "days=0", "--delete"]) == 1
    assert "file locks do not work" in capsys.readouterr().err
    assert cli._guarded(["plan", DEMO]) == 0
    assert {step.state for step in Planner(config, store).plan()} == {State.cached}


def test_a_clock_that_is_set_back_loses_nothing(
    store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, attempt: Callable[..., tuple[int, Path]]
) -> None:
    digests = publish_all(store, Planner(config, store))
    artifact = Planner(config, store).step("vocab", digests).artifact
    assert artifact is not None
    future = time.time() + 30 * 86400
    os.utime(artifact.path / "artifact.json", (future, future))
    assert {step.state for step in Planner(config, store).plan()} == {State.cached}
    assert artifact.key not in {item.key for item in find_unused(store, set(), days=0.0001)}
    store.touch(artifact)
    assert (artifact.path / "artifact.json").stat().st_mtime < future

    instants = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(instants)))
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    reported = []

    def report(job: Job) -> None:
        for done in (1, 2):
            job._reported = -1.0
            job.progress(done, 2, "blocks")
            reported.append(json.loads((job.work / "progress.json").read_text())["done"])
        (job.output / "result").write_text("whole")

    for _ in range(3):  # each time it is damaged, set aside in the same instant as before, and made again
        code, work = attempt(store.root, report)
        assert code == 0
        made = Store(store.root).find("fill", work.name)
        assert made is not None
        (made.data / "result").unlink()
    assert reported == [1, 2] * 3
    assert len(list((store.root / "quarantine").iterdir())) == 2


def test_where_no_disk_can_be_mounted_a_write_that_fails_is_met_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stores.write_json

    def full(path: Path, value: object) -> None:
        if path.name == "artifact.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(stores, "write_json", full)
        with pytest.raises(StoreError, match=r"no space is left for .*artifact\.json"):
            publish_files(store, {"a.txt": "alpha"})
    assert [path.read_text() for path in store.root.glob("work/train/*/data/a.txt")] == ["alpha"]
    assert publish_files(store, {}).bytes == 5
