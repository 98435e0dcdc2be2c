"""tokenize: conversations -> token ids and loss masks. Join turns into one row while each continues the one before."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from speculators.data.answer_text import AnsweredText, AnswerFinder
from speculators.data.chat_template import ChatTemplate, Rendering, TemplateError, load_chat_template
from speculators.data.conversations import ConversationRow
from speculators.data.template import AnswerTokenizer, TokenSequence, merge_turns, stored_turns
from speculators.data.token_table import TableShape, TokenRow, publish_table
from speculators.errors import SourceError
from speculators.job import Job

_CHUNK_BYTES = 1 << 18
"""Conversations that are tokenized at a time, as JSON; a longer one is a chunk of its own."""
_WORTH_PROCESSES = 1 << 22
"""Bytes of conversations from which on processes on all cores take less time than they take to start."""
_MAX_REASONS = 20
"""Different reasons for dropping conversations in the record; further ones are counted together."""

_ANSWERS, _ENDS = "answers", "end-of-turn tokens"
_ENDS_TOLERANCE = 0.05
"""Difference from one end-of-turn token per answer that is noted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenizer:
    """What a process needs to render and tokenize; a process that has it does without torch."""

    template: ChatTemplate
    source: str
    """The tokenizer, as JSON of `tokenizers`."""
    kwargs: dict[str, Any]
    """`target.chat_template_kwargs`."""


@dataclass(slots=True)
class _Chunk:
    """The rows of some conversations, and what was counted."""

    rows: list[tuple[str, str, TokenSequence]]
    """Id and source of a conversation, and a row of it."""
    counts: Counter[str]
    masks: Counter[str]


def main(job: Job) -> None:
    """Write the token table in the order of the conversations."""
    counts: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    shape = TableShape()
    try:
        rows = shape.of(_rows(job, counts, masks))
        publish_table(job, rows, counts, "conversations", lambda: _hint(counts))
    finally:
        if masks:
            job.record["masks"] = dict(sorted(masks.items()))
    job.record |= shape.record()
    if (answers := masks[_ANSWERS]) and abs((per_answer := masks[_ENDS] / answers) - 1) > _ENDS_TOLERANCE:
        job.record["notes"] = [
            f"{per_answer:.2f} end-of-turn tokens are supervised per answer, 1 is expected: see eos_token_id of the "
            "target's generation_config.json, and `masks` of this record"
        ]


def _hint(counts: Counter[str]) -> str:
    """What helps if no row is left."""
    if any(reason.startswith("dropped rows") for reason in counts):
        return "lower tokenize.min_supervised or raise max_seq_len"
    if counts["dropped conversations: no answer"]:
        return "give data with answers, or let the target answer: pipeline=offline"
    return "give data that the target's chat template can render, or another chat_template.jinja next to its weights"


def _rows(job: Job, counts: Counter[str], masks: Counter[str]) -> Iterator[TokenRow]:
    max_seq_len, min_supervised = job.config.max_seq_len, job.config.tokenize.min_supervised
    path = job.inputs["conversations"] / "conversations.jsonl"
    for chunk in _chunks(job, path):
        for reason, number in chunk.counts.items():
            known = reason in counts or len(counts) < _MAX_REASONS
            counts[reason if known else "dropped conversations: the chat template refuses it, for other reasons"] += (
                number
            )
        masks.update(chunk.masks)
        for conversation, source, sequence in chunk.rows:
            row = cut(sequence, max_seq_len)
            if len(row.input_ids) < len(sequence.input_ids):
                counts["rows cut to max_seq_len"] += 1
                counts["tokens cut"] += len(sequence.input_ids) - len(row.input_ids)
            supervised = sum(row.loss_mask)
            if supervised < min_supervised:
                counts["dropped rows: fewer supervised tokens than min_supervised"] += 1
                continue
            counts["rows"] += 1
            counts["tokens"] += len(row.input_ids)
            counts["supervised tokens"] += supervised
            yield {
                "input_ids": row.input_ids,
                "loss_mask": row.loss_mask,
                "seq_len": len(row.input_ids),
                "id": conversation,
                "source": source,
            }


def _chunks(job: Job, path: Path) -> Iterator[_Chunk]:
    """Tokenize the conversations in chunks, on all cores if there are enough of them; in the order of the file."""
    target, kwargs = job.inputs["target"], dict(job.config.target.chat_template_kwargs)
    cores = len(os.sched_getaffinity(0))
    with path.open("rb") as file:
        total = sum(1 for _ in file)
        file.seek(0)
        rendered = not _has_tokens(json.loads(file.readline() or "{}"))
        file.seek(0)
        line_chunks = iter(lambda: file.readlines(_CHUNK_BYTES), [])
        if rendered and cores > 1 and path.stat().st_size >= _WORTH_PROCESSES:
            chunks = _in_processes(line_chunks, target, kwargs, cores)
        else:
            worker = _Worker(target, kwargs)
            chunks = map(worker.chunk, line_chunks)
        done = 0
        for chunk in chunks:
            done += chunk.counts["conversations"]
            job.progress(done, total, "conversations")
            yield chunk


