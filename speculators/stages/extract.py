"""extract: tokens -> hidden states. Run the target once over every row, keep what the draft needs.

The server writes the states of a request to a file; they are checked against what was sent, converted to the stored
type and appended to the shard being filled, always in row order. So shards hold the same rows whatever order answers
came in and however often the stage was killed, and a new attempt goes on after the last sealed shard.

A row whose states cannot be used stops the stage, or is left out with its reason: `extract.on_bad_row`.

With `extract.workers` there are several such stages, each with a part of the rows, and this one joins what they made.
Several workers share a table by its shards: where a shard ends is known from the lengths of the rows, so each gets the
rows of some whole shards that follow each other. What they made, put one after the other, is file by file what one
worker would have made; only where rows are left out do shards end elsewhere, with the same rows in them all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from speculators.engine.client import Client
from speculators.engine.transfer import Transfer
from speculators.errors import ContractError, RunError, StageError
from speculators.features.contract import check_contract
from speculators.features.shards import INDEX, RowSpan, ShardWriter, link, shard_name, write_index
from speculators.features.writer import (
    SKIPPED,
    BadRows,
    check_hidden_states,
    hidden_states_contract,
    hidden_states_writer,
    last_layer_mask,
    read_skipped,
)
from speculators.job import Job, write_json
from speculators.targets import fidelity_check

RECORD = "record.json"
"""What a part says about itself, beside its shards."""
ADDED = ("rows", "resumed", "tokens", "tokens_per_second", "retried_requests")
"""What the records of parts add up to."""


def main(job: Job) -> None:
    """Extract every row of the tokens, or one worker's part of them, or join such parts."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    parts = [job.inputs[name] for name in sorted(job.inputs) if name.startswith("part.")]
    if parts:
        join(job, tokens, parts)
    elif "part" in job.derived:
        extract_part(job, tokens, *job.derived["part"])
    else:
        extract(job, tokens, range(len(tokens)))


def extract(job: Job, tokens: Dataset, rows: range) -> None:
    """Extract these rows, but for those in sealed shards."""
    writer = hidden_states_writer(job)
    resumed = len(writer.done)
    start = time.monotonic()
    extracted = asyncio.run(_run(job, tokens, rows, writer))
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


async def _run(job: Job, tokens: Dataset, rows: range, writer: ShardWriter) -> int:
    """Returns the number of tokens that were run through the target."""
    config = job.config.extract
    compute = getattr(torch, job.config.target.dtype.name)
    bad = BadRows(job)
    waiting = [row for row in rows if row not in writer.done and row not in bad.reasons]
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, done, seen = time.monotonic(), 0, 0
    async with client:
        check = await fidelity_check.start_early_check(job, client, tokens, writer.done | set(bad.reasons), rows)
        asked = {row: [position] for row, position in fidelity_check.sample_positions(tokens["seq_len"])}

        async def work(row: int) -> tuple[int, list[int], Transfer | RunError]:
            sent = list(tokens[row]["input_ids"])
            try:
                return row, sent, await client.hidden_states(sent, item=f"row {row}", affinity_key=tokens[row]["id"])
            except StageError as error:  # about this row: what is about the server is a ServiceError
                return row, sent, error

        def keep(row: int, sent: list[int], file: Transfer | RunError) -> None:
            try:
                if isinstance(file, RunError):
                    raise file
                token_ids, states = file.load()
                check_hidden_states(f"row {row}", sent, token_ids, states, compute)
                writer.add(row, token_ids, states, last_layer_mask(job, tokens[row]["loss_mask"], asked.get(row, ())))
            except RunError as error:
                bad.skip(row, error, seen)
                check.skip(row)
            else:
                check.add(row, token_ids, states)

        # Closed before the client is, if a row stops it all: what is in flight then must not outlive its connections.
        async with contextlib.aclosing(client.map_in_order(work, waiting)) as results:
            async for row, sent, file in results:
                seen += 1
                # In a thread: sealing hashes and writes a whole shard, and the server is to get its requests meanwhile.
                await asyncio.to_thread(keep, row, sent, file)
                done += len(sent)
                speed = done / (time.monotonic() - start)
                job.progress(row + 1 - rows.start, len(rows), "rows", tokens_per_second=round(speed, 1))
    job.record |= {"retried_requests": client.retried, "fidelity": check.result} | bad.record()
    return done


def part_of(lengths: Sequence[int], shard_tokens: int, part: int, parts: int) -> range:
    """The rows of one of `parts` workers: those of whole shards, as many as the others' or one more or less."""
    starts, filled = [], 0
    for row, length in enumerate(lengths):
        if filled == 0:
            starts.append(row)
        filled = (filled + length) if filled + length < shard_tokens else 0
    edges = [*starts, len(lengths)]
    return range(edges[len(starts) * part // parts], edges[len(starts) * (part + 1) // parts])


def extract_part(job: Job, tokens: Dataset, part: int, parts: int) -> None:
    """Extract what is one worker's."""
    extract(job, tokens, part_of(tokens["seq_len"], job.config.extract.shard_tokens, part, parts))
    write_json(job.output / RECORD, job.record)


def join(job: Job, tokens: Dataset, parts: Sequence[Path]) -> None:
    """Put what the workers made one after the other, as one worker would have made it.

    Raises:
        ContractError: the parts are not the whole, or not of one kind.
    """
    shutil.rmtree(job.output)
    job.output.mkdir()
    wanted = hidden_states_contract(job)
    shards: list[dict[str, str]] = []
    spans: dict[int, RowSpan] = {}
    picks, skipped = [], dict[int, str]()
    for part in parts:
        index = json.loads((part / INDEX).read_text())
        check_contract(index["contract"], wanted)
        before = len(shards)
        for shard in index["shards"]:
            name = shard_name(len(shards))
            link(part / shard["file"], job.output / name)
            shards.append({"file": name, "sha256": shard["sha256"]})
        spans |= {int(row): RowSpan(before + shard, *where) for row, (shard, *where) in index["rows"].items()}
        picks += fidelity_check.read_greedy_tokens(part)
        skipped |= read_skipped(part)
    missing = set(range(len(tokens))) - set(spans) - set(skipped)
    if missing:
        raise ContractError(f"no worker has extracted row {min(missing)}", "extract again: force=[extract]")
    write_index(job.output, wanted, shards, spans)
    fidelity_check.write_greedy_tokens(job.output, picks)
    if skipped:
        write_json(job.output / SKIPPED, {str(row): reason for row, reason in sorted(skipped.items())})
    job.digests_written |= {shard["file"]: shard["sha256"] for shard in shards}
    records = [json.loads((part / RECORD).read_text()) for part in parts]
    job.record |= _joined(records) | BadRows(job).record()
    job.record["bytes"] = sum(path.stat().st_size for path in job.output.iterdir())


def _joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record out of those of the parts, which worked at the same time, or one after the other."""
    found = [record["fidelity"] for record in records if record["fidelity"]]
    told = {key: [each[key] for each in found if each.get(key) is not None] for each in found for key in each}
    gate = {key: sum(v) if key in ("picks", "agree") else max(v, default=None) for key, v in told.items()}
    return {name: round(sum(record[name] for record in records), 1) for name in ADDED} | {
        "workers": len(records),
        "fidelity": gate,
    }
