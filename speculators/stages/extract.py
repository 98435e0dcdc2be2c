"""extract: tokens -> hidden states. Run the target once over every row, keep what the draft needs.

The server writes the states of a request to a file; they are checked against what was sent, converted to the stored
type and appended to the shard being filled, always in row order. So shards hold the same rows whatever order answers
came in and however often the stage was killed, and a new attempt goes on after the last sealed shard.

A row whose states cannot be used stops the stage, or is left out with its reason: `extract.on_bad_row`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import torch
from datasets import Dataset, load_from_disk

from speculators.data.shards import ShardWriter
from speculators.errors import RunError, StageError
from speculators.job import Job
from speculators.targets import fidelity
from speculators.targets.client import Client, StatesFile
from speculators.targets.states import BadRows, check_states, states_writer


def main(job: Job) -> None:
    """Extract every row of the tokens that no sealed shard has."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    writer = states_writer(job)
    resumed = len(writer.done)
    start = time.monotonic()
    extracted = asyncio.run(_extract(job, tokens, writer))
    writer.close()
    job.digests_written |= writer.digests
    seconds = time.monotonic() - start
    kept = [length for row, length in enumerate(tokens["seq_len"]) if row in writer.done]
    job.record |= {
        "rows": len(kept),
        "resumed": resumed,
        "tokens": sum(kept),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(extracted / seconds, 1),
    }


async def _extract(job: Job, tokens: Dataset, writer: ShardWriter) -> int:
    """Returns the number of tokens that were run through the target."""
    config = job.config.extract
    compute = getattr(torch, job.config.target.dtype.name)
    bad = BadRows(job)
    waiting = [row for row in range(len(tokens)) if row not in writer.done and row not in bad.reasons]
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, done, seen = time.monotonic(), 0, 0
    async with client:
        gate = await fidelity.open_gate(job, client, tokens, writer.done | set(bad.reasons))

        async def work(row: int) -> tuple[int, list[int], StatesFile | RunError]:
            sent = list(tokens[row]["input_ids"])
            try:
                return row, sent, await client.hidden_states(sent, item=f"row {row}", near=tokens[row]["id"])
            except StageError as error:  # about this row: what is about the server is a ServiceError
                return row, sent, error

        def keep(row: int, sent: list[int], file: StatesFile | RunError) -> None:
            try:
                if isinstance(file, RunError):
                    raise file
                token_ids, states = file.take()
                check_states(f"row {row}", sent, token_ids, states, compute)
                writer.add(row, token_ids, states)
            except RunError as error:
                bad.leave_out(row, error, seen)
                gate.leave_out(row)
            else:
                gate.see(row, token_ids, states)

        # Closed before the client is, if a row stops it all: what is in flight then must not outlive its connections.
        async with contextlib.aclosing(client.map_in_order(work, waiting)) as results:
            async for row, sent, file in results:
                seen += 1
                # In a thread: sealing hashes and writes a whole shard, and the server is to get its requests meanwhile.
                await asyncio.to_thread(keep, row, sent, file)
                done += len(sent)
                speed = done / (time.monotonic() - start)
                job.progress(row + 1, len(tokens), "rows", tokens_per_second=round(speed, 1))
    job.record |= {"retried_requests": client.retried, "fidelity": gate.found} | bad.record()
    return done
