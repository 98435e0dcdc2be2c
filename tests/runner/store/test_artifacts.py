"""The store: whole or not there, made once, never changed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from speculators import cli
from speculators.config.execution import RunOptions
from speculators.config.schema import Config
from speculators.errors import StageError, StoreError
from speculators.runner.planning import key as keys
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store import artifact as module
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store, open_store
from tests.conftest import publish_all

KEY = "ab" + "0" * 62
OTHER = "cd" + "0" * 62


def no_waiting(holder: str) -> None:
    raise AssertionError(f"nobody else holds this claim, but {holder} does")


def image(**config: object) -> dict[str, object]:
    return keys.preimage("train", 1, config=config, inputs={}, packages={}, service={})


def put(
    store: Store,
    key: str = KEY,
    files: dict[str, str] | None = None,
    digest: str | None = None,
    replace: bool = False,
    written: dict[str, str] | None = None,
    **config: object,
) -> Artifact:
    with store.claim("train", key, no_waiting):
        for name, text in ({"a.txt": "alpha", "sub/b.txt": "beta"} if files is None else files).items():
            path = store.work("train", key) / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        finished = {"finished": str(time.time_ns())}
        facts = {"preimage": image(**config), "record": {"rows": 2}, "provenance": finished}
        return store.publish("train", key, **facts, digest=digest, written=written or {}, replace=replace)


def test_what_was_published_is_found_with_all_that_was_said_about_it(tmp_path: Path) -> None:
    made = put(Store(tmp_path / "store"), lr=0.1)
    found = Store(tmp_path / "store").find("train", KEY)
    assert found == made
    assert found is not None
    assert (found.data / "sub/b.txt").read_text() == "beta"
    assert (found.bytes, found.record, found.preimage) == (9, {"rows": 2}, image(lr=0.1))
    assert not Store(tmp_path / "store").work("train", KEY).exists()


def test_the_digest_is_that_of_the_content_unless_an_identity_is_declared(tmp_path: Path) -> None:
    same = [put(Store(tmp_path / name), key).digest for name, key in (("one", KEY), ("two", OTHER))]
    assert same[0] == same[1]
    assert put(Store(tmp_path / "three"), files={"a.txt": "other"}).digest != same[0]
    assert put(Store(tmp_path / "four"), digest="hub:abc").digest == "hub:abc"


def test_a_file_that_was_hashed_while_it_was_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = put(Store(tmp_path / "one"))
    read: list[str] = []
    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or real(path))
    made = put(Store(tmp_path / "two"), written={"sub/b.txt": hashlib.sha256(b"beta").hexdigest()})
    assert read == ["a.txt"]
    assert made.digest == whole.digest
    wrong = put(Store(tmp_path / "three"), written={"sub/b.txt": "0" * 64})
    assert module.damage(replace(wrong, key=keys.digest(wrong.preimage))) == "sub/b.txt does not match its sha256"


def test_published_files_are_read_only(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path / "store"))
    assert stat.S_IMODE((artifact.data / "sub/b.txt").stat().st_mode) == 0o444


def test_a_store_that_does_not_exist_is_searched_without_making_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.find("train", KEY) is None
    assert store.nearest("train", image()) is None
    assert list(store.artifacts("train")) == []
    assert not store.root.exists()


@pytest.mark.parametrize("damage", ["missing file", "shorter file", "cut manifest", "cut json", "no json", "list"])
def test_a_damaged_artifact_is_a_miss_and_can_be_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "store")
    path = put(store).path
    victim = path / {"missing file": "data/a.txt", "shorter file": "data/a.txt", "cut manifest": "manifest.jsonl"}.get(
        damage, "artifact.json"
    )
    text = victim.read_text()
    victim.unlink()
    if damage not in ("missing file", "no json"):
        victim.write_text("[]" if damage == "list" else text[: len(text) // 2])
    assert store.find("train", KEY) is None
    assert store.find("train", KEY) is None, "looking must not change anything"
    with store.claim("train", KEY, no_waiting):
        aside = store.quarantine("train", KEY)
    assert aside is not None
    assert (aside / "data").is_dir()
    assert put(store).key == KEY


def test_publishing_over_rubbish_replaces_it_and_over_a_whole_artifact_keeps_that(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    rubbish = store.root / "artifacts/train/ab" / KEY / "data"
    rubbish.mkdir(parents=True)
    (rubbish / "half").write_text("x")
    first = put(store)
    second = put(store, files={"a.txt": "of another process"})
    assert second == first
    assert (second.data / "a.txt").read_text() == "alpha"
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_publishing_anew_replaces_a_whole_artifact_unless_the_bytes_are_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = put(store)
    assert put(store, replace=True) == first
    assert not (store.root / "quarantine").exists()
    assert put(store, files={"a.txt": "other"}, replace=True).digest != first.digest
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_a_stage_that_leaves_nothing_or_a_link_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(StageError, match="wrote no file"):
        put(store, files={})
    data = store.work("train", KEY) / "data"
    data.mkdir(parents=True)
    (data / "link").symlink_to("/etc/hostname")
    with pytest.raises(StageError, match="not a regular file"):
        put(store, files={})


def test_data_that_was_about_to_be_published_when_its_worker_was_killed_is_work_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    sealed = store.work("train", KEY) / "publish/data/a.txt"
    sealed.parent.mkdir(parents=True)
    sealed.write_text("whole")
    sealed.chmod(0o444)
    with store.claim("train", KEY, no_waiting):
        again = store.work("train", KEY) / "data/a.txt"
        assert again.read_text() == "whole"
        assert stat.S_IMODE(again.stat().st_mode) & stat.S_IWUSR


def test_an_unknown_layout_and_a_directory_that_is_no_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("99")
    with pytest.raises(StoreError, match="layout `99`"):
        Store(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=r"contains thesis\.tex"), Store(home).claim("train", KEY, no_waiting):
        pass
    assert [p.name for p in home.iterdir()] == ["thesis.tex"]


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught, Store(tmp_path / "file" / "store").claim("train", KEY, no_waiting):
        pass
    assert "run.store" in caught.value.hint


def test_the_nearest_artifact_differs_in_the_fewest_options_and_of_equals_is_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    put(store, "aa" + KEY[2:], lr=0.1, epochs=1)
    put(store, "bb" + KEY[2:], lr=0.3, epochs=3)
    put(store, "cc" + KEY[2:], lr=0.2, epochs=1)
    nearest = store.nearest("train", image(lr=0.4, epochs=1))
    assert nearest is not None
    assert nearest.key.startswith("cc")
    exact = store.nearest("train", image(lr=0.3, epochs=3))
    assert exact is not None
    assert exact.key.startswith("bb")


CLAIMER = """
import sys, time
from pathlib import Path
from speculators.runner.store.artifacts import Store, open_store
from tests.conftest import publish_all
with Store(Path(sys.argv[1])).claim("train", sys.argv[2], lambda who: print("waits for", who, flush=True), run="r1"):
    print("holds", time.monotonic(), flush=True)
    sys.stdin.read()
    print("leaves", time.monotonic(), flush=True)
