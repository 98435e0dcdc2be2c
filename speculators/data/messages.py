"""Turns a row of a data file, whatever its form, into chat messages.

The columns of a row are named by the recipe, or found by the names that published datasets use. Messages keep what a
chat template can render: text, reasoning, tool calls and their results; the row keeps tools and template options.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from speculators.config.choices import DataFormat, LeadingAnswer
from speculators.config.schema import Dataset

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Speaker in a data file, in lower case -> role in chat templates."""

MESSAGES = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog", "chat")
PROMPTS = ("prompt", "instruction", "question", "problem", "query", "input")
ANSWERS = ("response", "output", "completion", "solution", "answer")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
IDS = ("id", "uuid", "prompt_id", "question_id", "conversation_id", "task_id", "unique_id")
IMAGES = ("image", "images")
"""Names of columns in published datasets, preferred ones first."""
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


class FunctionCall(TypedDict):
    """The function of a tool call."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call that an assistant message makes."""

    id: NotRequired[str]
    type: str
    """`function`."""
    function: FunctionCall


class Message(TypedDict):
    """One chat turn. An optional key is absent rather than null."""

    role: str
    """`system`, `developer`, `user`, `assistant` or `tool`."""
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class BadRowError(Exception):
    """The row is complete, but is not a conversation; the text is the reason under which it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowForm:
    """Where a row has what: names of columns, None for those that it lacks."""

    format: DataFormat
    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    """Alpaca's `input`, which follows the instruction."""
    answer: str | None = None
    system: str | None = None
    tools: str | None = None
    id: str | None = None


@dataclass(kw_only=True, slots=True)
class RowContent:
    """What a row holds."""

    messages: list[Message]
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tokens: tuple[list[int], list[int]] | None = None
    """Token ids and loss mask of a row that is tokenised already; it has no messages."""


def row_form(row: Mapping[str, Any], spec: Dataset) -> RowForm | None:
    """Find the form of a row, from the recipe's names of columns and its own; None if it has no known one."""

    def column(chosen: str | None, names: Iterable[str]) -> str | None:
        return chosen if chosen is not None else next((name for name in names if row.get(name) is not None), None)

    default = Dataset(source="")
    chosen_prompt = spec.prompt_field if spec.prompt_field != default.prompt_field else None
    chosen_id = spec.id_field if spec.id_field != default.id_field else None
    shared = {
        "system": column(spec.system_field, SYSTEMS),
        "tools": column(spec.tools_field, TOOLS),
        "id": column(chosen_id, IDS),
    }
    if spec.format in (None, DataFormat.tokens) and {"input_ids", "loss_mask"} <= row.keys():
        return RowForm(format=DataFormat.tokens, id=shared["id"])
    conversations = (None, DataFormat.messages, DataFormat.sharegpt)
    if spec.format in conversations and chosen_prompt is None:
        names = [n for n in MESSAGES if isinstance(row.get(n), list) or str(row.get(n)).lstrip().startswith("[")]
        messages = column(spec.messages_field, names or [n for n in MESSAGES if n in row])
        if messages is not None and (messages in row or spec.messages_field):
            return RowForm(format=_speakers(row.get(messages)), messages=messages, **shared)
    if spec.format in (DataFormat.messages, DataFormat.sharegpt, DataFormat.tokens):
        return None
    prompt = column(chosen_prompt, PROMPTS)
    if prompt is None:
        return None
    answer = column(spec.answer_field, ANSWERS) if spec.format is not DataFormat.prompts else None
    alpaca = prompt == "instruction" and spec.format in (None, DataFormat.alpaca)
    detected = DataFormat.alpaca if alpaca else DataFormat.question_answer if answer else DataFormat.prompts
    return RowForm(
        format=spec.format or detected,
        prompt=prompt,
        context="input" if alpaca and isinstance(row.get("input"), str) else None,
        answer=answer if answer != prompt else None,
        **shared,
    )


def _speakers(turns: Any) -> DataFormat:
    first = turns[0] if isinstance(turns, list) and turns else None
    return DataFormat.sharegpt if isinstance(first, Mapping) and "from" in first else DataFormat.messages