def _in_processes(
    line_chunks: Iterator[Sequence[bytes]], target: Path, kwargs: dict[str, Any], cores: int
) -> Iterator[_Chunk]:
    """Tokenize chunks of the file in processes, as many at a time as there are cores, and a few ahead."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as loader:  # it imports torch, and ends here
        tokenizer = loader.submit(_load_tokenizer, target, kwargs).result()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.utils.chat_template_utils", "tokenizers"])
    with ProcessPoolExecutor(cores, context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        waiting: deque[Future[_Chunk]] = deque(
            pool.submit(_worker_chunk, lines) for lines in islice(line_chunks, 2 * cores)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_worker_chunk, lines) for lines in islice(line_chunks, 1))


class _Worker:
    """Renders and tokenizes conversations; the tokenizer is loaded when the first is not tokenized yet."""

    def __init__(self, target: Path, kwargs: dict[str, Any], loaded: _Tokenizer | None = None) -> None:
        self._target, self._kwargs = target, kwargs
        self._loaded = loaded

    @cached_property
    def _finder(self) -> AnswerFinder:
        return AnswerFinder(self._tokenizer.template)

    @cached_property
    def _answers(self) -> AnswerTokenizer:
        return AnswerTokenizer(self._tokenizer.source, self._tokenizer.template)

    @cached_property
    def _tokenizer(self) -> _Tokenizer:
        return self._loaded or _load_tokenizer(self._target, self._kwargs)

    def chunk(self, lines: Sequence[bytes]) -> _Chunk:
        """Tokenize conversations, given as lines of JSON."""
        chunk = _Chunk([], Counter(), Counter())
        conversations: list[tuple[ConversationRow, Any]] = []
        for line in lines:
            conversation: ConversationRow = json.loads(line)
            chunk.counts["conversations"] += 1
            try:
                rows = _tokens(conversation) if _has_tokens(conversation) else self._texts(conversation)
            except TemplateError as error:
                chunk.counts[f"dropped conversations: {error}"] += 1
                chunk.masks["dropped conversations"] += 1
                continue
            if not rows:
                chunk.counts["dropped conversations: no answer"] += 1
            conversations.append((conversation, rows))
        texts = [rows for conversation, rows in conversations if not _has_tokens(conversation)]
        tokenized = iter(self._answers.rows(texts) if texts else [])
        for conversation, rows in conversations:
            sequences: list[Any] = rows if _has_tokens(conversation) else next(tokenized)
            chunk.rows += [(conversation["id"], conversation["source"], row) for row in sequences]
            if not _has_tokens(conversation):
                chunk.masks[_ANSWERS] += sum(len(text.spans) for text in rows)
                chunk.masks[_ENDS] += sum(self._answers.ends(row) for row in sequences)
        if texts:
            chunk.masks += self._finder.counts
            self._finder.counts.clear()
        return chunk

    def _texts(self, conversation: ConversationRow) -> list[AnsweredText]:
        kwargs = {**self._tokenizer.kwargs, **conversation.get("chat_template_kwargs", {})}
        rendering = Rendering(tools=conversation.get("tools"), kwargs=kwargs)
        return self._finder.texts(conversation["messages"], rendering)


def _has_tokens(conversation: ConversationRow) -> bool:
    return "turns" in conversation or "input_ids" in conversation


def _tokens(conversation: ConversationRow) -> list[TokenSequence]:
    """The rows of a conversation that is token ids already: the target's answers, or the data's own."""
    if "input_ids" in conversation:
        return [TokenSequence(conversation["input_ids"], conversation["loss_mask"])]
    return merge_turns(stored_turns(conversation["turns"]))


_worker: _Worker | None = None
"""The worker of a process of `_in_processes`."""


def _start_worker(tokenizer: _Tokenizer) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
    _worker = _Worker(Path(), {}, tokenizer)


def _worker_chunk(lines: Sequence[bytes]) -> _Chunk:
    assert _worker is not None
    return _worker.chunk(lines)


def cut(row: TokenSequence, max_seq_len: int) -> TokenSequence:
    """The first `max_seq_len` tokens of a row."""
    return TokenSequence(row.input_ids[:max_seq_len], row.loss_mask[:max_seq_len])


def _load_tokenizer(target: Path, kwargs: dict[str, Any]) -> _Tokenizer:
    """Read the target's tokenizer and chat template.

    Raises:
        SourceError: it has no chat template, or no fast tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"{target}: {type(tokenizer).__name__} is no fast tokenizer",
            "add a tokenizer.json to the target: AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it, "
            "where transformers can convert the tokenizer",
        )
    return _Tokenizer(template=load_chat_template(tokenizer, target), source=backend.to_str(), kwargs=kwargs)