"""


def claimer(store: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", CLAIMER, str(store), KEY]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_claimer_says_for_whom_it_waits_and_comes_after_the_first(tmp_path: Path) -> None:
    with claimer(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("holds")
        with claimer(tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline().startswith(f"waits for pid {first.pid} on ")
            left, _ = first.communicate()
            got, _ = second.communicate()
    assert float(left.split()[1]) <= float(got.split()[1])


def test_a_killed_claimer_blocks_nobody(tmp_path: Path) -> None:
    with claimer(tmp_path) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.kill()
    with Store(tmp_path).claim("train", KEY, no_waiting):
        pass


def test_an_artifact_of_many_files_is_looked_up_quickly(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    data = store.root / "artifacts/train/ab" / KEY / "data"
    data.mkdir(parents=True)
    count = 20_000
    for number in range(count):
        os.close(os.open(data / str(number), os.O_CREAT | os.O_WRONLY))
    manifest = "".join(json.dumps({"path": str(n), "size": 0, "sha256": ""}) + "\n" for n in range(count))
    (data.parent / "manifest.jsonl").write_text(manifest)
    described: dict[str, object] = {
        "format": "1",
        "stage": "train",
        "key": KEY,
        "digest": "d",
        "bytes": 0,
        "record": {},
        "provenance": {},
    }
    described |= {"preimage": image(), "manifest": hashlib.sha256(manifest.encode()).hexdigest()}
    (data.parent / "artifact.json").write_text(json.dumps(described))
    began = time.perf_counter()
    assert store.find("train", KEY) is not None
    assert time.perf_counter() - began < 1.0


def test_what_is_not_here_is_looked_up_in_the_layers_and_nothing_is_written_there(tmp_path: Path) -> None:
    below = put(Store(tmp_path / "below"), lr=0.1)
    store = Store(tmp_path / "store", [tmp_path / "below"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "below").rglob("*")}
    found = store.find("train", KEY)
    assert found == below
    assert store.nearest("train", image(lr=0.2)) == below
    store.touch(found)
    put(store, OTHER, lr=0.3)
    assert {a.key for a in store.artifacts("train")} == {KEY, OTHER}
    assert {a.key for a in store.own_artifacts("train")} == {OTHER}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "below").rglob("*")} == before


def test_the_own_artifact_goes_before_a_layers_and_a_layers_before_a_damaged_own(tmp_path: Path) -> None:
    put(Store(tmp_path / "below"), files={"a.txt": "theirs"})
    own = put(Store(tmp_path / "store"), files={"a.txt": "ours"})
    store = Store(tmp_path / "store", [tmp_path / "below"])
    assert store.find("train", KEY) == own
    assert [a.path for a in store.artifacts("train")] == [own.path]
    (own.data / "a.txt").unlink()
    found = store.find("train", KEY)
    assert found is not None
    assert (found.data / "a.txt").read_text() == "theirs"


def test_a_damaged_own_artifact_is_replaced_although_a_layer_has_it(tmp_path: Path) -> None:
    put(Store(tmp_path / "below"))
    store = Store(tmp_path / "store", [tmp_path / "below"])
    (put(store).data / "a.txt").unlink()
    assert put(store).path.is_relative_to(store.root)
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_layers_are_named_by_the_recipe_or_else_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        put(Store(tmp_path / name))
    a, b, c = (str(tmp_path / name) for name in "abc")
    monkeypatch.setenv("SPECULATORS_STORE_READ", f"{b}:{c}")
    assert [str(layer.root) for layer in open_store(RunOptions(store=a)).layers] == [b, c]
    assert [str(layer.root) for layer in open_store(RunOptions(store=a, stores_read=[c, a])).layers] == [c]


def test_a_layer_that_is_not_there_is_an_error_and_not_a_rerun(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent is not a store") as caught:
        Store(tmp_path / "store", [tmp_path / "absent"])
    assert "or mount its disk" in caught.value.hint


def test_everything_in_a_shared_store_has_the_roots_rights_whatever_the_umask(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o2770)
    before = os.umask(0o077)
    try:
        work = Store(root).work("train", OTHER) / "data"
        with Store(root).claim("train", OTHER, no_waiting):
            work.mkdir(parents=True)
            (work / "half").write_text("x")
        artifact = put(Store(root))
    finally:
        assert os.umask(before) == 0o077
    modes = {str(p.relative_to(root)): stat.S_IMODE(p.stat().st_mode) & 0o777 for p in root.rglob("*")}
    directories = {name: mode for name, mode in modes.items() if (root / name).is_dir()}
    assert set(directories.values()) == {0o770}
    files = {name: mode for name, mode in modes.items() if name not in directories}
    data = str(artifact.data.relative_to(root))
    assert {mode for name, mode in files.items() if name.startswith(data)} == {0o440}
    assert {mode for name, mode in files.items() if not name.startswith(data)} == {0o660}


def test_a_file_that_a_tool_left_for_one_user_alone_can_be_read_once_it_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    data = store.work("train", KEY) / "data"
    with store.claim("train", KEY, no_waiting):
        (data / "sub").mkdir(parents=True)
        (data / "sub").chmod(0o700)
        (data / "sub/b.txt").touch(mode=0o600)
    artifact = put(store, files={"a.txt": "alpha"})
    assert stat.S_IMODE((artifact.data / "sub").stat().st_mode) == 0o755
    assert stat.S_IMODE((artifact.data / "sub/b.txt").stat().st_mode) == 0o444


def test_who_makes_something_is_in_use_with_what_it_reads_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.claim("train", KEY, no_waiting, uses=[OTHER]):
        assert store.in_use() == {KEY, OTHER}
        holder = (tmp_path / f"locks/train-{KEY}.json").read_text()
    assert store.in_use() == set()
    (tmp_path / f"locks/train-{KEY}.json").write_text(holder)  # as after a kill
    assert store.in_use() == set()


def test_a_recipe_that_a_layer_has_runs_without_a_store_of_ones_own(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    monkeypatch.chdir(tmp_path)
    below = Store(tmp_path / "below")
    publish_all(below, Planner(config, below))
    with below.claim("train", OTHER, no_waiting):
        pass  # somebody has worked there: it is a store
    words = ["run.store=own", f"run.stores_read=[{below.root}]"]
    assert cli._guarded(["recipe=smollm2_eagle3", *words]) == 0
    assert "human_eval" in capsys.readouterr().out
    assert cli._guarded(["ls", *words, "--json"]) == 0
    assert {row["store"] for row in json.loads(capsys.readouterr().out)} == {str(below.root)}
    assert not (tmp_path / "own").exists()
