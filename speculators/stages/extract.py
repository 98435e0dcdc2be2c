"""extract: tokens -> hidden states. Run the target once over every row, keep what the draft needs.

The server writes the hidden states of each request to a file. This stage checks them against the tokens of the request,
converts them to the stored dtype and appends them to the current shard in row order, in whatever order the answers
arrive. So shards are the same however often the stage was killed, and a new attempt resumes after the last sealed one.

A row whose tokens an earlier artifact of the same layers and format has (`Job.reuse`) is copied.

A row with unusable hidden states stops the stage, or is skipped and its reason recorded: `extract.on_bad_row`.

With `extract.workers` > 1, each worker is a stage that extracts a range of rows, and one more stage joins their shards.
The row lengths determine where shards end, so each worker gets the rows of consecutive complete shards, and the joined
files are identical to those of a single worker. Only if rows are skipped may shards end elsewhere, with the same rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from speculators.engine.client import Client
from speculators.engine.transfer import Transfer
from speculators.errors import ContractError, RunError, StageError
from speculators.features.contract import check_contract
from speculators.features.reuse import EarlierHiddenStates, token_digest
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
"""File next to the shards of a part, with its record."""
ADDED = ("rows", "resumed", "reused", "tokens", "tokens_per_second", "retried_requests")
"""Fields of a record that are summed over the parts."""


def main(job: Job) -> None:
    """Extract all rows or one worker's part of them, or join the parts, depending on the inputs."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    parts = [job.inputs[name] for name in sorted(job.inputs) if name.startswith("part.")]
    if parts:
        join(job, tokens, parts)
    elif "part" in job.derived:
        extract(job, tokens, rows_of_part(tokens["seq_len"], job.config.extract.shard_tokens, *job.derived["part"]))
        write_json(job.output / RECORD, job.record)
    else:
        extract(job, tokens, range(len(tokens)))


def extract(job: Job, tokens: Dataset, rows: range) -> None:
    """Extract the given rows, except those in sealed shards."""
    writer = hidden_states_writer(job)
    resumed = len(writer.done)
    start = time.monotonic()
    tokens_extracted = asyncio.run(_run(job, tokens, rows, writer))
    writer.close()
    job.digests_written |= writer.digests
    elapsed_seconds = time.monotonic() - start
    kept_lengths = [length for row, length in enumerate(tokens["seq_len"]) if row in writer.done]
    job.record |= {
        "rows": len(kept_lengths),
        "resumed": resumed,
        "tokens": sum(kept_lengths),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
        "seconds": round(elapsed_seconds, 1),
        "tokens_per_second": round(tokens_extracted / elapsed_seconds, 1),
    }


async def _run(job: Job, tokens: Dataset, rows: range, writer: ShardWriter) -> int:
    """Request the rows' hidden states and write them; returns the number of tokens that the target processed."""
    config = job.config.extract
    compute_dtype = getattr(torch, job.config.target.dtype.name)
    bad_rows = BadRows(job)
    waiting = [row for row in rows if row not in writer.done and row not in bad_rows.reasons]
    sampled = {row: [position] for row, position in fidelity_check.sample_positions(tokens["seq_len"])}
    copied = find_copies(job, tokens, waiting, sampled, writer)
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, tokens_done, rows_seen = time.monotonic(), 0, 0
    async with client:
        done = {*writer.done, *bad_rows.reasons, *copied}
        check = await fidelity_check.start_early_check(job, client, tokens, done, rows)

        async def request(row: int) -> tuple[int, list[int], Transfer | RunError | None]:
            input_ids, key = list(tokens[row]["input_ids"]), tokens[row]["id"]
            if row in copied:
                return row, input_ids, None
            try:
                return row, input_ids, await client.hidden_states(input_ids, item=f"row {row}", affinity_key=key)
            except StageError as error:  # only this row failed: a failure of the server is a ServiceError
                return row, input_ids, error

        def write(row: int, input_ids: list[int], transfer: Transfer | RunError | None) -> None:
            if transfer is None:
                shards, stored = copied[row]
                last_mask = last_layer_mask(job, tokens[row]["loss_mask"], sampled.get(row, ()))
                writer.add_encoded(row, *shards.read(stored, input_ids, last_mask), last_mask)
                return
            try:
                if isinstance(transfer, RunError):
                    raise transfer
                token_ids, hidden_states = transfer.load()
                check_hidden_states(f"row {row}", input_ids, token_ids, hidden_states, compute_dtype)
                last_mask = last_layer_mask(job, tokens[row]["loss_mask"], sampled.get(row, ()))
                writer.add(row, token_ids, hidden_states, last_mask)
            except RunError as error:
                bad_rows.skip(row, error, rows_seen)
                check.skip(row)
            else:
                check.add(row, token_ids, hidden_states)

        # Closed before the client is, also if a row stops the stage: requests must not outlive its connections.
        async with contextlib.aclosing(client.map_in_order(request, waiting)) as results:
            async for row, input_ids, transfer in results:
                rows_seen += 1
                # In a thread, so that requests continue while the writer hashes and writes a shard to seal it.
                await asyncio.to_thread(write, row, input_ids, transfer)
                tokens_done += len(input_ids) if transfer is not None else 0
                tokens_per_second = round(tokens_done / (time.monotonic() - start), 1)
                job.progress(row + 1 - rows.start, len(rows), "rows", tokens_per_second=tokens_per_second)
    counts = {"reused": len(copied), "retried_requests": client.retried}
    job.record |= {**counts, "fidelity": check.result} | bad_rows.record()
    return tokens_done


