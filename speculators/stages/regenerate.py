"""regenerate: conversations -> conversations answered by the target. Keep the server's own token ids of each turn.

A draft learns to predict the target's output, so the target writes every assistant turn (`engine.answering`). The turns
of a conversation are answered in order, many conversations at the same time. Each finished conversation is appended to
`scratch/answers.jsonl`; a new attempt resumes with those that are not in it. A conversation that the server refuses is
a line of `errors.jsonl`, with the reason.

A conversation that was answered before, in an artifact or an attempt that the request names (`Job.reuse`), is not
answered again: it is found by the digest of its messages, which `rows.jsonl` lists (see `speculators.answers`). That
goes for conversations that were dropped, too.

If another stage reads the hidden states of the answers (pipeline `fused`), the server exports those of each turn in the
same forward pass, for the prompt and all answer tokens but the last, which is never an input. Each turn's file stays in
scratch/ until every conversation is answered; then the shards in `states/` get one row a conversation, and `states` of
a turn gives its row, offset and length there. A turn that is the beginning of the next one's prompt has none, so that
the history of a conversation is stored once. An answer with unusable hidden states stops the stage or ends its
conversation before that answer: `extract.on_bad_row`. Hidden states of earlier answers are copied from the artifact
that has them. If it has other layers or another format, the target prefills prompt and answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from speculators.answers import BAD_STATES, ROWS, AnsweredRow, row_digest, row_line
from speculators.data.answer_faults import CUT, EMPTY, LOOPING
from speculators.data.answer_log import OF_THE_LOG, AnswerLog, EarlierAnswers, Finished, StoredHiddenStates
from speculators.data.conversations import ConversationRow
from speculators.data.lines import JsonLines
from speculators.engine.answering import REFUSED, answer, judged, prefill
from speculators.engine.client import Client
from speculators.engine.turn_states import TurnFiles, copy_turns, read_turn_files, sequences, set_slices, turn_files
from speculators.errors import StageError
from speculators.features.shards import ShardWriter
from speculators.features.writer import ANSWER_STATES, hidden_states_writer, refuse_too_many
from speculators.job import Job
from speculators.tokenizer_files import end_tokens

SAMPLED = 16
"""Number of conversations whose answers include greedy tokens, for the fidelity check of their hidden states."""
ERRORS = "errors.jsonl"
"""Conversations that the server refuses: id, source, reason."""
MAX_REFUSED, MAX_REFUSED_RATIO = 4, 0.1
"""Conversations that may be refused: this number, plus this share of those that were seen."""
NOTED = {CUT: 0.1, LOOPING: 0.01, EMPTY: 0.01}
"""Share of the answers with a fault above which the terminal says so."""
ADVICE = {
    CUT: "are cut: regenerate.max_tokens=MORE, or regenerate.on_cut=end, which ends conversations there",
    LOOPING: "end in an exact loop: regenerate.on_loop=mask trains on none of the repetition",
    EMPTY: "are empty: does the chat template, or a reasoning that it opens, end the prompt?",
}


def main(job: Job) -> None:
    """Answer the conversations in any order, and write them in the order of the input."""
    with JsonLines(job.inputs["prompts"] / "conversations.jsonl") as conversations:
        keys, digests = [], []
        for conversation in conversations:
            keys.append(system_key(conversation))
            digests.append(row_digest(conversation))
        writer = hidden_states_writer(job, "prompts", ANSWER_STATES) if _keeps_hidden_states(job) else None
        sealed = writer.done if writer else set()
        start = time.monotonic()
        with AnswerLog(job.scratch, digests, sealed) as log:
            job.record["resumed"] = len(log.finished)
            unsealed = [index for index in range(len(conversations)) if index not in sealed]
            copied = _take_earlier(job, conversations, digests, unsealed, log, writer)
            without_states = {i for i in unsealed if writer and i in log.finished and log.finished[i].lacks_states}
            missing = (i for i in range(len(conversations)) if i not in log.finished)
            waiting = [*sorted(without_states - copied.keys()), *in_order(keys, missing)]
            if waiting:
                asyncio.run(_request_all(job, conversations, log, waiting))
            elapsed_seconds = time.monotonic() - start
            finished = [log.finished[index] for index in range(len(conversations))]
            if not any(entry.finish_reasons for entry in finished):
                raise StageError(
                    f"none of {len(conversations)} conversations was answered: {_reasons(finished)}",
                    "raise `max_seq_len`, or choose other prompts",
                )
            if writer:
                _write_hidden_states(job, log, writer, copied)
            _publish(job, log, digests)
    _record(job, finished)
    job.record["seconds"] = round(elapsed_seconds, 1)


def _take_earlier(
    job: Job,
    conversations: JsonLines,
    digests: Sequence[str],
    unsealed: Sequence[int],
    log: AnswerLog,
    writer: ShardWriter | None,
) -> dict[int, StoredHiddenStates]:
    """Append answers of earlier artifacts and attempts to the log; returns where their hidden states are, by row."""
    copied: dict[int, StoredHiddenStates] = {}
    ends, rules = _end_tokens(job), job.config.regenerate
    with EarlierAnswers(job.reuse, {digests[index] for index in unsealed}, writer) as earlier:
        for i in unsealed:
            # Answers and hidden states are of one artifact, also if an earlier attempt had the answers of another one.
            states_only = i in log.finished and log.finished[i].lacks_states and earlier.may_have_states(digests[i])
            if digests[i] not in earlier or (i in log.finished and not states_only):
                continue
            if (stored := earlier.read(digests[i])) is None:
                continue
            answered, hidden_states = stored
            if i not in log.finished or hidden_states is not None:
                log.append(judged({"index": i, **conversations[i], **answered, "reused": True}, rules, ends))
            if writer and hidden_states is not None:
                copied[i] = hidden_states
    return copied


def _publish(job: Job, log: AnswerLog, digests: Sequence[str]) -> None:
    """Write the answered conversations in the order of the input, the index of all, and those that were refused."""
    refused, number = [], 0
    with (
        (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file,
        (job.output / ROWS).open("w", encoding="utf-8") as rows,
    ):
        for index, digest in enumerate(digests):
            entry = log.finished[index]
            line = number if entry.finish_reasons else None
            if line is not None or entry.dropped == REFUSED:
                answered = log[index]
                if entry.dropped == REFUSED:
                    refused.append({"id": answered["id"], "source": answered["source"], "reason": entry.why})
            if line is not None:
                if _keeps_hidden_states(job):
                    set_slices(answered["turns"], index)
                published = {key: value for key, value in answered.items() if key not in OF_THE_LOG}
                file.write(json.dumps(published, ensure_ascii=False) + "\n")
                number += 1
            rows.write(row_line(AnsweredRow(digest=digest, dropped=entry.dropped, line=line, why=entry.why)))
    if refused:
        text = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in refused)
        (job.output / ERRORS).write_text(text, encoding="utf-8")


def _record(job: Job, finished: Sequence[Finished]) -> None:
    """Counts for the artifact's record: `conversations` = `kept_whole` + `kept_in_part` + `dropped`."""
    kept = [entry for entry in finished if entry.finish_reasons]
    reused = sum(entry.reused for entry in finished)
    faults = Counter(fault for entry in finished for fault in entry.faults)
    turns = sum(len(entry.finish_reasons) for entry in kept)
    job.record |= {
        "conversations": len(finished),
        "kept": len(kept),
        "kept_whole": sum(entry.dropped is None for entry in kept),
        "kept_in_part": _reasons(kept),
        "dropped": _reasons(entry for entry in finished if not entry.finish_reasons),
        "reused": reused,
        "answered": len(finished) - reused,
        "prefilled": sum(entry.prefilled for entry in finished),
        "turns": turns,
        "answer_tokens": sum(entry.answer_tokens for entry in kept),
        "supervised_tokens": sum(entry.supervised_tokens for entry in kept),
        "finish_reasons": dict(Counter(reason for entry in kept for reason in entry.finish_reasons)),
        "faults": dict(faults),
    }
    notes = [
        f"{faults[fault]} of {turns} answers {ADVICE[fault]}"
        for fault, share in NOTED.items()
        if faults[fault] > share * turns
    ]
    if refused := [entry.why for entry in finished if entry.dropped == REFUSED]:
        notes.append(f"the server refuses {len(refused)} conversations ({ERRORS}): {refused[0]}")
    if bad := [entry.why for entry in finished if entry.dropped == BAD_STATES]:
        notes.append(f"{len(bad)} conversations end before an answer whose hidden states cannot be used: {bad[0]}")
    if notes:
        job.record["notes"] = notes