def row_content(row: Mapping[str, Any], form: RowForm, spec: Dataset) -> RowContent:
    """Read what a row holds.

    Raises:
        BadRowError: it is not a conversation.
    """
    if form.format is DataFormat.tokens:
        return RowContent(messages=[], tokens=_tokens(row))
    if any(row.get(name) for name in IMAGES):
        raise BadRowError("images")
    turns = _prompted(row, form) if form.messages is None else _decoded(row.get(form.messages), "messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRowError("no messages")
    roles = {**ROLES, **{speaker.lower(): role for speaker, role in spec.roles.items()}}
    messages = [message for turn in turns for message in _message(turn, roles)]
    system = row.get(form.system) if form.system is not None else None
    if isinstance(system, str) and system.strip() and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return RowContent(
        messages=_led_by_user(_with_calls(messages), spec.leading_answer),
        tools=_tools(row.get(form.tools)) if form.tools is not None else None,
        chat_template_kwargs=_template_options(row.get("chat_template_kwargs")),
    )


def _prompted(row: Mapping[str, Any], form: RowForm) -> list[Any]:
    """The turns of a row with a prompt and perhaps an answer, each a text or a list of messages or of texts."""
    prompt, answer = row.get(form.prompt or ""), row.get(form.answer or "")
    if isinstance(prompt, list):
        turns: list[Any] = list(prompt)
    elif isinstance(prompt, str):
        context = str(row.get(form.context)) if form.context is not None else ""
        turns = [{"role": "user", "content": f"{prompt}\n\n{context}" if context.strip() else prompt}]
    else:
        raise BadRowError(f"no text in column {form.prompt}" if form.prompt in row else f"no column {form.prompt}")
    if isinstance(answer, str) and answer.strip():
        turns.append({"role": "assistant", "content": answer})
    elif isinstance(answer, list) and all(isinstance(turn, Mapping) for turn in answer):
        turns += answer
    return turns


def _message(turn: Any, roles: Mapping[str, str]) -> list[Message]:
    """A turn as a message; an empty list for a system message without text. Bare texts are those of the user."""
    if isinstance(turn, str):
        turn = {"role": "user", "content": turn}
    if not isinstance(turn, Mapping):
        raise BadRowError("message is not an object")
    name = turn.get("role", turn.get("from", turn.get("speaker")))
    role = roles.get(str(name).lower())
    if role is None:
        raise BadRowError("unknown role")
    content, reasoning = _text(next((turn[key] for key in ("content", "value", "text") if key in turn), None))
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        reasoning = next((turn[key] for key in REASONING if isinstance(turn.get(key), str) and turn[key]), reasoning)
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
        if calls is None and name == "function_call":
            calls, message["content"] = [_decoded(content, "a tool call")], ""
        if calls:
            message["tool_calls"] = [_call(call) for call in _items(calls)]
    for key in ("tool_call_id", "name") if role == "tool" else ("name",):
        if isinstance(turn.get(key), str) and turn[key]:
            message[key] = turn[key]  # type: ignore[literal-required]
    if not message["content"].strip() and role in ("system", "developer"):
        return []
    if not message["content"].strip() and role == "user":
        raise BadRowError("empty message")
    return [message]


def _text(content: Any) -> tuple[str, str]:
    """Text and reasoning of a message's content: a string, or a list of parts, whose texts are joined as vLLM does."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise BadRowError("message is not text")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind in ("thinking", "reasoning") and isinstance(part.get(kind, text), str):
            thoughts.append(part.get(kind, text))
        elif kind in TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        elif "image" in str(kind):
            raise BadRowError("images")
        else:
            raise BadRowError("message is not text")
    return "\n".join(texts), "\n".join(thoughts)


def _items(calls: Any) -> list[Any]:
    calls = _decoded(calls, "tool calls")
    if not isinstance(calls, list):
        raise BadRowError("tool calls are not a list")
    return calls


def _call(call: Any) -> ToolCall:
    """A tool call, whose arguments are an object, as chat templates need them, and not its text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError("a tool call names no function")
    arguments = _decoded(function.get("arguments") or {}, "the arguments of a tool call")
    if not isinstance(arguments, Mapping):
        raise BadRowError("the arguments of a tool call are no object")
    complete: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if isinstance(call.get("id"), str) and call["id"]:
        complete = {"id": call["id"], **complete}
    return complete


def _with_calls(messages: list[Message]) -> list[Message]:
    """Take the calls out of the text before a tool's result: `<tool_call>{...}</tool_call>`, as Hermes writes them."""
    for message, following in itertools.pairwise(messages):
        if following["role"] != "tool":
            continue
        if result := _RESULT.fullmatch(following["content"]):
            following["content"] = result[1]
        if message["role"] == "assistant" and "tool_calls" not in message:
            calls = _CALL.findall(message["content"])
            if calls:
                message["tool_calls"] = [_call(_decoded(call, "a tool call")) for call in calls]
                message["content"] = _CALL.sub("", message["content"]).strip()
    return messages


def _led_by_user(messages: list[Message], leading: LeadingAnswer) -> list[Message]:
    """Check that a user speaks, and handle what assistant or tool say before."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise BadRowError("no message of a user")
    if leading is LeadingAnswer.keep or all(m["role"] in ("system", "developer") for m in messages[:first]):
        return messages
    if leading is LeadingAnswer.drop:
        raise BadRowError("first turn is not the user's")
    return [m for i, m in enumerate(messages) if i >= first or m["role"] in ("system", "developer")]


def _tools(tools: Any) -> list[Any] | None:
    """The functions that are offered, in OpenAI's form."""
    tools = _decoded(tools, "tools") if tools else None
    if tools is None or tools == []:
        return None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError("tools are not a list of objects")
    return [dict(t) if "function" in t or "name" not in t else {"type": "function", "function": dict(t)} for t in tools]


def _template_options(options: Any) -> dict[str, Any] | None:
    options = _decoded(options, "chat_template_kwargs") if options else None
    return dict(options) if isinstance(options, Mapping) and options else None


def _decoded(value: Any, name: str) -> Any:
    """A value, parsed if it is a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise BadRowError(f"{name}: not JSON") from None
    except RecursionError:
        raise BadRowError("nested too deeply") from None


def _tokens(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    columns = [row.get(name) for name in ("input_ids", "loss_mask")]
    if not columns[0] or not all(map(_integers, columns)):
        raise BadRowError("input_ids or loss_mask are not lists of integers")
    ids, mask = ([int(value) for value in column or []] for column in columns)
    if len(ids) != len(mask) or not {0, 1}.issuperset(mask):
        raise BadRowError("loss_mask is not a 0 or 1 for each of input_ids")
    return ids, mask


def _integers(column: Any) -> bool:
    return isinstance(column, list) and all(isinstance(value, int) and value >= 0 for value in column)
