"""What is wrong with data files, and what comes of each: rows that are used, the count of the others, the message."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from speculators.config.choices import DataFormat, OnDamage
from speculators.config.schema import Dataset
from speculators.data import reading
from speculators.data.conversations import RowCounts, usable
from speculators.errors import SourceError

ROWS = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"say caf\u00e9 {i}"}]} for i in range(20)]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
JSONL = b"\n".join(LINES) + b"\n"
LONG = b"".join(
    b'{"id": %d, "prompt": "%s"}\n' % (i, hashlib.shake_128(b"%d" % i).hexdigest(400).encode()) for i in range(400)
)
LIST = b"[" + b", ".join(LINES) + b"]"
DEEP = b'{"id": "deep", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BIG = b'{"id": ' + b"7" * 5000 + b', "messages": [{"role": "user", "content": "big"}]}'
LATIN1 = '{"id": "l", "messages": [{"role": "user", "content": "caf\u00e9"}]}'.encode("latin1")
SURROGATE = b'{"id": "s", "messages": [{"role": "user", "content": "a \\ud800 b"}]}'
SURROGATE_ID = b'{"id": "\\udfff", "messages": [{"role": "user", "content": "a b"}]}'
BROKEN = b'{"id": "b", "messages": [{"role": "user" "content": "a b"}]}'
TORN = b'{"id": "b", "messages": [{"role": "us'


def lines(rows: Sequence[bytes]) -> bytes:
    return b"\n".join(rows) + b"\n"


def listed(rows: Sequence[bytes]) -> bytes:
    return b"[" + b",\n".join(rows) + b"]"


def messages(*turns: Any, **more: Any) -> bytes:
    return json.dumps({"messages": turns, **more}).encode()


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def table(rows: Any) -> pyarrow.Table:
    return rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(list(rows))


def parquet(rows: Any = ROWS) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table(rows), sink, row_group_size=5, compression="none")
    return sink.getvalue()


def arrow(rows: Sequence[Any] = ROWS, *, stream: bool = True) -> bytes:
    sink = io.BytesIO()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(sink, table(rows).schema) as writer:
        for batch in table(rows).to_batches(max_chunksize=5):
            writer.write_batch(batch)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


class Case(NamedTuple):
    """A file; rows used, and dropped by reason; the message of the note or of the error, and the error's hint."""

    data: bytes
    used: int
    dropped: dict[str, int] = {}  # noqa: RUF012
    message: str = ""
    hint: str = ""
    """Without one there is no error."""
    options: dict[str, Any] = {}  # noqa: RUF012


JUNK = b"\x00\xff binary \x01" * 100
HALF = "text with half a character (a lone surrogate)"
REPORT = {"on_damage": OnDamage.report}
TEN, REST = LINES[:10], LINES[10:]
MIDDLE = listed(TEN)[:-1] + b",\n"