def _reasons(entries: Iterable[Finished]) -> dict[str, int]:
    """Number of conversations with missing answers, by reason."""
    return dict(Counter(entry.dropped for entry in entries if entry.dropped))


async def _request_all(job: Job, conversations: JsonLines, log: AnswerLog, waiting: Sequence[int]) -> None:
    """Request what is missing: the answers of conversations, and the hidden states of answers without them."""
    config = job.config.regenerate
    if "target" not in job.services:
        raise StageError(
            f"{len(waiting)} of {len(conversations)} rows are no longer in the store", "run the same command again"
        )
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, tokens, done = time.monotonic(), 0, len(conversations) - len(waiting)
    only_states = {index for index in waiting if index in log.finished}
    dropped = Counter(entry.dropped for entry in log.finished.values() if entry.dropped)
    # The first ones that this attempt requests, too: its server may be another one than that of earlier rows.
    sampled = {*range(SAMPLED), *sorted(waiting)[:SAMPLED]}
    ends = _end_tokens(job)

    async def work(index: int) -> dict[str, Any]:
        files = TurnFiles(job, index, sampled=index in sampled) if _keeps_hidden_states(job) else None
        if index in only_states:
            assert files is not None
            return await prefill(client, log[index], files)
        answered = await answer(client, conversations[index], job.config, files, ends, job.inputs.get("target"))
        return judged({"index": index, **answered}, config, ends)

    async with client:
        async for answered in client.map(work, waiting):
            log.append(answered)
            if answered["index"] not in only_states:
                tokens += log.finished[answered["index"]].answer_tokens
            dropped[answered["dropped"]] += 1
            _refuse_too_many(answered, dropped[answered["dropped"]], len(log.finished))
            done += 1
            tokens_per_second = round(tokens / (time.monotonic() - start), 1)
            job.progress(done, len(conversations), "conversations", tokens_per_second=tokens_per_second)
    job.record["retried_requests"] = client.retried
    if not only_states:
        job.record["tokens_per_second"] = round(tokens / (time.monotonic() - start), 1)


