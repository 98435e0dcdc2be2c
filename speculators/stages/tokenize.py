"""tokenize: conversations -> token ids and loss masks. One row a conversation where its turns continue each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.data.template import TemplateError, Turn, turns_of
from speculators.data.token_table import give_table
from speculators.errors import SourceError
from speculators.job import Job


@dataclass(slots=True)
class Row:
    """Token ids and, for each, 1 where the target said it and the draft learns from it, else 0."""

    input_ids: list[int]
    loss_mask: list[int]


def main(job: Job) -> None:
    """Write the token table, in the order of the conversations."""
    tally: Counter[str] = Counter()
    hint = "lower tokenize.min_supervised or raise train.sequence_length"
    give_table(job, _rows(job, tally), tally, "conversations", hint)


def _rows(job: Job, tally: Counter[str]) -> Iterator[dict[str, Any]]:
    longest, least = job.config.train.sequence_length, job.config.tokenize.min_supervised
    tokenizer: Any = None
    path = job.inputs["conversations"] / "conversations.jsonl"
    with path.open(encoding="utf-8") as file:
        total = sum(1 for _ in file)
        file.seek(0)
        for line in file:
            conversation = json.loads(line)
            tally["conversations"] += 1
            job.progress(tally["conversations"], total, "conversations")
            if "turns" in conversation:
                turns = [Turn(prompt_ids=t["prompt_ids"], answer_ids=t["answer_ids"]) for t in conversation["turns"]]
            else:
                tokenizer = tokenizer or _tokenizer(job.inputs["target"])
                try:
                    turns = turns_of(tokenizer, conversation["messages"])
                except TemplateError as error:
                    tally[f"dropped conversations: {error}"] += 1
                    continue
            if not turns:
                tally["dropped conversations: no answer"] += 1
            for whole in merge(turns):
                row = cut(whole, longest)
                if len(row.input_ids) < len(whole.input_ids):
                    tally["rows cut to sequence_length"] += 1
                    tally["tokens cut"] += len(whole.input_ids) - len(row.input_ids)
                if sum(row.loss_mask) < least:
                    tally["dropped rows: fewer supervised tokens than min_supervised"] += 1
                    continue
                tally["rows"] += 1
                tally["tokens"] += len(row.input_ids)
                tally["supervised tokens"] += sum(row.loss_mask)
                yield {
                    "input_ids": row.input_ids,
                    "loss_mask": row.loss_mask,
                    "seq_len": len(row.input_ids),
                    "id": conversation["id"],
                    "source": conversation["source"],
                }


def merge(turns: list[Turn]) -> list[Row]:
    """One row for turns that each start with the whole of the one before, a new row where that breaks.

    It breaks where a template rewrites the past (drops what was thought, say) or an answer is tokenised
    differently as part of a prompt. A row then starts over with the whole prompt, and every answer is supervised once.
    """
    rows: list[Row] = []
    for turn in turns:
        last = rows[-1] if rows else None
        if last and turn.prompt_ids[: len(last.input_ids)] == last.input_ids:
            between = turn.prompt_ids[len(last.input_ids) :]
            last.input_ids += between + turn.answer_ids
            last.loss_mask += [0] * len(between) + [1] * len(turn.answer_ids)
        else:
            mask = [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)
            rows.append(Row([*turn.prompt_ids, *turn.answer_ids], mask))
    return rows


def cut(row: Row, longest: int) -> Row:
    """The first `longest` tokens."""
    return Row(row.input_ids[:longest], row.loss_mask[:longest])


def _tokenizer(target: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    if not tokenizer.chat_template:
        raise SourceError(
            f"the tokenizer in {target} has no chat template, which conversations with their own answers need",
            "take an instruction-tuned target, or put a chat_template.jinja beside its weights",
        )
    return tokenizer
