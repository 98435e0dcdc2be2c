"""prompts: data sets -> conversations to answer. Filter, split off the evaluation hold-out, sample, keep user turns.

If `tokenize` takes them as they are (pipeline `off_policy`), they keep the data's own answers.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import IO

from speculators.data.conversations import (
    ConversationRow,
    Message,
    RowCounts,
    counts_record,
    in_evaluation_holdout,
    usable,
)
from speculators.job import Job

_OFFSET = 8
"""Bytes of a position in the spool file."""


def main(job: Job) -> None:
    """Write `conversations.jsonl`, one sampled conversation a line, ordered by the digest of seed and id."""
    options = job.config.prompts
    tallies: dict[str, RowCounts] = {}
    with (job.scratch / "spool.jsonl").open("w+b") as spool:
        positions = _spooled(job, tallies, spool)
        job.record |= {"datasets": counts_record(tallies), "asked": options.num_conversations, "kept": len(positions)}
        job.record["notes"] = [note for name, tally in tallies.items() for note in tally.notes(name)]
        if not positions:
            name, tally = max(tallies.items(), key=lambda pair: pair[1].rows)
            raise tally.why_unusable(name, job.config.data[name])
        kept: Counter[str] = Counter()
        with (job.output / "conversations.jsonl").open("wb") as file:
            for count, position in enumerate(positions, 1):
                spool.seek(int.from_bytes(position[-_OFFSET:], "big"))
                source, line = spool.readline().split(b"\t", 1)
                kept[json.loads(source)] += 1
                file.write(line)
                job.progress(count, len(positions), "conversations")
    job.record["kept_by_dataset"] = {name: kept[name] for name in tallies}
    (job.scratch / "spool.jsonl").unlink()


def _spooled(job: Job, tallies: dict[str, RowCounts], spool: IO[bytes]) -> list[bytes]:
    """Write the lines of the sample, and some that later ones replace, to a file; returns their digests, each with the
    offset of its line, in order.

    A million conversations take 80 MB of memory in this way, whatever their length.
    """
    count, seed, offset = job.config.prompts.num_conversations, job.config.prompts.seed, 0
    # Heaps of negative digests: the first one is replaced by a smaller digest.
    largest: dict[str, list[tuple[int, int]]] = {name: [] for name in job.config.data}
    positions: list[bytes] = []
    for row in _candidates(job, tallies):
        # A digest rather than a shuffle: one more row in a file then replaces one conversation instead of all.
        digest = hashlib.sha256(f"{seed}/{row['id']}".encode()).digest()
        cap, heap = job.config.data[row["source"]].num_conversations, largest[row["source"]]
        limit = min((number for number in (cap, count) if number is not None), default=None)
        if limit is None:
            positions.append(digest + offset.to_bytes(_OFFSET, "big"))
        elif len(heap) < limit:
            heapq.heappush(heap, (-int.from_bytes(digest, "big"), offset))
        elif -heap[0][0] > int.from_bytes(digest, "big"):
            heapq.heapreplace(heap, (-int.from_bytes(digest, "big"), offset))
        else:
            continue
        line = f"{json.dumps(row['source'])}\t{json.dumps(row, ensure_ascii=False)}\n".encode()
        spool.write(line)
        offset += len(line)
    kept = itertools.chain.from_iterable(largest.values())
    positions += [(-digest).to_bytes(32, "big") + begin.to_bytes(_OFFSET, "big") for digest, begin in kept]
    return sorted(positions)[:count]


def _candidates(job: Job, tallies: dict[str, RowCounts]) -> Iterator[ConversationRow]:
    """Every usable conversation outside the evaluation hold-out, data sets sorted by name, not in recipe order."""
    answers = bool(job.derived.get("keeps_answers"))
    seen: set[bytes] = set()
    for name, spec in sorted(job.config.data.items()):
        tally = tallies[name] = RowCounts()
        for conversation in usable(job.inputs[f"dataset.{name}"], name, spec, tally, seen, answers=answers):
            if in_evaluation_holdout(conversation.prompt, job.config.prompts.eval_holdout_ratio):
                tally.dropped["held out for evaluation"] += 1
                continue
            messages = _first_turns(conversation.with_instruction(spec.instruction), job.config.prompts.max_turns)
            messages = _up_to_last_answer(messages) if answers else _without_answers(messages)
            if messages or conversation.content.tokens is not None:
                yield conversation.row(messages)
            else:
                tally.dropped["no answer"] += 1


def _first_turns(messages: list[Message], max_turns: int | None) -> list[Message]:
    """The messages before user turn `max_turns` + 1; consecutive messages of a user are one turn."""
    turns = 0
    for i, message in enumerate(messages):
        turns += message["role"] == "user" and (i == 0 or messages[i - 1]["role"] != "user")
        if max_turns is not None and turns > max_turns:
            return messages[:i]
    return messages


def _without_answers(messages: list[Message]) -> list[Message]:
    """What the target gets: the messages without answers, except those before the first message of a user.

    A conversation with tools keeps the recorded calls with their results; it ends at a result without a call. Several
    messages of a user in a row are joined to one, with an empty line between.
    """
    kept: list[Message] = []
    last = ""
    for message in messages:
        role, begun = message["role"], any(m["role"] == "user" for m in kept)
        calls = kept and (kept[-1]["role"] == "tool" or "tool_calls" in kept[-1])
        if role == "tool" and not calls and begun:
            break
        if role == "user" and last == "user":
            kept[-1] = {**kept[-1], "content": f"{kept[-1]['content']}\n\n{message['content']}"}
        elif role != "assistant" or "tool_calls" in message or not begun:
            kept.append(message)
        last = role
    while kept[-1]["role"] in ("system", "developer"):
        kept.pop()
    return kept


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last answer, and before the first one that is empty; none if a user gets no answer."""
    end, begun = 0, False
    for i, message in enumerate(messages):
        begun |= message["role"] == "user"
        if message["role"] == "assistant" and begun:
            if not (message["content"].strip() or "tool_calls" in message or "reasoning_content" in message):
                break
            end = i + 1
    return messages[:end]
