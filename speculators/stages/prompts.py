"""prompts: data sets -> conversations to answer. Filter, split off the evaluation hold-out, sample, keep user turns."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator

from speculators.data.conversations import (
    Conversation,
    ConversationRow,
    RowCounts,
    counts_record,
    data_file,
    in_evaluation_holdout,
    usable,
)
from speculators.job import Job


def main(job: Job) -> None:
    """Write `conversations.jsonl`, one sampled conversation a line, ordered by the digest of seed and id."""
    options = job.config.prompts
    tallies: dict[str, RowCounts] = {}
    candidates = _candidates(job, tallies)

    def order(conversation: Conversation) -> bytes:
        # A digest rather than a shuffle: one more row in a file then replaces one conversation instead of all.
        return hashlib.sha256(f"{options.seed}/{conversation.id}".encode()).digest()

    if options.num_conversations is None:
        sampled = sorted(candidates, key=order)
    else:
        sampled = heapq.nsmallest(options.num_conversations, candidates, key=order)
    job.record |= {"datasets": counts_record(tallies), "asked": options.num_conversations, "kept": len(sampled)}
    job.record["notes"] = [note for name, tally in tallies.items() if (note := tally.note(name))]
    job.record["kept_by_dataset"] = {name: sum(c.dataset == name for c in sampled) for name in tallies}
    if not sampled:
        name, tally = max(tallies.items(), key=lambda pair: pair[1].rows)
        raise tally.why_unusable(name)
    with (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for conversation in sampled:
            file.write(json.dumps(_line(job, conversation), ensure_ascii=False) + "\n")
    job.progress(len(sampled), len(sampled), "conversations")


def _candidates(job: Job, tallies: dict[str, RowCounts]) -> Iterator[Conversation]:
    """Every usable conversation outside the evaluation hold-out, data sets sorted by name, not in recipe order."""
    seen: set[bytes] = set()
    for name, spec in sorted(job.config.data.items()):
        tally = tallies[name] = RowCounts()
        path = data_file(job.inputs[f"dataset.{name}"])
        for conversation in usable(path, name, spec, tally, seen):
            if in_evaluation_holdout(conversation.first, job.config.prompts.eval_holdout_ratio):
                tally.dropped["held out for evaluation"] += 1
            else:
                yield conversation


def _line(job: Job, conversation: Conversation) -> ConversationRow:
    """A system message, if there is one, and the first `prompts.max_turns` user messages."""
    messages = conversation.with_instruction(job.config.data[conversation.dataset].instruction)
    system = [m for m in messages if m["role"] == "system"]
    questions = [m for m in messages if m["role"] == "user"][: job.config.prompts.max_turns]
    return {"id": conversation.id, "source": conversation.dataset, "messages": system + questions}
