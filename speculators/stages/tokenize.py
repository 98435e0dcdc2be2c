"""tokenize: conversations -> token ids and loss masks. Join turns into one row while each continues the one before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators.data.conversations import ConversationRow
from speculators.data.template import ChatTurn, TemplateError, TokenSequence, chat_turns, merge_turns
from speculators.data.token_table import TokenRow, publish_table
from speculators.errors import SourceError
from speculators.job import Job


def main(job: Job) -> None:
    """Write the token table in the order of the conversations."""
    tally: Counter[str] = Counter()
    hint = "lower tokenize.min_supervised or raise max_seq_len"
    publish_table(job, _rows(job, tally), tally, "conversations", hint)


def _rows(job: Job, tally: Counter[str]) -> Iterator[TokenRow]:
    max_seq_len, min_supervised = job.config.max_seq_len, job.config.tokenize.min_supervised
    tokenizer: Any = None
    path = job.inputs["conversations"] / "conversations.jsonl"
    with path.open(encoding="utf-8") as file:
        total = sum(1 for _ in file)
        file.seek(0)
        for line in file:
            conversation: ConversationRow = json.loads(line)
            tally["conversations"] += 1
            job.progress(tally["conversations"], total, "conversations")
            if "turns" in conversation:
                turns = [
                    ChatTurn(prompt_ids=t["prompt_ids"], answer_ids=t["answer_ids"]) for t in conversation["turns"]
                ]
            else:
                tokenizer = tokenizer or _tokenizer(job.inputs["target"])
                try:
                    turns = chat_turns(tokenizer, conversation["messages"])
                except TemplateError as error:
                    tally[f"dropped conversations: {error}"] += 1
                    continue
            if not turns:
                tally["dropped conversations: no answer"] += 1
            for sequence in merge_turns(turns):
                row = cut(sequence, max_seq_len)
                if len(row.input_ids) < len(sequence.input_ids):
                    tally["rows cut to max_seq_len"] += 1
                    tally["tokens cut"] += len(sequence.input_ids) - len(row.input_ids)
                if sum(row.loss_mask) < min_supervised:
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


def cut(row: TokenSequence, max_seq_len: int) -> TokenSequence:
    """The first `max_seq_len` tokens of a row."""
    return TokenSequence(row.input_ids[:max_seq_len], row.loss_mask[:max_seq_len])


def _tokenizer(target: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    if not tokenizer.chat_template:
        raise SourceError(
            f"the tokenizer in {target} has no chat template, which is needed for conversations that have answers",
            "use an instruction-tuned target, or add a chat_template.jinja to the directory of its weights",
        )
    return tokenizer