def find_copies(
    job: Job, tokens: Dataset, rows: Sequence[int], sampled: Mapping[int, list[int]], writer: ShardWriter
) -> dict[int, tuple[EarlierHiddenStates, int]]:
    """Rows that earlier artifacts have, with the last layer wherever it is kept, as row -> (artifact, row there).

    `sampled` are further positions at which a row's last layer is kept.
    """
    copies: dict[int, tuple[EarlierHiddenStates, int]] = {}
    for earlier in job.reuse:
        if earlier.hidden_states is None or not earlier.hidden_states.is_dir():
            continue
        shards = EarlierHiddenStates(earlier.hidden_states, writer.contract)
        stored_rows = shards.rows()
        for row in rows:
            stored = stored_rows.get(token_digest(torch.tensor(tokens[row]["input_ids"])))
            mask = last_layer_mask(job, tokens[row]["loss_mask"], sampled.get(row, ()))
            if row not in copies and stored is not None and shards.covers(stored, mask):
                copies[row] = shards, stored
    return copies


def rows_of_part(lengths: Sequence[int], shard_tokens: int, part: int, parts: int) -> range:
    """The rows of worker `part` of `parts`: those of consecutive shards, whose number differs by at most one."""
    starts, filled = [], 0
    for row, length in enumerate(lengths):
        if filled == 0:
            starts.append(row)
        filled = (filled + length) if filled + length < shard_tokens else 0
    edges = [*starts, len(lengths)]
    return range(edges[len(starts) * part // parts], edges[len(starts) * (part + 1) // parts])


def join(job: Job, tokens: Dataset, parts: Sequence[Path]) -> None:
    """Link the shards of the parts in order, as one worker would have written them, and write their index.

    Raises:
        ContractError: a row is in no part, or a part was extracted under another contract.
    """
    shutil.rmtree(job.output)
    job.output.mkdir()
    contract = hidden_states_contract(job)
    shards: list[dict[str, str]] = []
    spans: dict[int, RowSpan] = {}
    greedy_tokens, skipped = [], dict[int, str]()
    for part in parts:
        index = json.loads((part / INDEX).read_text())
        check_contract(index["contract"], contract)
        first_shard = len(shards)
        for shard in index["shards"]:
            name = shard_name(len(shards))
            link(part / shard["file"], job.output / name)
            shards.append({"file": name, "sha256": shard["sha256"]})
        spans |= {int(row): RowSpan(first_shard + shard, *span) for row, (shard, *span) in index["rows"].items()}
        greedy_tokens += fidelity_check.read_greedy_tokens(part)
        skipped |= read_skipped(part)
    missing_rows = set(range(len(tokens))) - set(spans) - set(skipped)
    if missing_rows:
        raise ContractError(f"no worker has extracted row {min(missing_rows)}", "extract again: force=[extract]")
    write_index(job.output, contract, shards, spans)
    fidelity_check.write_greedy_tokens(job.output, greedy_tokens)
    if skipped:
        write_json(job.output / SKIPPED, {str(row): reason for row, reason in sorted(skipped.items())})
    job.digests_written |= {shard["file"]: shard["sha256"] for shard in shards}
    records = [json.loads((part / RECORD).read_text()) for part in parts]
    job.record |= _joined_record(records) | BadRows(job).record()
    job.record["bytes"] = sum(path.stat().st_size for path in job.output.iterdir())


def _joined_record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum the records of the parts; of the fidelity checks, the counts are summed and the largest values are kept."""
    checks = [record["fidelity"] for record in records if record["fidelity"]]
    values = {key: [check[key] for check in checks if check.get(key) is not None] for check in checks for key in check}
    fidelity = {key: sum(v) if key in ("picks", "agree") else max(v, default=None) for key, v in values.items()}
    return {name: round(sum(record[name] for record in records), 1) for name in ADDED} | {
        "workers": len(records),
        "fidelity": fidelity,
    }
