"""adopt_tokens: upstream's directory -> token ids and loss masks. Join upstream's rows of one conversation into one.

Rows without a file of hidden states are dropped, and so are rows that are the beginning of a longer one, which then
supervises their positions too (see `features.upstream`). The id of a row is `DATASET:N`, where N is upstream's row.
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
    """Write the token table: the data sets sorted by name, the rows of each in upstream's order."""
    tally: Counter[str] = Counter()
    hint = "write hidden_states/ in the same directory with upstream's `generate-offline-data`"
    publish_table(job, _rows(job, tally), tally, "upstream rows", lambda: hint)


def _rows(job: Job, tally: Counter[str]) -> Iterator[TokenRow]:
    max_seq_len, min_supervised = job.config.max_seq_len, job.config.tokenize.min_supervised
    for name in sorted(job.config.data):
        directory = job.inputs[f"dataset.{name}"]
        # The table may be saved with a torch format, for upstream's trainer; without a format its rows are lists.
        table: Any = load_from_disk(str(directory)).with_format(None)
        rows = [row for row in range(len(table)) if hidden_states_path(directory, row).is_file()]
        ids, masks = (list(table.select(rows)[column]) for column in ("input_ids", "loss_mask"))
        joined = histories(ids, masks)
        tally["upstream rows"] += len(table)
        tally["dropped rows: no states"] += len(table) - len(rows)
        tally["joined rows: another begins with them"] += len(rows) - len(joined)
        for index, joined_mask in joined.items():
            mask = joined_mask[:max_seq_len]
            if sum(mask) < min_supervised:
                tally["dropped rows: fewer supervised tokens than min_supervised"] += 1
                continue
            tally["rows"] += 1
            tally["tokens"] += len(mask)
            tally["supervised tokens"] += sum(mask)
            yield {
                "input_ids": ids[index][:max_seq_len],
                "loss_mask": mask,
                "seq_len": len(mask),
                "id": f"{name}:{rows[index]}",
                "source": name,
            }
