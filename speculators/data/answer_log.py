"""Answered conversations of this attempt at `regenerate`, and of earlier artifacts and attempts that it may use."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from speculators.answers import ANSWER_LOG, BAD_STATES, ROWS, AnsweredRow, read_rows, row_line
from speculators.data.conversations import ConversationRow
from speculators.features.reuse import EarlierHiddenStates
from speculators.features.shards import ShardWriter
from speculators.job import ReusableRows
from speculators.timeouts import SYNC_SECONDS

OF_THE_LOG = ("index", "dropped", "why", "reused", "prefilled")
"""Fields of a line in `answers.jsonl` that are not published: index in the input, reason for missing answers, whether
the answers are those of `EarlierAnswers`, and whether their hidden states were computed apart."""


class AnswerLog:
    """The finished conversations of this attempt and of those before, in `answers.jsonl` with its index `rows.jsonl`.

    `digests` are those of all conversations. A conversation that ends before unusable hidden states is not finished,
    and so requested again, unless its row is among `sealed`, those in complete shards.
    """

    def __init__(self, directory: Path, digests: Sequence[str], sealed: set[int]) -> None:
        log, index = directory / ANSWER_LOG, directory / ROWS
        lines = read_answers(log)
        last = {answered["index"]: answered for answered in lines}
        self.finished = {i: a for i, a in last.items() if a["dropped"] != BAD_STATES or i in sealed}
        """By index in the input."""
        self._digests = digests
        self._lines = len(lines)
        self._synced = 0.0
        # Written again: a killed attempt may have appended to one file only.
        temporary = index.with_suffix(".new")
        temporary.write_text("".join(row_line(self._row(a, n)) for n, a in enumerate(lines)), encoding="utf-8")
        os.replace(temporary, index)
        self._log: TextIO = log.open("a", encoding="utf-8")
        self._index: TextIO = index.open("a", encoding="utf-8")

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._log.fileno())
        self._log.close()
        self._index.close()

    def append(self, answered: dict[str, Any]) -> None:
        """Append a finished conversation; it is on the disk after at most `SYNC_SECONDS`."""
        self._log.write(json.dumps(answered, ensure_ascii=False) + "\n")
        self._log.flush()
        self._index.write(row_line(self._row(answered, self._lines)))
        self._index.flush()
        self._lines += 1
        self.finished[answered["index"]] = answered
        now = time.monotonic()
        if now - self._synced >= SYNC_SECONDS:
            os.fsync(self._log.fileno())
            self._synced = now

    def _row(self, answered: dict[str, Any], line: int) -> AnsweredRow:
        kept_line = line if answered["turns"] else None
        return AnsweredRow(digest=self._digests[answered["index"]], dropped=answered["dropped"], line=kept_line)


def read_answers(log: Path) -> list[dict[str, Any]]:
    """Read the conversations that earlier attempts finished; of several lines of one conversation the last one counts.

    An incomplete last line, which a killed attempt left, is removed so that the next append starts a new line.
    """
    if not log.exists():
        return []
    data = log.read_bytes()
    complete_bytes = data.rfind(b"\n") + 1
    if complete_bytes < len(data):
        os.truncate(log, complete_bytes)
    return [json.loads(line) for line in data[:complete_bytes].splitlines()]


@dataclass(frozen=True, slots=True)
class StoredHiddenStates:
    """A row of an earlier artifact's hidden states."""

    shards: EarlierHiddenStates
    row: int


class EarlierAnswers:
    """The conversations with these digests that the request's `reuse` has: their answers, and their hidden states."""

    def __init__(self, reuse: Iterable[ReusableRows], digests: set[str], writer: ShardWriter | None) -> None:
        self.answers: dict[str, dict[str, Any]] = {}
        """By digest: `messages`, `turns` and `dropped` of the answered conversation."""
        self.hidden_states: dict[str, StoredHiddenStates] = {}
        """By digest, for conversations whose answers are those in `answers`."""
        for rows in reuse:
            if rows.conversations is None:
                continue
            shards = None
            if writer and rows.hidden_states and rows.hidden_states.is_dir():
                shards = EarlierHiddenStates(rows.hidden_states, writer.contract)
            index = [row for row in read_rows(rows.conversations.parent) if row.dropped != BAD_STATES]
            missing = [row for row in index if row.digest in digests and row.digest not in self.answers]
            lines = {row.line: row for row in missing if row.line is not None}
            for row in missing:
                if row.line is None:
                    self.answers[row.digest] = {"messages": [], "turns": [], "dropped": row.dropped}
            for number, conversation in read_lines(rows.conversations, lines.keys()):
                self._add(lines[number], conversation, shards)

    def _add(self, row: AnsweredRow, conversation: ConversationRow, shards: EarlierHiddenStates | None) -> None:
        turns = [{name: value for name, value in turn.items() if name != "states"} for turn in conversation["turns"]]
        self.answers[row.digest] = {"messages": conversation["messages"], "turns": turns, "dropped": row.dropped}
        stored = [turn["states"] for turn in conversation["turns"] if "states" in turn]
        if shards is not None and stored:
            self.hidden_states[row.digest] = StoredHiddenStates(shards, stored[0][0])


def read_lines(conversations: Path, numbers: Iterable[int]) -> Iterator[tuple[int, ConversationRow]]:
    """Read the lines with these numbers, as (number, conversation); a missing file or an incomplete line ends it."""
    remaining = set(numbers)
    try:
        with conversations.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number in remaining:
                    yield number, json.loads(line)
    except (OSError, ValueError):
        return
