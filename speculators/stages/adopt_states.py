"""adopt_states: a directory of upstream's + tokens -> hidden-state shards. Each file is checked before it is kept.

A file has to hold the states of its row's tokens, finite, of as many layers as the draft and its teacher need and of
the target's width. Of which layers and of which target it does not say: that is what the recipe claims.
"""

from __future__ import annotations

from datasets import load_from_disk

from speculators.errors import ContractError
from speculators.features.upstream import hidden_states_path, read_hidden_states
from speculators.features.writer import hidden_states_writer, last_layer_mask
from speculators.job import Job


def main(job: Job) -> None:
    """Every row of the tokens, in order, but for those that an earlier attempt sealed."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    writer = hidden_states_writer(job)
    for number in range(len(tokens)):
        if number not in writer.done:
            row = tokens[number]
            name, _, upstream = row["id"].rpartition(":")
            path = hidden_states_path(job.inputs[f"dataset.{name}"], int(upstream))
            token_ids, states = read_hidden_states(path)
            length = len(row["input_ids"])
            if token_ids[:length].tolist() != row["input_ids"]:
                raise ContractError(
                    f"{path} holds the states of other tokens than row {upstream} of the table beside it",
                    "the files were made from another table, or rows were added to it: make them again",
                )
            writer.add(number, token_ids[:length], states[:length], last_layer_mask(job, row["loss_mask"]))
            job.progress(number + 1, len(tokens), "rows")
    writer.close()
    job.digests_written |= writer.digests
    job.record |= {
        "rows": len(tokens),
        "tokens": sum(tokens["seq_len"]),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
        "notes": [f"upstream's files do not say what they are of: taken for layers {job.derived['capture_layer_ids']}"],
    }
