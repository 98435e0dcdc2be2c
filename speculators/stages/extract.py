"""extract: tokens -> hidden states. Run the target once over every row, keep what the draft needs.

The server writes the states of a request to a file; they are checked against what was sent, converted to the stored
type and appended to the shard being filled, always in row order. So shards hold the same rows whatever order answers
came in and however often the stage was killed, and a new attempt goes on after the last sealed shard.

A row whose states cannot be used stops the stage, or is left out with its reason: `extract.on_bad_row`.

With `extract.workers` there are several such stages, each with a part of the rows, and this one joins what they made.
"""

from __future__ import annotations

from datasets import load_from_disk

from speculators.job import Job
from speculators.targets import extraction


def main(job: Job) -> None:
    """Extract every row of the tokens, or one worker's part of them, or join such parts."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    parts = [job.inputs[name] for name in sorted(job.inputs) if name.startswith("part.")]
    if parts:
        extraction.join(job, tokens, parts)
    elif "part" in job.derived:
        extraction.extract_part(job, tokens, *job.derived["part"])
    else:
        extraction.extract(job, tokens, range(len(tokens)))
