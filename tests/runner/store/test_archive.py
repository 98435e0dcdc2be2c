"""Artifacts travel as one file: whole, checked, and harmless whoever wrote it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speculators import cli
from speculators.config.schema import Config
from speculators.errors import StoreError
from speculators.runner.planning import key as keys
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store import archive
from speculators.runner.store.artifact import Artifact, damage
from speculators.runner.store.artifacts import Store
from tests.conftest import publish_all, publish_files

FILES = {"a.txt": "alpha", "sub/b.txt": "beta" * 1000}
Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def made(store: Store) -> list[Artifact]:
    """Two artifacts."""
    return [publish_files(store, FILES), publish_files(store, {"tokens": "1 2 3"}, stage="tokenize")]


@pytest.fixture
def file(made: list[Artifact], tmp_path: Path) -> Path:
    """Both of them, exported."""
    archive.export_artifacts(made, tmp_path / "made.tar")
    return tmp_path / "made.tar"


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def bring(file: Path, store: Store) -> list[bool]:
    return [new for _, new in archive.import_artifacts(file, store, waiting=print)]


def lying(root: Path) -> list[str]:
    """Every file below a directory that a store shows to somebody, or would resume from."""
    places = [root / "artifacts", root / "work", root / "quarantine"]
    return sorted(str(p.relative_to(root)) for place in places for p in place.rglob("*") if not p.is_dir())


def rewritten(file: Path, change: Callable[[list[Member]], list[Member]]) -> Path:
    """The same file after somebody changed its members."""
    with tarfile.open(file) as tar:
        members = [(m, f.read() if (f := tar.extractfile(m)) else b"") for m in tar]
    changed = file.with_name("changed.tar")
    with tarfile.open(changed, "w") as tar:
        for member, content in change(members):
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return changed


def test_what_is_imported_is_what_was_exported(made: list[Artifact], file: Path, other: Store) -> None:
    assert bring(file, other) == [True, True]
    for artifact in made:
        found = other.find(artifact.stage, artifact.key)
        assert found is not None
        assert dataclasses.replace(found, path=artifact.path) == artifact
        assert damage(found) == ""
        assert not other.work(artifact.stage, artifact.key).exists()
    taken = other.find("train", made[0].key)
    assert taken is not None
    assert {name: (taken.data / name).read_text() for name in FILES} == FILES
    assert stat.S_IMODE((taken.data / "a.txt").stat().st_mode) == 0o444


def test_the_same_artifacts_are_the_same_file_wherever_they_lie(
    made: list[Artifact], file: Path, other: Store, tmp_path: Path
) -> None:
    bring(file, other)
    again = [a for m in made if (a := other.find(m.stage, m.key)) is not None]
    archive.export_artifacts(again, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()


def test_importing_what_is_there_is_a_hit_that_writes_nothing(made: list[Artifact], file: Path, store: Store) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.root.rglob("*")}
    assert bring(file, store) == [False, False]
    assert {p: p.stat().st_mtime_ns for p in store.root.rglob("*")} == before


def test_a_damaged_artifact_is_replaced_by_the_imported_one(made: list[Artifact], file: Path, store: Store) -> None:
    (made[0].data / "a.txt").unlink()
    assert bring(file, store) == [True, False]
    assert store.find("train", made[0].key) is not None
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_a_cut_off_import_leaves_nothing(made: list[Artifact], file: Path, tmp_path: Path) -> None:
    whole, first = file.read_bytes(), made[0].bytes
    for cut in (0, 100, 512, 1024, 3000, 5000, first // 2 + 4096, first + 4096):
        short = tmp_path / "short.tar"
        short.write_bytes(whole[:cut])
        store = Store(tmp_path / f"store-{cut}")
        with pytest.raises(StoreError, match=r"short\.tar cannot be (imported|read)"):
            bring(short, store)
        assert lying(store.root) == [], cut


def test_an_interrupted_import_leaves_nothing_and_what_an_attempt_has_made_stays(
    made: list[Artifact], file: Path, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = other.work("train", made[0].key) / "scratch/checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("half a training")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "adopt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bring(file, other)
    assert lying(other.root) == [str(checkpoint.relative_to(other.root))]
    assert bring(file, other) == [True, True]


def test_what_a_killed_import_left_is_in_nobodys_way(made: list[Artifact], file: Path, other: Store) -> None:
    half = other.work("train", made[0].key) / "import/data/a.txt"
    half.parent.mkdir(parents=True)
    half.write_text("alp")
    assert bring(file, other) == [True, True]
    found = other.find("train", made[0].key)
    assert found is not None
    assert damage(found) == ""


def _in_place(name: str, content: bytes) -> Callable[[list[Member]], list[Member]]:
    return lambda members: [(m, content if m.name.endswith(name) else c) for m, c in members]


def _renamed(old: str, new: str) -> Callable[[list[Member]], list[Member]]:
    def change(members: list[Member]) -> list[Member]:
        for member, _ in members:
            if member.name.endswith(old):
                member.name = new
        return members

    return change


def _linked(kind: bytes) -> Callable[[list[Member]], list[Member]]:
    def change(members: list[Member]) -> list[Member]:
        (link,) = [m for m, _ in members if m.name.endswith("data/a.txt")]
        link.type, link.linkname = kind, "/etc/hostname"
        return [(m, b"" if m is link else c) for m, c in members]

    return change


def _more(members: list[Member]) -> list[Member]:
    return [*members, (tarfile.TarInfo("train/more"), b"x")]


def _listing(**changes: object) -> Callable[[list[Member]], list[Member]]:
    def change(members: list[Member]) -> list[Member]:
        plain = json.loads(members[0][1])
        plain["artifacts"][0] |= changes
        return [(members[0][0], json.dumps(plain).encode()), *members[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_in_place("data/a.txt", b"alphA"), "does not match its sha256"),
        (_in_place("data/a.txt", b"longer than it was"), "is not a regular file of the listed size"),
        (_in_place("manifest.jsonl", b"{}\n"), "is damaged"),
        (_in_place("artifact.json", b"[]"), "is damaged"),
        (_in_place("artifacts.json", b'{"format": 99}'), "has format 99, this release reads 1"),
        (_in_place("artifacts.json", b"{"), "its list of artifacts is damaged"),
        (_renamed("data/a.txt", "../../a.txt"), "` where `"),
        (_renamed("data/a.txt", "/etc/a.txt"), "` where `"),
        (_linked(tarfile.SYMTYPE), "is not a regular file of the listed size"),
        (_linked(tarfile.LNKTYPE), "is not a regular file of the listed size"),
        (_linked(tarfile.FIFOTYPE), "is not a regular file of the listed size"),
        (_listing(stage="evil"), "of stage `evil`, which this release does not have"),
        (_listing(key="../../../etc"), "its list of artifacts is damaged"),
        (_listing(digest="0" * 64), "does not match the list of artifacts"),
        (_listing(files=-1), "its list of artifacts is damaged"),
        (lambda members: members[1:], "where `artifacts.json` should be"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_and_leaves_nothing(
    file: Path, other: Store, change: Callable[[list[Member]], list[Member]], said: str
) -> None:
    with pytest.raises(StoreError) as caught:
        bring(rewritten(file, change), other)
    assert said in caught.value.message
    assert lying(other.root) == []


def test_more_than_is_listed_is_refused(file: Path, other: Store) -> None:
    with pytest.raises(StoreError, match="it contains more than it lists"):
        bring(rewritten(file, _more), other)


def _forged(members: list[Member], name: str | None = None, **changes: Any) -> list[Member]:
    """The first artifact with another file name or other facts, and every digest made to fit."""
    described = json.loads(members[1][1]) | changes
    manifest = members[2][1].replace(b'"a.txt"', json.dumps(name or "a.txt").encode())
    digest = hashlib.sha256(manifest).hexdigest()
    described |= {"manifest": digest, "digest": digest}
    listing = json.loads(members[0][1])
    listing["artifacts"][0] |= {"digest": digest, "key": described["key"]}
    texts = [json.dumps(listing).encode(), json.dumps(described).encode(), manifest]
    for member, _ in members:
        member.name = member.name.replace(json.loads(members[1][1])["key"], described["key"])
        if name and member.name.endswith("data/a.txt"):
            member.name = member.name.replace("a.txt", name)
    return [*((m, t) for (m, _), t in zip(members[:3], texts, strict=True)), *members[3:]]


@pytest.mark.parametrize("name", ["../evil", "../../../../evil", "./a", "/tmp/evil", "a//b", "..", ""])
def test_a_forged_manifest_cannot_name_a_place_elsewhere(file: Path, other: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="has invalid entries"):
        bring(rewritten(file, lambda members: _forged(members, name or "\0")), other)
    assert not list(tmp_path.rglob("evil"))
    assert lying(other.root) == []


def test_a_key_that_is_not_that_of_its_preimage_is_refused(file: Path, other: Store) -> None:
    assert keys.digest({}) != "e" * 64
    with pytest.raises(StoreError, match="is not the digest of its preimage"):
        bring(rewritten(file, lambda members: _forged(members, key="e" * 64)), other)


def test_an_export_never_overwrites_and_one_that_fails_leaves_no_file(made: list[Artifact], file: Path) -> None:
    with pytest.raises(StoreError, match=r"made\.tar exists"):
        archive.export_artifacts(made, file)
    changed = made[0].data / "a.txt"
    changed.chmod(0o644)
    changed.write_text("alphA")
    with pytest.raises(StoreError, match="does not match its sha256"):
        archive.export_artifacts(made, file.with_name("second.tar"))
    (made[0].data / "a.txt").unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        archive.export_artifacts(made, file.with_name("second.tar"))
    assert [p.name for p in file.parent.glob("*second*")] == []


def test_a_whole_recipe_is_exported_and_found_again_elsewhere(
    store: Store, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    publish_all(store, Planner(config, store))
    assert cli._guarded(["export", "recipe=smollm2_eagle3", "train.lr=3e-4", f"{tmp_path}/all.tar"]) == 0
    assert "missing  train               changed: train.lr" in capsys.readouterr().err
    monkeypatch.setenv("SPECULATORS_STORE", str(tmp_path / "elsewhere"))
    assert cli._guarded(["import", f"{tmp_path}/all.tar", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(row["new"] for row in told)
    states = {s.node.name: s.state.name for s in Planner(config, Store(tmp_path / "elsewhere")).plan()}
    assert {name for name, state in states.items() if state == "cached"} == states.keys() - {"train", "evaluate"}


def test_one_artifact_is_named_by_the_start_of_its_key(
    store: Store, made: list[Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_files(store, FILES, lr=0.2)
    file = tmp_path / "one.tar"
    assert cli._guarded(["export", f"train:{made[0].key[:12]}", "tokenize", str(file)]) == 0
    assert {item.key for item in archive.contents(file)} == {a.key for a in made}
    assert cli._guarded(["export", "train:zz", str(tmp_path / "two.tar")]) == 1
    err = capsys.readouterr().err
    assert "error: no artifact matches `train:zz`" in err
    assert made[0].key[:8] in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "train"], "export needs artifacts and, last, a file"),
        (["export"], "export needs artifacts and, last, a file"),
        (["export", "trian", "x.tar"], "there is no stage `trian`"),
        (["import"], "import needs one file"),
        (["import", "/no/such/file"], "/no/such/file cannot be read"),
        (["import", __file__], "cannot be imported"),
    ],
)
def test_a_mistake_is_said_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._guarded(words) == 1
    assert said in capsys.readouterr().err


def test_an_import_for_which_there_is_no_room_is_refused_before_it_starts(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from speculators.verbs import store as verbs

    monkeypatch.setattr(verbs, "free_bytes", lambda root: 100)
    assert cli._guarded(["import", str(file), f"run.store={tmp_path}/other"]) == 1
    assert "the store has 100 B free" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
