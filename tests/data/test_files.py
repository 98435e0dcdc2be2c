"""The files of datasets: on this machine and on a hub, in every container, by subset and split."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from speculators.config.schema import Dataset
from speculators.data.conversations import RowCounts, read_conversations
from speculators.data.files import choose_files
from speculators.data.sources import fetch
from speculators.errors import SourceError
from speculators.runner.planning.sources import Hub, resolve
from tests.loopback import hub_of

ROWS = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(6)]
COMMIT = "d" * 40
CARD = b"""---
configs:
- config_name: short
  default: true
  data_files:
  - {split: train_sft, path: data/train_sft-*}
  - {split: test_sft, path: data/test_sft-*}
- config_name: long
  data_files: long/*.parquet
---
# Rows
"""


def parquet(rows: Sequence[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def questions(path: Path, **options: Any) -> list[str]:
    spec = Dataset(source="x", **options)
    return [c.first.removeprefix("question ") for c in read_conversations(path, "set", spec, RowCounts())]


FILES = {
    "README.md": CARD,
    "data/train_sft-00000-of-00002.parquet": parquet(ROWS[:2]),
    "data/train_sft-00001-of-00002.parquet": parquet(ROWS[2:4]),
    "data/test_sft-00000-of-00001.parquet": parquet(ROWS[4:5]),
    "long/rows.parquet": parquet(ROWS[5:]),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = hub_of("acme/chat", COMMIT, FILES)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    server.shutdown()
    server.server_close()


def fetched(tmp_path: Path, source: str, **selection: str) -> Path:
    """What a source is fetched as, resolved as a plan does."""
    known = resolve("data.set.source", source, "file", Hub(), selection)
    assert known.identity["revision"] == COMMIT
    directory, scratch = tmp_path / "data", tmp_path / "scratch"
    directory.mkdir()
    scratch.mkdir()
    return fetch(known.identity, directory, scratch)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "selection", "expected"),
    [
        ("hub:acme/chat", {"split": "train_sft"}, "0123"),
        (f"hub:acme/chat@{COMMIT}", {"split": "test_sft", "subset": "short"}, "4"),
        ("hub:acme/chat", {"subset": "long"}, "5"),
        ("hub:acme/chat/data/*-00000-*.parquet", {}, "401"),
        ("hub:acme/chat/data/train_sft-00001-of-00002.parquet", {}, "23"),
        ("acme/chat:long/rows.parquet", {}, "5"),
    ],
)
def test_a_dataset_of_the_hub_gives_the_files_of_its_subset_and_split(
    tmp_path: Path, source: str, selection: dict[str, str], expected: str
) -> None:
    path = fetched(tmp_path, source, **selection)
    assert "".join(questions(path, **selection)) == expected
    ids = [c.id for c in read_conversations(path, "set", Dataset(source="x"), RowCounts())]
    assert ids == [f"set/r{number}" for number in expected]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "selection", "message", "hint"),
    [
        ("hub:acme/chat", {}, "there are several splits: train_sft, test_sft", "split: train_sft"),
        ("hub:acme/chat", {"split": "dev"}, "there is no split `dev`: train_sft, test_sft", "split: train_sft"),
        ("hub:acme/chat", {"subset": "tall"}, "there is no subset `tall`: short, long", "subset: short"),
        ("hub:acme/chat/*.csv", {}, "dataset acme/chat has no file *.csv", "it has, among others: README.md"),
    ],
)
def test_a_selection_that_is_open_or_empty_is_refused_with_what_there_is(
    tmp_path: Path, source: str, selection: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(SourceError) as caught:
        fetched(tmp_path, source, **selection)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_subset_and_split_are_part_of_what_a_source_is() -> None:
    plain = resolve("data.x.source", f"hub:acme/chat@{COMMIT}", "file")
    split = resolve("data.x.source", f"hub:acme/chat@{COMMIT}", "file", selection={"split": "test"})
    assert plain.digest != split.digest


@pytest.mark.parametrize(
    ("names", "subset", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], None, None, "train.jsonl"),
        (["train.jsonl", "test.jsonl"], None, "test", "test.jsonl"),
        (["a.jsonl", "b.jsonl", "README.md", ".hidden.json", "LICENSE"], None, None, "a.jsonl b.jsonl"),
        (["data/train-00000-of-00001-abc.parquet", "data/validation-00000-of-00001.parquet"], None, "validation",
         "data/validation-00000-of-00001.parquet"),
        (["en/train/0000.parquet", "en/train_gen/0000.parquet", "de/train/0000.parquet"], "en", "train_gen",
         "en/train_gen/0000.parquet"),
        (["dataset_dict.json", "train/data-00000-of-00001.arrow", "train/state.json", "test/data-00000-of-00001.arrow"],
         None, None, "train/data-00000-of-00001.arrow"),
        (["part-00000-of-00002.json", "part-00001-of-00002.json"], None, None,
         "part-00000-of-00002.json part-00001-of-00002.json"),
    ],
)  # fmt: skip
def test_names_show_the_split(names: list[str], subset: str | None, split: str | None, expected: str) -> None:
    assert " ".join(choose_files(names, subset, split)) == expected


def arrow(rows: Sequence[Any], *, stream: bool) -> bytes:
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(list(rows))
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


CONTAINERS = {
    "lines": lines(ROWS),
    "list": json.dumps(ROWS).encode(),
    "indented list": json.dumps(ROWS, indent=1).encode(),
    "gzip": gzip.compress(lines(ROWS)),
    "gzip members": gzip.compress(lines(ROWS[:3])) + gzip.compress(lines(ROWS[3:])),
    "zstd": bytes(pyarrow.compress(lines(ROWS), codec="zstd", asbytes=True)),
    "zstd of a list": bytes(pyarrow.compress(json.dumps(ROWS).encode(), codec="zstd", asbytes=True)),
    "Parquet": parquet(ROWS),
    "Arrow stream": arrow(ROWS, stream=True),
    "Arrow file": arrow(ROWS, stream=False),
    "CSV": b"id,messages\r\n" + b"".join(
        b'%s,"%s"\r\n' % (row["id"].encode(), json.dumps(row["messages"]).replace('"', '""').encode()) for row in ROWS
    ),
    "CSV with tabs": b"id\tquestion\tanswer\n" + b"".join(b"r%d\tquestion %d\tso\n" % (i, i) for i in range(6)),
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_a_file_is_follows_from_its_content(tmp_path: Path, container: str) -> None:
    (tmp_path / "rows.bin").write_bytes(CONTAINERS[container])
    counts = RowCounts()
    conversations = list(read_conversations(tmp_path / "rows.bin", "set", Dataset(source="x"), counts))
    assert [(c.id, c.first) for c in conversations] == [(f"set/r{i}", f"question {i}") for i in range(6)]
    assert (counts.bytes.total > 0, counts.bytes.not_read) == (True, 0)


def test_directories_and_patterns_give_the_rows_of_their_files_in_order(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"sub{number}").mkdir()
        (tmp_path / f"sub{number}/part.jsonl").write_bytes(lines(ROWS[2 * number : 2 * number + 2]))
    (tmp_path / "README.md").write_text("# Rows")
    assert "".join(questions(tmp_path)) == "012345"
    assert "".join(questions(tmp_path / "sub[12]/*.jsonl")) == "2345"
    one, other = (resolve("data.x.source", f"{tmp_path}/{pattern}/*", "file") for pattern in ("sub*", "sub[12]"))
    assert one.digest != other.digest
    with pytest.raises(SourceError, match=r"data\.x\.source: no file matches"):
        resolve("data.x.source", f"{tmp_path}/*.csv", "file")


def test_rows_without_ids_in_several_files_have_ids_of_file_and_position(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines([{"prompt": f"{name} {i}"} for i in range(2)]))
    ids = [c.id for c in read_conversations(tmp_path, "set", Dataset(source="x"), RowCounts())]
    assert ids == ["set/a.jsonl:1", "set/a.jsonl:2", "set/b.jsonl:1", "set/b.jsonl:2"]


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": table.select(range(4)), "test": table.select([4, 5])}).save_to_disk(tmp_path / "two")
    assert "".join(questions(tmp_path / "one")) == "012345"
    assert "".join(questions(tmp_path / "two")) == "0123"
    assert "".join(questions(tmp_path / "two", split="test")) == "45"
