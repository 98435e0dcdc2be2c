"""evaluate: a speculator -> acceptance, speed, losslessness. Compares the engine with the draft to the one without."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speculators.config.choices import Dtype
from speculators.data.conversations import Conversation, Message, RowCounts, data_file, in_evaluation_holdout, usable
from speculators.engine.client import Client, Completion
from speculators.engine.metrics import DraftCounters, read_counters
from speculators.errors import SourceError, StageError
from speculators.evaluation.lossless import TOLERANCE, compare_answers
from speculators.job import Job, file_name, write_json

SIDES = ("baseline", "speculative")
COUNTS = ("prompts", "tokens", "identical", "ties", "faults")
"""Counts of a comparison of answers, which are summed over datasets."""
WARM_UP_TOKENS = 8
BLOCK = 4
"""Prompts per request in flight that one server answers before the servers alternate."""
LOSSLESS_CONCURRENCY = 8
"""Requests in flight on each side of the float32 pair, which is not timed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that both servers answer."""

    id: str
    messages: list[Message]


def main(job: Job) -> None:
    """Run the measurements of this phase's servers; in the last phase, write `evaluation.json` and `DATASET.jsonl`.

    Each number of speculative tokens takes a phase of its own, on one work directory, since a server proposes one
    number. So does the comparison in float32 of a target that does not compute in it.
    """
    prompts: dict[str, list[Prompt]] = {}
    tallies: dict[str, RowCounts] = {}
    for name in job.config.evaluate.datasets:
        tallies[name] = RowCounts()
        prompts[name] = choose(job, name, tallies[name])
    asyncio.run(_work(job, prompts))
    if job.derived["phase"] == job.derived["phases"] - 1:
        _publish(job, prompts, tallies)


def choose(job: Job, name: str, tally: RowCounts) -> list[Prompt]:
    """The first prompts of a dataset by digest of their id; of training data, only those of the evaluation hold-out."""
    options = job.config.evaluate
    spec = options.datasets[name]
    trained = name in job.config.data

    def candidates() -> Any:
        for row in usable(data_file(job.inputs[f"dataset.{name}"]), name, spec, tally, set()):
            if trained and not in_evaluation_holdout(row.first, job.config.prompts.eval_holdout_ratio):
                tally.dropped["trained on"] += 1
            else:
                yield row

    def order(row: Conversation) -> bytes:
        return hashlib.sha256(row.id.encode()).digest()

    rows = heapq.nsmallest(options.num_prompts, candidates(), key=order)
    if not rows:
        raise SourceError(
            f"no usable prompt in `{name}`: {tally.record()}",
            f"lower min_chars, raise max_chars or unset ascii_only of `{name}`, or raise prompts.eval_holdout_ratio",
        )
    return [Prompt(row.id, _question(row.with_instruction(spec.instruction))) for row in rows]


def _question(messages: list[Message]) -> list[Message]:
    """The messages up to and including the first user message."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[: first + 1]


async def _work(job: Job, prompts: dict[str, list[Prompt]]) -> None:
    options = job.config.evaluate
    if "baseline" in job.services:
        tokens = job.services["speculative"].num_speculative_tokens
        for name in options.datasets:
            for concurrency in options.concurrency:
                path = _measured(job, name, tokens, concurrency)
                if not path.exists():
                    write_json(path, await _measure(job, name, prompts[name], tokens, concurrency))
    pair = lossless_pair(job)
    if pair is None or pair[0] not in job.services:
        return
    for name in options.datasets:
        path = _compared(job, name, job.services[pair[1]].num_speculative_tokens)
        if not path.exists():
            write_json(path, await _compare(job, name, prompts[name][: options.lossless_prompts], pair))


def lossless_pair(job: Job) -> tuple[str, str] | None:
    """The two services whose answers are compared; None if the recipe requests no comparison."""
    if not job.config.evaluate.lossless_prompts:
        return None
    if job.config.target.dtype is Dtype.float32:
        return "baseline", "speculative"
    return "baseline_float32", "speculative_float32"


def _measured(job: Job, name: str, tokens: int, concurrency: int) -> Path:
    """File of the measurement with so many speculative tokens and requests in flight."""
    return job.scratch / f"measured-{file_name(name)}-{tokens}-{concurrency}.json"


def _compared(job: Job, name: str, tokens: int) -> Path:
    """File of the comparison with so many speculative tokens."""
    return job.scratch / f"lossless-{file_name(name)}-{tokens}.json"


def _client(job: Job, service: str, concurrency: int, retries: int) -> Client:
    timeout = job.config.evaluate.timeout
    return Client(job.services[service], concurrency=concurrency, retries=retries, timeout=timeout)


