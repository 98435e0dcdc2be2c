"""Conversations with tools: what the target is asked, which of its calls are the recorded ones, and their results.

A row with tools has the recorded calls and results. If the target makes the recorded calls, or none where none is
recorded, the recorded results or the next user message follow its own message; else nobody knows what would, and the
conversation ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speculators.engine.client import Completion

Message = Mapping[str, Any]
ARGUMENTS = ("arguments", "parameters")
"""Names that chat formats give to the arguments of a call, in a JSON object with its `name`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a conversation that ends where the target answers."""

    messages: list[Message]
    """Messages since the answer before."""
    recorded: Message | None
    """The answer of the record; None if the row has none there."""


def segments(messages: Sequence[Message]) -> Iterator[Segment]:
    """Divide a conversation at the target's answers: after each user message, and after the results of calls.

    Answers before the first user message are context. Messages after the last answer are part of none.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    pending: list[Message] = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and position > first:
            continue  # part of the segment that it ends
        pending.append(message)
        following = messages[position + 1] if position + 1 < len(messages) else {"role": ""}
        if message["role"] in ("user", "tool") and following["role"] != "tool":
            yield Segment(pending, following if following["role"] == "assistant" else None)
            pending = []


def calls(message: Message) -> list[tuple[str, Any]]:
    """(name, arguments) of the calls in a message; arguments that are not JSON stay text."""
    pairs = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError:
                pass
        pairs.append((call["function"]["name"], {} if arguments is None else arguments))
    return pairs


def calls_in_text(text: str) -> list[tuple[str, Any]]:
    """(name, arguments) of calls that a text spells as JSON objects, as Hermes, Qwen, Llama 3 and Mistral do.

    For servers without a tool parser. Calls in another form are not found.
    """
    pairs, position, decoder = [], text.find("{"), json.JSONDecoder()
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            value, end = None, position + 1
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            arguments = next((value[name] for name in ARGUMENTS if name in value), None)
            if isinstance(arguments, dict):
                pairs.append((value["name"], arguments))
        position = text.find("{", end)
    return pairs


def answer_message(completion: Completion) -> dict[str, Any]:
    """The target's answer as a message of the conversation, in the form of `conversations.jsonl`."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["tool_calls"] = [
            {**call, "function": {"name": name, "arguments": arguments}}
            for call, (name, arguments) in zip(
                completion.tool_calls, calls({"tool_calls": completion.tool_calls}), strict=True
            )
        ]
    return message


def agrees(answer: dict[str, Any], recorded: Message) -> bool:
    """Whether an answer makes the calls of the record, or none if it has none, in this order and equal as JSON.

    Gives the answer's calls the recorded ids, which the recorded results refer to.
    """
    expected = calls(recorded)
    actual = calls(answer) or calls_in_text(answer["content"])
    if actual != expected:
        return False
    for call, of_record in zip(answer.get("tool_calls", ()), recorded.get("tool_calls") or (), strict=False):
        if "id" in of_record:
            call["id"] = of_record["id"]
    return True


def as_request(message: Message) -> dict[str, Any]:
    """A message as the server takes it: the arguments of calls are JSON text, and thoughts have vLLM's name."""
    request = dict(message)
    if "reasoning_content" in request:
        request["reasoning"] = request["reasoning_content"]
    if request.get("tool_calls"):
        request["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                **call,
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for index, (call, (name, arguments)) in enumerate(zip(request["tool_calls"], calls(message), strict=True))
        ]
    return request
