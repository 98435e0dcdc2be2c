"""adopt_states: upstream's directory + tokens -> hidden-state shards. Check each file of hidden states and encode it.

A file must have finite hidden states for the tokens of its row, of as many layers as the draft and the loss need, with
the target's hidden size. Files name neither their layers nor their target: the recipe does, and this is not verified.
"""

from __future__ import annotations

from datasets import load_from_disk

from speculators.errors import ContractError
from speculators.features.upstream import hidden_states_path, read_hidden_states
from speculators.features.writer import hidden_states_writer, last_layer_mask
from speculators.job import Job


def main(job: Job) -> None:
    """Convert every row of the tokens in order, except those that an earlier attempt sealed in shards."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    writer = hidden_states_writer(job)
    for number in range(len(tokens)):
        if number not in writer.done:
            row = tokens[number]
            name, _, upstream_row = row["id"].rpartition(":")
            path = hidden_states_path(job.inputs[f"dataset.{name}"], int(upstream_row))
            token_ids, hidden_states = read_hidden_states(path)
            length = len(row["input_ids"])
            if token_ids[:length].tolist() != row["input_ids"]:
                raise ContractError(
                    f"{path} has hidden states of other tokens than those of row {upstream_row} of `{name}`",
                    "the table changed after the files were written: run upstream's `generate-offline-data` again",
                )
            writer.add(number, token_ids[:length], hidden_states[:length], last_layer_mask(job, row["loss_mask"]))
            job.progress(number + 1, len(tokens), "rows")
    writer.close()
    job.digests_written |= writer.digests
    job.record |= {
        "rows": len(tokens),
        "tokens": sum(tokens["seq_len"]),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
        "notes": [f"upstream's files name no layers: assumed to be layers {job.derived['capture_layer_ids']}"],
    }