async def _measure(job: Job, name: str, prompts: list[Prompt], tokens: int, concurrency: int) -> dict[str, Any]:
    """Time both servers on the same prompts; return {"summary", "records"}.

    `tokens`: number that the draft proposes in one step.
    """
    setting = {"num_speculative_tokens": tokens, "concurrency": concurrency}
    async with AsyncExitStack() as stack:
        # No retries: the server would count a repeated request twice.
        clients = {side: await stack.enter_async_context(_client(job, side, concurrency, retries=0)) for side in SIDES}
        for client in clients.values():
            await _ask(job, client, prompts[0], f"warm-up for {name} at {concurrency}", WARM_UP_TOKENS)
        before = await read_counters(job.services["speculative"])
        records = [{"id": prompt.id, **setting} for prompt in prompts]
        if concurrency == 1:
            seconds = await _in_turn(job, name, prompts, clients, records)
        else:
            seconds = await _at_once(job, name, prompts, clients, records)
        counted = await read_counters(job.services["speculative"]) - before
    if not counted.drafts:
        raise StageError(
            f"the speculative server proposed nothing in {len(prompts)} answers of {name}",
            f"see its log: {job.services['speculative'].log}",
        )
    return {"summary": {**setting, **summarise(records, seconds, counted, tokens)}, "records": records}


async def _in_turn(
    job: Job, name: str, prompts: list[Prompt], clients: dict[str, Client], records: list[dict[str, Any]]
) -> dict[str, float]:
    """Fill `records` with one request at a time, alternating servers so that a slow period affects both equally."""
    for i, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            answer = await _ask(job, clients[side], prompt, f"{prompt.id} one at a time")
            _keep(record, side, answer)
        job.progress(i + 1, len(prompts), f"prompts of {name}", concurrency=1)
    return {side: sum(record[side]["seconds"] for record in records) for side in SIDES}


async def _at_once(
    job: Job, name: str, prompts: list[Prompt], clients: dict[str, Client], records: list[dict[str, Any]]
) -> dict[str, float]:
    """Fill `records` with as many requests in flight as the client allows, alternating servers block by block.

    So a slow period affects both servers equally. Fewer requests are in flight at the end of a block; blocks are long
    enough that this has little weight, and it is the same for both servers.
    """
    seconds = dict.fromkeys(SIDES, 0.0)
    done = 0

    async def one(i: int, side: str) -> None:
        client = clients[side]
        answer = await _ask(job, client, prompts[i], f"{prompts[i].id}, {client.concurrency} at a time")
        _keep(records[i], side, answer)

    concurrency = clients[SIDES[0]].concurrency
    size = BLOCK * concurrency
    for number, begin in enumerate(range(0, len(prompts), size)):
        block = range(begin, min(begin + size, len(prompts)))
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            start = time.perf_counter()
            async for _ in clients[side].map(partial(one, side=side), block):
                done += 1
                job.progress(done, 2 * len(prompts), f"answers of {name}", concurrency=concurrency, server=side)
            seconds[side] += time.perf_counter() - start
    return seconds


async def _ask(
    job: Job, client: Client, prompt: Prompt, item: str, max_tokens: int = 0, temperature: float | None = None
) -> Completion:
    options = job.config.evaluate
    return await client.chat(
        prompt.messages,
        item=item,
        max_tokens=max_tokens or options.max_tokens,
        temperature=options.temperature if temperature is None else temperature,
        # A prefix cache, which an external server may have, must not speed up any answer.
        cache_salt=uuid.uuid4().hex,
    )


def _keep(record: dict[str, Any], side: str, answer: Completion) -> None:
    record["prompt_ids"] = answer.prompt_ids
    record[side] = {
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "seconds": answer.seconds,
    }


def summarise(
    records: Sequence[dict[str, Any]], seconds: dict[str, float], counted: DraftCounters, positions: int
) -> dict[str, Any]:
    """Compute acceptance, speed and speed-up of one measurement.

    Args:
        records: per prompt, for each side `token_ids` and `seconds`.
        seconds: side -> wall time of all its requests; with one in flight, the sum of theirs.
        counted: the speculative server's counters over the measurement.
        positions: tokens in a proposal.
    """
    sides: dict[str, dict[str, float]] = {}
    for side in SIDES:
        tokens = sum(len(record[side]["token_ids"]) for record in records)
        each = [1000 * record[side]["seconds"] / max(1, len(record[side]["token_ids"])) for record in records]
        sides[side] = {
            "tokens": tokens,
            "seconds": seconds[side],
            "tokens_per_second": tokens / seconds[side],
            "ms_per_token": statistics.median(each),
        }
    return {
        "prompts": len(records),
        "tokens": sides["speculative"]["tokens"],
        "acceptance_length": counted.acceptance_length(),
        "per_position": counted.per_position_acceptance(positions),
        "conditional": counted.conditional_acceptance(positions),
        "drafts": counted.drafts,
        "accepted": counted.accepted,
        **sides,
        "speed_up": sides["speculative"]["tokens_per_second"] / sides["baseline"]["tokens_per_second"],
        "identical_answers": sum(r["baseline"]["token_ids"] == r["speculative"]["token_ids"] for r in records),
    }