def _refuse_too_many(answered: dict[str, Any], count: int, seen: int) -> None:
    """Raise StageError where `count` of those seen were dropped as this one, too many for them to be the cause."""
    if answered["dropped"] == BAD_STATES:
        refuse_too_many(count, answered["why"], "answers", seen)
    elif answered["dropped"] == REFUSED and count > MAX_REFUSED + MAX_REFUSED_RATIO * seen:
        raise StageError(
            f"the server refuses {count} of {seen} conversations; the last: {answered['why']}",
            "choose data that the target's chat template accepts, or another target",
        )


def _end_tokens(job: Job) -> frozenset[int]:
    return frozenset(end_tokens(job.inputs["target"])) if "target" in job.inputs else frozenset()


def _keeps_hidden_states(job: Job) -> bool:
    return "capture_layer_ids" in job.derived


def _kept(log: AnswerLog) -> Iterator[dict[str, Any]]:
    """The conversations with answers, in the order of the input."""
    return (log[index] for index in sorted(log.finished) if log.finished[index].finish_reasons)


def _write_hidden_states(job: Job, log: AnswerLog, writer: ShardWriter, copied: dict[int, StoredHiddenStates]) -> None:
    """Write the hidden states of the kept turns into shards, except rows that an earlier attempt sealed.

    `copied` are those of earlier artifacts, by row; the others are files of this stage.
    """
    unsealed: dict[int, list[Path]] = {}
    total = sum(bool(entry.finish_reasons) for entry in log.finished.values())
    for number, answered in enumerate(_kept(log)):
        row = answered["index"]
        if row not in writer.done:
            rows, files = sequences(answered["turns"]), turn_files(job, answered["turns"])
            unsealed[row] = files
            if row in copied:
                writer.add_encoded(row, *copy_turns(job, copied[row], rows))
            else:
                writer.add_encoded(row, *read_turn_files(job, files, rows))
        for sealed_row in unsealed.keys() & writer.done:
            for file in unsealed.pop(sealed_row):
                file.unlink()
        job.progress(number + 1, total, "conversations")
    writer.close()
    job.digests_written |= {f"{ANSWER_STATES}/{name}": digest for name, digest in writer.digests.items()}


def system_key(conversation: ConversationRow) -> tuple[str, str]:
    """A key by which conversations with one system prompt follow each other: how it begins, and its digest."""
    first = next(iter(conversation["messages"]), None)
    text = first["content"] if first is not None and first["role"] == "system" else ""
    return text[:32], hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16] if text else ""


def in_order(keys: Sequence[tuple[str, str]], waiting: Iterable[int]) -> list[int]:
    """Sort the waiting conversations by system prompt, so that the server's prefix cache has it for the next one."""
    return sorted(waiting, key=lambda index: (keys[index], index))