CASES = {
    # one row of many, in lines and in a list
    "a broken line": Case(lines([*TEN, BROKEN, *REST]), 20, {"broken JSON": 1}),
    "a broken item": Case(listed([*TEN, BROKEN, *REST]), 20, {"broken JSON": 1}),
    "the first item broken": Case(listed([BROKEN, *LINES]), 20, {"broken JSON": 1}),
    "the first line broken": Case(lines([BROKEN, *LINES]), 20, {"broken JSON": 1}),
    "the last item broken": Case(listed([*LINES, BROKEN]), 20, message="broken JSON (Expecting ',' delimiter) at byte"),
    "the last line broken": Case(lines([*LINES, BROKEN]), 20, {"broken JSON": 1}),
    "a torn line": Case(lines([*TEN, TORN, *REST]), 20, {"broken JSON": 1}),
    "a torn item": Case(listed([*TEN, TORN, *REST]), 20, {"broken JSON": 1}),
    "two broken items": Case(listed([*TEN, BROKEN, BROKEN, *REST]), 20, {"broken JSON": 1}),
    "a comma missing": Case(b"[" + TEN[0] + b"\n" + TEN[1] + b"]", 2),
    "a comma after the last": Case(b"[" + TEN[0] + b",]", 1),
    "words between items": Case(MIDDLE + b"oops " + listed(REST)[1:], 20, {"broken JSON": 1}),
    "a surrogate in a line": Case(lines([*TEN, SURROGATE, *REST]), 20, {HALF: 1}),
    "a surrogate in an item": Case(listed([*TEN, SURROGATE, *REST]), 20, {HALF: 1}),
    "a surrogate in an id": Case(listed([*TEN, SURROGATE_ID, *REST]), 20, {HALF: 1}),
    "a deep line": Case(lines([*TEN, DEEP, *REST]), 20, {"nested too deeply": 1}),
    "a deep item": Case(listed([*TEN, DEEP, *REST]), 20, {"nested too deeply": 1}),
    "a deep first item": Case(listed([DEEP, *LINES]), 20, {"nested too deeply": 1}),
    "a deep first line": Case(lines([DEEP, *LINES]), 20, {"nested too deeply": 1}),
    "a long integer in a line": Case(lines([*TEN, BIG, *REST]), 20, {"an integer with too many digits": 1}),
    "a long integer in an item": Case(listed([*TEN, BIG, *REST]), 20, {"an integer with too many digits": 1}),
    "Latin-1 in a line": Case(lines([*TEN, LATIN1, *REST]), 20, {"not UTF-8": 1}),
    "Latin-1 in an item": Case(listed([*TEN, LATIN1, *REST]), 20, {"not UTF-8": 1}),
    "bytes between items": Case(MIDDLE + b"\xff\xfe\xfd" + listed(REST)[1:], 20, {"broken JSON": 1}),
    "null in a list": Case(listed([*TEN, b"null", *REST]), 20, {"not an object": 1}),
    "a text in a line": Case(lines([*TEN, b'"hello"', *REST]), 20, {"not an object": 1}),
    "a list in a line": Case(lines([*TEN, b"[1, 2]", *REST]), 20, {"not an object": 1}),
    "not a number": Case(lines([*TEN, b'{"id": NaN, "prompt": "x y"}', *REST]), 21),
    "a line break in a text": Case(listed([*TEN, LINES[10].replace(b" caf", b"\ncaf")]), 11),
    # how a file is laid out
    "two lists in a file": Case(listed(TEN) + b"\n" + listed(REST), 20),
    "lines after a list": Case(listed(TEN) + b"\n" + lines(REST), 20),
    "two rows in a line": Case(TEN[0] + TEN[1] + b"\n" + TEN[2] + b"\n", 3),
    "commas at the ends of lines": Case(b",\n".join(LINES), 20),
    "rows over several lines": Case(b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS), 20),
    "a mark before lines": Case(b"\xef\xbb\xbf" + JSONL, 20),
    "a mark before a list": Case(b"\xef\xbb\xbf" + LIST, 20),
    "line ends of Windows": Case(JSONL.replace(b"\n", b"\r\n"), 20),
    "blank lines": Case(b"\n\n" + JSONL.replace(b"\n", b"\n\n"), 20),
    # cut off
    "lines cut in a row": Case(JSONL[:-9], 19, message="the file ends in the middle of a row at byte"),
    "a list cut in a row": Case(LIST[:-9], 19, message="the file ends in the middle of a row at byte"),
    "a list not closed": Case(LIST[:-1], 20, message="the file ends before the list does"),
    "a list not closed after a comma": Case(LIST[:-1] + b", ", 20, message="the file ends before the list does"),
    "a cut gzip": Case(gzip.compress(LONG)[:-900], -1, message="ends too early"),
    "a cut zstd": Case(zstd(LONG)[:-900], -1, message="ends too early"),
    "a cut list where that is refused": Case(
        LIST[:-9], 0, message="in the middle of a row", hint="on_damage=report", options={"on_damage": OnDamage.error}
    ),
    "a cut Parquet": Case(parquet()[:-100], 0, message="broken (", hint="get the file again"),
    "a cut Arrow": Case(arrow()[:-300], 0, message="broken (", hint="get the file again"),
    "a cut Arrow that is used": Case(arrow()[:-300], 15, message="broken (", options=REPORT),
    # damaged, and the next row cannot be found
    "junk after rows": Case(MIDDLE + JUNK * 100, 0, message="broken JSON", hint="on_damage=report"),
    "junk after rows that are used": Case(MIDDLE + JUNK * 100, 10, message="broken JSON", options=REPORT),
    "a broken gzip": Case(flipped(gzip.compress(JSONL), 60), 0, message="is broken (", hint="on_damage=report"),
    "a broken gzip that is used": Case(
        gzip.compress(lines(TEN)) + b"\x1f\x8bjunk", 10, message="is broken (", options=REPORT
    ),
    "a broken zstd": Case(zstd(JSONL) + b"junk", 0, message="is broken (", hint="on_damage=report"),
    "a broken zstd that is used": Case(zstd(JSONL) + b"junk", 20, message="is broken (", options=REPORT),
    # not data
    "an empty file": Case(b"", 0, message="bad is empty", hint="write it again"),
    "blanks": Case(b" \n\n ", 0, message="bad is empty", hint="write it again"),
    "an empty list": Case(b"[]", 0, message="no usable row among 0: it has no rows", hint="give rows"),
    "gzip of nothing": Case(gzip.compress(b""), 0, message="bad is gzip of empty", hint="write it again"),
    "HTML": Case(b"<!doctype html><html>", 0, message="bad is HTML", hint="/resolve/"),
    "PDF": Case(b"%PDF-1.7\n\xff\xfe", 0, message="bad is PDF", hint="JSON lines"),
    "UTF-16": Case(JSONL.decode().encode("utf-16"), 0, message="text in UTF-16", hint="iconv -f UTF-16"),
    "UTF-16 without a mark": Case(JSONL.decode().encode("utf-16-le"), 0, message="text in UTF-16", hint="iconv"),
    "a zip archive": Case(b"PK\x03\x04" + JUNK, 0, message="a zip archive", hint="unzip bad"),
    "bzip2": Case(b"BZh91AY" + JUNK, 0, message="bzip2", hint="bunzip2 bad"),
    "xz": Case(b"\xfd7zXZ\0" + JUNK, 0, message="xz", hint="unxz bad"),
    "a pickle": Case(b"\x80\x04\x95" + JUNK, 0, message="a pickle", hint="JSON lines"),
    "a pointer of LFS": Case(b"version https://git-lfs.github.com/spec/v1", 0, message="Git LFS", hint="git lfs pull"),
    "binary": Case(JUNK, 0, message="binary data", hint="JSON lines"),
    "gzip of Parquet": Case(gzip.compress(parquet()), 0, message="gzip of Parquet", hint="unpack bad"),
    "gzip of gzip": Case(gzip.compress(gzip.compress(JSONL)), 0, message="compressed again", hint="unpack bad"),
    "prose": Case(b"Once upon a time.\nThe end.\n", 0, message="begins with 'Once upon a time.'", hint='{"prompt"'),
    # rows of other forms
    "a wrong column": Case(
        lines([b'{"ask": "x"}'] * 2), 0, {"no messages": 2}, "(columns: ask)", "prompt_field=COLUMN"
    ),
    "a column that is not there": Case(
        lines([b'{"ask": "x"}']), 0, {"no column say": 1}, "(columns: ask)", "prompt_field=COLUMN",
        {"prompt_field": "say"},
    ),
    "another format": Case(
        JSONL, 0, {"no prompt": 20}, "columns: id, messages", "data.set.format=messages", {"format": DataFormat.prompts}
    ),
    "messages that are prompts": Case(
        lines([b'{"prompt": "x"}']), 0, {"no messages": 1}, "columns: prompt", "data.set.format=prompts",
        {"format": DataFormat.sharegpt},
    ),
    "texts": Case(b'["one", "two"]', 0, {"not an object": 2}, "not an object", '{"prompt": "..."}'),
    "only short": Case(
        JSONL, 0, {"first message shorter than min_chars": 20}, "min_chars", "data.set.min_chars=1", {"min_chars": 99}
    ),
    "only images": Case(
        messages(user([{"type": "image_url"}, {"type": "text", "text": "x"}])), 0, {"images": 1}, "images", "of text"
    ),
    "unknown speakers": Case(messages({"role": "Bob", "content": "x"}), 0, {"unknown role": 1}, "role", "set.roles="),
    "a CSV row with a column more": Case(b"id,prompt\n1,hi\n2,a,b\n3,ho\n", 2, {"other columns than the header's": 1}),
    "a CSV quote not closed": Case(b'id,prompt\n1,hi\n2,"a\n3,ho\n', 2, {"broken CSV": 1}),
    "CSV in Latin-1": Case(b"id,prompt\n1,hi\n2,caf\xe9\n3,ho\n", 2, {"not UTF-8": 1}),
    "CSV with a long text": Case(b'id,prompt\n1,hi\n2,"' + b"a" * 200_000 + b'"\n3,ho\n', 3),
    "CSV with a line separator in a text": Case("id,prompt\n1,a\u2028b\n2,c\x0cd\n".encode(), 2),
    "CSV with line ends of old Macs": Case(b"id,prompt\r1,hi\r", 0, message="carriage return", hint="tr "),
    "a date out of range": Case(
        parquet(pyarrow.table({"prompt": ["x", "y"], "day": pyarrow.array([1, 2**31 - 1], pyarrow.date32())})), 1,
        {"a date or time out of range": 1},
    ),
    "CSV without a known column": Case(b"a,b\n1,2\n", 0, {"no messages": 1}, "(columns: a, b)", "prompt_field=COLUMN"),
    "the same id twice": Case(lines([b'{"id": 1, "prompt": "x"}', b'{"id": 1, "prompt": "y"}']), 1,
                              {"same id as another": 1}),
    "a text in Parquet that is not UTF-8": Case(
        parquet([{"prompt": "abc"}, {"prompt": "xyzzy"}]).replace(b"xyzzy", b"xy\xffzy"), 1, {"not UTF-8": 1}
    ),
    "arguments of a call that are no JSON": Case(
        messages(user(), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), 0,
        {"the arguments of a tool call: not JSON": 1}, "the arguments of a tool call", "messages_field",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [1 << 20, 61])
def test_a_bad_input_gives_its_good_rows_the_count_of_the_others_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    case, counts = CASES[name], RowCounts()
    if block < 100 and len(case.data) > 50_000:
        pytest.skip("long")
    path = tmp_path / "bad"
    path.write_bytes(case.data)
    spec = Dataset(source="x", **case.options)
    text = hint = ""
    used = 0
    try:
        for _ in usable(path, "set", spec, counts, set()):
            used += 1
        text = "\n".join(counts.notes("set"))
        if not used:
            raise counts.why_unusable("set", spec)
    except SourceError as error:
        text, hint = error.message, error.hint
    assert case.message in text
    assert case.hint in hint
    assert bool(hint) == bool(case.hint), (text, hint)
    assert "set" in text or not case.message
    if not hint or case.dropped:
        assert counts.dropped == case.dropped
        assert used == case.used or (case.used < 0 < used < 400)
        assert counts.rows == used + counts.dropped.total()
    if not case.message and not case.dropped:
        assert counts.bytes.not_read == 0
    assert 0 <= counts.bytes.not_read <= counts.bytes.total


def test_there_are_83_bad_inputs() -> None:
    assert len(CASES) >= 83