async def _compare(job: Job, name: str, prompts: list[Prompt], pair: tuple[str, str]) -> dict[str, Any]:
    """Compare the greedy answers of one dataset with and without the draft; returns `COUNTS` and all differences."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_client(job, s, LOSSLESS_CONCURRENCY, retries=2)) for s in pair]
        if (
            job.config.target.dtype is Dtype.float32 and job.config.evaluate.temperature == 0
        ):  # so are the timed answers
            tokens = job.services[pair[1]].num_speculative_tokens
            path = _measured(job, name, tokens, job.config.evaluate.concurrency[0])
            records = json.loads(path.read_text())["records"]
        else:
            records = await _greedy_answers(job, name, prompts, clients)
        differences: list[dict[str, Any]] = []
        tokens = 0
        for record in records:
            baseline, speculative = (record[side]["token_ids"] for side in SIDES)
            item = f"{record['id']} where its answers differ"
            comparison = await compare_answers(clients[0], record["prompt_ids"], baseline, speculative, item=item)
            tokens += comparison.tokens
            if comparison.difference:
                differences.append({"id": record["id"], **comparison.difference})
    verdicts = [difference["verdict"] for difference in differences]
    return {
        "prompts": len(records),
        "tokens": tokens,
        "identical": len(records) - len(differences),
        "ties": verdicts.count("tie"),
        "faults": verdicts.count("fault"),
        "differences": differences,
    }


async def _greedy_answers(
    job: Job, name: str, prompts: list[Prompt], clients: Sequence[Client]
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"id": prompt.id} for prompt in prompts]
    done = 0

    async def one(i: int) -> None:
        for side, client in zip(SIDES, clients, strict=True):
            answer = await _ask(job, client, prompts[i], f"{prompts[i].id} in float32", temperature=0.0)
            _keep(records[i], side, answer)

    async for _ in clients[0].map(one, range(len(prompts))):
        done += 1
        job.progress(done, len(prompts), f"prompts of {name}", comparing="float32")
    return records


def _publish(job: Job, prompts: dict[str, list[Prompt]], tallies: dict[str, RowCounts]) -> None:
    options, counts = job.config.evaluate, job.derived["num_speculative_tokens"]
    datasets: dict[str, Any] = {}
    for name in options.datasets:
        paths = [_measured(job, name, t, c) for t in counts for c in dict.fromkeys(options.concurrency)]
        measured = [json.loads(path.read_text()) for path in paths]
        summaries = [measurement["summary"] for measurement in measured]
        datasets[name] = {**summaries[0], "measurements": summaries}
        with (job.output / f"{file_name(name)}.jsonl").open("w", encoding="utf-8") as file:
            for measurement in measured:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in measurement["records"])
    lossless = _lossless(job)
    evaluation = {
        "datasets": datasets,
        "lossless": lossless,
        "num_speculative_tokens": counts[0],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "dtype": job.config.target.dtype.value,
    }
    write_json(job.output / "evaluation.json", evaluation)
    job.record["datasets"] = {
        name: {**tallies[name].record(), "prompts": len(prompts[name]), "asked": options.num_prompts}
        for name in prompts
    }
    job.record["acceptance_length"] = {name: numbers["acceptance_length"] for name, numbers in datasets.items()}
    job.record["speed_up"] = {name: numbers["speed_up"] for name, numbers in datasets.items()}
    if lossless:
        job.record["lossless"] = {key: lossless[key] for key in COUNTS}


def _lossless(job: Job) -> dict[str, Any] | None:
    """Read the comparisons and sum them; None if the recipe requests none."""
    if lossless_pair(job) is None:
        return None
    comparisons = [
        {"dataset": name, "num_speculative_tokens": tokens, **json.loads(_compared(job, name, tokens).read_text())}
        for name in job.config.evaluate.datasets
        for tokens in job.derived["num_speculative_tokens"]
    ]
    totals = {key: sum(comparison[key] for comparison in comparisons) for key in COUNTS}
    return {"dtype": "float32", "tolerance_nats": TOLERANCE, **totals, "comparisons": comparisons}
