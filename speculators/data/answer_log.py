"""Answered conversations of this attempt at `regenerate`, and of earlier artifacts and attempts that it may use.

The answers lie in files. In memory is of each conversation what decides about it and is counted (`Finished`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

from speculators.answers import ANSWER_LOG, BAD_STATES, ROWS, AnsweredRow, read_rows, row_line
from speculators.data.lines import JsonLines
from speculators.features.reuse import EarlierHiddenStates
from speculators.features.shards import ShardWriter
from speculators.job import ReusableRows
from speculators.timeouts import SYNC_SECONDS

OF_THE_LOG = ("index", "dropped", "why", "faults", "reused", "prefilled")
"""Fields of a line in `answers.jsonl` that are not published: index in the input, reason for missing answers and what
was reported of it, faults of the answers, whether they are those of `EarlierAnswers`, and whether their hidden states
were computed apart."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An answered conversation in the log."""

    offset: int
    """First byte of its line."""
    dropped: str | None
    """Reason for missing answers; None if there are all."""
    why: str
    faults: tuple[str, ...]
    """Faults of its answers (`answer_faults`)."""
    finish_reasons: tuple[str, ...]
    """One for each answer that is kept."""
    answer_tokens: int
    supervised_tokens: int
    has_states: bool
    """Whether this stage has files with the hidden states of its answers."""
    reused: bool
    prefilled: bool

    @property
    def lacks_states(self) -> bool:
        """Whether it has answers, and this stage has no file with their hidden states."""
        return bool(self.finish_reasons) and not self.has_states


def _finished(answered: dict[str, Any], offset: int) -> Finished:
    turns = answered["turns"]
    lengths = [len(turn["answer_ids"]) for turn in turns]
    ranges = (turn.get("supervised", (0, length)) for turn, length in zip(turns, lengths, strict=True))
    return Finished(
        offset=offset,
        dropped=sys.intern(answered["dropped"]) if answered["dropped"] else None,
        why=answered.get("why", ""),
        faults=tuple(map(sys.intern, answered.get("faults", ()))),
        finish_reasons=tuple(sys.intern(turn["finish_reason"]) for turn in turns),
        answer_tokens=sum(lengths),
        supervised_tokens=sum(end - begin for begin, end in ranges),
        has_states=any("states" in turn for turn in turns),
        reused=answered.get("reused", False),
        prefilled=answered.get("prefilled", False),
    )


class AnswerLog:
    """The finished conversations of this attempt and of those before, in `answers.jsonl` with its index `rows.jsonl`.

    `digests` are those of all conversations. A conversation that ends before unusable hidden states is not finished,
    and so requested again, unless its row is among `sealed`, those in complete shards.
    """

    def __init__(self, directory: Path, digests: Sequence[str], sealed: set[int]) -> None:
        log, index = directory / ANSWER_LOG, directory / ROWS
        self.finished: dict[int, Finished] = {}
        """By index in the input."""
        self._digests = digests
        self._lines = 0
        self._synced = 0.0
        # Written again: a killed attempt may have appended to one file only.
        temporary = index.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            for offset, answered in read_answers(log):
                entry = _finished(answered, offset)
                file.write(row_line(self._row(answered["index"], entry)))
                self._lines += 1
                self.finished.pop(answered["index"], None)
                if entry.dropped != BAD_STATES or answered["index"] in sealed:
                    self.finished[answered["index"]] = entry
        os.replace(temporary, index)
        self._log: BinaryIO = log.open("ab")
        self._answers: BinaryIO = log.open("rb")
        self._index: TextIO = index.open("a", encoding="utf-8")

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._log.fileno())
        for file in (self._log, self._answers, self._index):
            file.close()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a finished conversation, by its index in the input."""
        self._answers.seek(self.finished[index].offset)
        answered: dict[str, Any] = json.loads(self._answers.readline())
        return answered

    def append(self, answered: dict[str, Any]) -> None:
        """Append a finished conversation; it is on the disk after at most `SYNC_SECONDS`."""
        entry = _finished(answered, self._log.seek(0, os.SEEK_END))
        self._log.write(json.dumps(answered, ensure_ascii=False).encode() + b"\n")
        self._log.flush()
        self._index.write(row_line(self._row(answered["index"], entry)))
        self._index.flush()
        self._lines += 1
        self.finished[answered["index"]] = entry
        now = time.monotonic()
        if now - self._synced >= SYNC_SECONDS:
            os.fsync(self._log.fileno())
            self._synced = now

    def _row(self, index: int, entry: Finished) -> AnsweredRow:
        line = self._lines if entry.finish_reasons else None
        return AnsweredRow(digest=self._digests[index], dropped=entry.dropped, line=line, why=entry.why)


def read_answers(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the conversations that earlier attempts finished, with the offsets of their lines; of several lines of one
    conversation the last one counts.

    An incomplete last line, which a killed attempt left, is removed so that the next append starts a new line.
    """
    if not log.exists():
        return
    offset = 0
    with log.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                os.truncate(log, offset)
                return
            yield offset, json.loads(line)
            offset += len(line)


@dataclass(frozen=True, slots=True)
class StoredHiddenStates:
    """A row of an earlier artifact's hidden states."""

    shards: EarlierHiddenStates
    row: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A conversation of an earlier artifact or attempt."""

    row: AnsweredRow
    file: Path
    shards: EarlierHiddenStates | None


class EarlierAnswers:
    """The conversations with these digests that the request's `reuse` has: their answers, and their hidden states."""

    def __init__(self, reuse: Iterable[ReusableRows], digests: set[str], writer: ShardWriter | None) -> None:
        self._stored: dict[str, _Stored] = {}
        self._files: dict[Path, JsonLines] = {}
        self._open = ExitStack()
        for rows in reuse:
            if rows.conversations is None:
                continue
            shards = None
            if writer and rows.hidden_states and rows.hidden_states.is_dir():
                shards = EarlierHiddenStates(rows.hidden_states, writer.contract)
            for row in read_rows(rows.conversations.parent):
                if row.dropped != BAD_STATES and row.digest in digests:
                    self._stored.setdefault(row.digest, _Stored(row, rows.conversations, shards))

    def __enter__(self) -> EarlierAnswers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __contains__(self, digest: str) -> bool:
        return digest in self._stored

    def may_have_states(self, digest: str) -> bool:
        """Whether the conversation is in an artifact with hidden states that fit."""
        return digest in self._stored and self._stored[digest].shards is not None

    def read(self, digest: str) -> tuple[dict[str, Any], StoredHiddenStates | None] | None:
        """Read `messages`, `turns` and `dropped` of a conversation, and where its hidden states are; None if the file
        is gone or damaged."""
        stored = self._stored[digest]
        why = {"why": stored.row.why} if stored.row.why else {}
        if stored.row.line is None:
            return {"messages": [], "turns": [], "dropped": stored.row.dropped, **why}, None
        try:
            if stored.file not in self._files:
                self._files[stored.file] = self._open.enter_context(JsonLines(stored.file))
            conversation = self._files[stored.file][stored.row.line]
        except (OSError, ValueError, IndexError):
            return None
        turns = [{name: value for name, value in turn.items() if name != "states"} for turn in conversation["turns"]]
        answered = {"messages": conversation["messages"], "turns": turns, "dropped": stored.row.dropped, **why}
        slices = [turn["states"] for turn in conversation["turns"] if "states" in turn]
        if stored.shards is None or not slices:
            return answered, None
        return answered, StoredHiddenStates(stored.shards, slices[0][0])
