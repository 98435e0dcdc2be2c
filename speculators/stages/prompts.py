"""prompts: data sets -> conversations to answer. Filter, hold out, draw, keep the user's turns."""

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
from speculators.errors import SourceError
from speculators.job import Job


def main(job: Job) -> None:
    """Write `conversations.jsonl`, one conversation a line, in the order in which they were drawn."""
    options = job.config.prompts
    tallies: dict[str, RowCounts] = {}
    candidates = _candidates(job, tallies)

    def order(conversation: Conversation) -> bytes:
        # By digest and not by a shuffle, so that a row more in a file displaces one conversation and not all.
        return hashlib.sha256(f"{options.seed}/{conversation.id}".encode()).digest()

    if options.num_conversations is None:
        drawn = sorted(candidates, key=order)
    else:
        drawn = heapq.nsmallest(options.num_conversations, candidates, key=order)
    job.record |= {"datasets": counts_record(tallies), "asked": options.num_conversations, "kept": len(drawn)}
    job.record["notes"] = [note for name, tally in tallies.items() if (note := tally.note(name))]
    job.record["kept_by_dataset"] = {name: sum(c.dataset == name for c in drawn) for name in tallies}
    if not drawn:
        raise SourceError(
            f"no conversation is left of {sum(t.rows for t in tallies.values())}: {job.record['datasets']}",
            "loosen min_chars, max_chars or ascii_only of the data sets",
        )
    with (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for conversation in drawn:
            file.write(json.dumps(_line(job, conversation), ensure_ascii=False) + "\n")
    job.progress(len(drawn), len(drawn), "conversations")


def _candidates(job: Job, tallies: dict[str, RowCounts]) -> Iterator[Conversation]:
    """Every usable conversation that is not held out. Sets go by name: their order in a recipe means nothing."""
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
    asked = [m for m in messages if m["role"] == "user"][: job.config.prompts.max_turns]
    return {"id": conversation.id, "source": conversation.dataset, "messages": system + asked}
