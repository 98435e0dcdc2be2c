"""adopt_tokens: a directory of upstream's -> token ids and loss masks. One row a conversation, as upstream fans it out.

Rows without a file of states are left out, and so are rows that another one begins with: what they supervise is
supervised there (see `features.upstream`). A row's id says which of upstream's rows it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import load_from_disk

from speculators.data.token_table import TokenRow, publish_table
from speculators.features.upstream import hidden_states_path, histories
from speculators.job import Job


def main(job: Job) -> None:
    """Write the token table, the data sets by name and each one's rows in its own order."""
    tally: Counter[str] = Counter()
    hint = "make the states with upstream's `generate-offline-data`, into hidden_states/ beside the rows"
    publish_table(job, _rows(job, tally), tally, "upstream rows", hint)


def _rows(job: Job, tally: Counter[str]) -> Iterator[TokenRow]:
    longest, least = job.config.max_seq_len, job.config.tokenize.min_supervised
    for name in sorted(job.config.data):
        directory = job.inputs[f"dataset.{name}"]
        # Whatever it hands out, tensors for upstream's trainer, say: Python's lists are wanted here.
        table: Any = load_from_disk(str(directory)).with_format(None)
        rows = [row for row in range(len(table)) if hidden_states_path(directory, row).is_file()]
        ids, masks = (list(table.select(rows)[column]) for column in ("input_ids", "loss_mask"))
        joined = histories(ids, masks)
        tally["upstream rows"] += len(table)
        tally["dropped rows: no states"] += len(table) - len(rows)
        tally["joined rows: another begins with them"] += len(rows) - len(joined)
        for place, whole in joined.items():
            mask = whole[:longest]
            if sum(mask) < least:
                tally["dropped rows: fewer supervised tokens than min_supervised"] += 1
                continue
            tally["rows"] += 1
            tally["tokens"] += len(mask)
            tally["supervised tokens"] += sum(mask)
            yield {
                "input_ids": ids[place][:longest],
                "loss_mask": mask,
                "seq_len": len(mask),
                "id": f"{name}:{rows[place]}",
                "source": name,
            }
