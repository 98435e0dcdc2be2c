"""The identity of an answered conversation, by which later runs find its answers, and `rows.jsonl`, an index of these.

What the target answers depends on the target, the engine, the sampling options and the conversation: its messages, the
tools that it offers and its own variables of the chat template. The first three are equal for all rows of an artifact,
and the runner compares them (`runner.planning.reuse`). The fourth is compared by its digest, `row_digest`. `rows.jsonl`
lists the digests of a file of conversations, so that the runner need not read long answers to know which rows it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ANSWER_LOG = "answers.jsonl"
"""Name of the file of conversations in the scratch directory of an attempt; an artifact has `conversations.jsonl`."""
ROWS = "rows.jsonl"
"""Name of the index, in the directory of the conversations."""
BAD_STATES = "bad_states"
"""`AnsweredRow.dropped` of a conversation that was cut before an answer whose hidden states are unusable. Such a row is
always requested again."""

PROMPT_FIELDS = ("tools", "chat_template_kwargs")
"""Optional fields of a conversation that the chat template renders with the messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredRow:
    """A line of `rows.jsonl`: a conversation that the target has answered, or that was dropped."""

    digest: str
    """`row_digest` of the conversation before it was answered."""
    dropped: str | None
    """Why answers are missing; None if none is."""
    line: int | None
    """Number of the line, from 0, of the file of conversations; None if no answer was kept."""
    why: str = ""
    """What the server or a check reports of a conversation that is dropped for it."""


def row_digest(conversation: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of what the target is sent of a line of `conversations.jsonl`: messages, `PROMPT_FIELDS`."""
    request: Any = conversation["messages"]
    if fields := {name: conversation[name] for name in PROMPT_FIELDS if conversation.get(name)}:
        request = {"messages": request, **fields}
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def row_line(row: AnsweredRow) -> str:
    """The line of `rows.jsonl` for a row, with its line break."""
    fields = asdict(row)
    return json.dumps(fields if row.why else {name: fields[name] for name in fields if name != "why"}) + "\n"


def read_rows(directory: Path) -> Iterator[AnsweredRow]:
    """Read the index of a directory; nothing if it has none. A line that is cut off, by a killed stage, ends it."""
    try:
        with (directory / ROWS).open(encoding="utf-8") as lines:
            for line in lines:
                yield AnsweredRow(**json.loads(line))
    except (OSError, ValueError, TypeError):
        return
