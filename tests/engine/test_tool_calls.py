"""Conversations with tools: the target is asked where the record has an answer, and its calls are compared."""

from __future__ import annotations

from typing import Any

import pytest

from speculators.engine.client import Completion
from speculators.engine.tool_calls import agrees, answer_message, as_request, calls_in_text, segments


def call(name: str, arguments: Any, **fields: str) -> dict[str, Any]:
    return {**fields, "type": "function", "function": {"name": name, "arguments": arguments}}


def completion(text: str = "", reasoning: str = "", tool_calls: tuple[dict[str, Any], ...] = ()) -> Completion:
    return Completion(
        prompt_ids=[1], token_ids=[2], text=text, finish_reason="stop", logprobs=[], kv_transfer_params={}, seconds=0.0,
        reasoning=reasoning, tool_calls=list(tool_calls),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ("u", ["u"]),
        ("s u u", ["s u", "u"]),
        ("a u u", ["a u", "u"]),  # an opening answer is context
        ("u a t u", ["u", "t", "u"]),  # a call with its result; then the text, which the target says anew
        ("u a t t a t", ["u", "t t", "t"]),
        ("u s u", ["u", "s u"]),
        ("s", []),
    ],
)
def test_the_target_answers_after_users_and_results(roles: str, parts: list[str]) -> None:
    names = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    messages = [{"role": names[letter], "content": str(i)} for i, letter in enumerate(roles.split())]
    found = [" ".join(message["role"][0] for message in part.messages) for part in segments(messages)]
    assert found == parts


RECORDED = {"role": "assistant", "content": "", "tool_calls": [call("find", {"a": 1, "b": [2]}, id="r1")]}


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (completion(tool_calls=(call("find", '{"b": [2], "a": 1.0}', id="x"),)), True),
        (completion(tool_calls=(call("find", '{"a": 1}', id="x"),)), False),
        (completion(tool_calls=(call("look", '{"a": 1, "b": [2]}', id="x"),)), False),
        (completion(tool_calls=(call("find", "{broken", id="x"),)), False),
        (completion("I cannot."), False),
        (completion('<tool_call>\n{"name": "find", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'), True),
        (completion('[{"name": "find", "parameters": {"a": 1, "b": [2]}}] {"x": {'), True),
        (completion('{"name": "find", "arguments": {"a": 2, "b": [2]}}'), False),
    ],
)
def test_a_call_is_the_recorded_one_if_name_and_arguments_are_equal_as_json(answer: Completion, same: bool) -> None:
    message = answer_message(answer)
    assert agrees(message, RECORDED) == same
    if same and answer.tool_calls:
        assert message["tool_calls"][0]["id"] == "r1"  # which the recorded result refers to


def test_a_text_agrees_with_a_text_only() -> None:
    assert agrees(answer_message(completion("fine")), {"role": "assistant", "content": "other"})
    assert not agrees(answer_message(completion(tool_calls=(call("find", "{}"),))), {})
    assert calls_in_text('{"name": "no call"} {"name": 1, "arguments": {}} {') == []


def test_the_server_gets_arguments_as_text_and_thoughts_by_its_own_name() -> None:
    message = answer_message(completion("", "hm", (call("find", '{"a": "\u00e9"}'),)))
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": "\u00e9"}
    sent = as_request(message)
    assert sent["reasoning"] == "hm"
    assert sent["tool_calls"] == [call("find", '{"a": "\u00e9"}', id="call_0")]
    assert as_request({"role": "user", "content": "a"}) == {"role": "user", "content": "a"}
