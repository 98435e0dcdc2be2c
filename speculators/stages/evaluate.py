"""evaluate: a speculator -> acceptance, speed, losslessness. Compares the engine with the draft to the one without."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import statistics
import time
import uuid
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speculators.config.choices import Sampling
from speculators.data.conversations import Conversation, Message, RowCounts, in_evaluation_holdout, usable
from speculators.engine.client import Client, Completion
from speculators.engine.metrics import DraftCounters, read_counters
from speculators.engine.sampling import model_sampling, template_fields
from speculators.errors import StageError
from speculators.evaluation.lossless import TOLERANCES, compare_answers
from speculators.job import Job, file_name, write_json

SIDES = ("baseline", "speculative")
COUNTS = ("prompts", "tokens", "identical", "ties", "faults")
"""Counts of a comparison of answers, which are summed over datasets."""
WARM_UP_TOKENS = 8
BLOCK = 4
"""Prompts per request in flight that one server answers before the servers alternate."""
LOSSLESS_CONCURRENCY = 8
"""Requests in flight to each server where answers are compared and not timed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that both servers answer."""

    id: str
    messages: list[Message]


def main(job: Job) -> None:
    """Run the measurements of this phase's servers; in the last phase, write `evaluation.json` and `DATASET.jsonl`.

    Each number of speculative tokens takes a phase of its own, on one work directory, since a server proposes one
    number. So does the comparison in float32 of a target that does not compute in it. Servers that do not fit on the
    GPUs side by side have a phase each, the baseline the last; what they answered is joined there.
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
        for row in usable(job.inputs[f"dataset.{name}"], name, spec, tally, set()):
            if trained and not in_evaluation_holdout(row.prompt, job.config.prompts.eval_holdout_ratio):
                tally.dropped["trained on"] += 1
            else:
                yield row

    def order(row: Conversation) -> bytes:
        return hashlib.sha256(row.id.encode()).digest()

    rows = heapq.nsmallest(options.num_prompts, candidates(), key=order)
    if not rows:
        raise tally.why_unusable(name, spec)
    return [Prompt(row.id, _question(row.with_instruction(spec.instruction))) for row in rows]


def _question(messages: list[Message]) -> list[Message]:
    """The messages up to and including the first user message."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[: first + 1]


async def _work(job: Job, prompts: dict[str, list[Prompt]]) -> None:
    options = job.config.evaluate
    if any(side in job.services for side in SIDES):
        for name in options.datasets:
            for concurrency in options.concurrency:
                await _time(job, name, prompts[name], concurrency)
    for dtype, pair in lossless_pairs(job).items():
        if any(service in job.services for service in pair):
            for name in options.datasets:
                await _check(job, name, prompts[name][: options.lossless_prompts], dtype, pair)


def lossless_pairs(job: Job) -> dict[str, tuple[str, str]]:
    """The two services whose answers are compared, by the format that they compute in: the served one, and float32 if
    the servers fit in it. {} if the recipe requests no comparison."""
    if not job.config.evaluate.lossless_prompts:
        return {}
    pairs = {job.config.target.dtype.name: ("baseline", "speculative")}
    if "float32" in job.derived["served_dtypes"]:
        pairs.setdefault("float32", ("baseline_float32", "speculative_float32"))
    return pairs


def _counts(job: Job, speculative: str) -> tuple[int, list[int]]:
    """Number of tokens that this phase's draft proposes, 0 without one; and the numbers whose results it completes."""
    if speculative not in job.services:
        return 0, job.derived["num_speculative_tokens"]
    tokens = job.services[speculative].num_speculative_tokens
    return tokens, [tokens]


def _measured(job: Job, name: str, tokens: int, concurrency: int) -> Path:
    """File of the measurement with so many speculative tokens and requests in flight."""
    return job.scratch / f"measured-{file_name(name)}-{tokens}-{concurrency}.json"


def _compared(job: Job, name: str, dtype: str, tokens: int) -> Path:
    """File of the comparison with so many speculative tokens."""
    return job.scratch / f"lossless-{dtype}-{file_name(name)}-{tokens}.json"


def _part(job: Job, kind: str, name: str, clients: Sequence[str], tokens: int) -> Path:
    """File of what one phase's servers answered, with so many speculative tokens."""
    return job.scratch / f"{kind}-{file_name(name)}-{'+'.join(clients)}-{tokens}.json"


def _client(job: Job, service: str, concurrency: int, retries: int) -> Client:
    timeout = job.config.evaluate.timeout
    return Client(job.services[service], concurrency=concurrency, retries=retries, timeout=timeout)


async def _time(job: Job, name: str, prompts: list[Prompt], concurrency: int) -> None:
    """Time this phase's servers; complete the measurements whose other server was timed before, or now."""
    sides = [side for side in SIDES if side in job.services]
    tokens, counts = _counts(job, "speculative")
    missing = [count for count in counts if not _measured(job, name, count, concurrency).exists()]
    timed = _part(job, f"timed-{concurrency}", name, sides, tokens)
    if missing and not timed.exists():
        write_json(timed, await _measure(job, name, prompts, concurrency, sides))
    if "baseline" not in sides:
        return
    for count in missing:
        parts = [timed] if tokens else [_part(job, f"timed-{concurrency}", name, SIDES[1:], count), timed]
        write_json(_measured(job, name, count, concurrency), _joined(parts, count, concurrency))


async def _measure(job: Job, name: str, prompts: list[Prompt], concurrency: int, sides: list[str]) -> dict[str, Any]:
    """Time one or both servers on the same prompts; return {"records", "seconds", "counted"}, the last of the draft."""
    counted = DraftCounters()
    async with AsyncExitStack() as stack:
        # No retries: the server would count a repeated request twice.
        clients = {side: await stack.enter_async_context(_client(job, side, concurrency, retries=0)) for side in sides}
        for client in clients.values():
            await _ask(job, client, prompts[0], f"warm-up for {name} at {concurrency}", WARM_UP_TOKENS)
        before = await read_counters(job.services["speculative"]) if "speculative" in sides else counted
        records = [{"id": prompt.id} for prompt in prompts]
        timing = _one_by_one if concurrency == 1 else _at_once
        seconds = await timing(job, name, prompts, clients, records)
        if "speculative" in sides:
            counted = await read_counters(job.services["speculative"]) - before
            if not counted.drafts:
                raise StageError(
                    f"the speculative server proposed nothing in {len(prompts)} answers of {name}",
                    f"see its log: {job.services['speculative'].log}",
                )
    return {"records": records, "seconds": seconds, "counted": asdict(counted)}


def _joined(parts: Sequence[Path], tokens: int, concurrency: int) -> dict[str, Any]:
    """Join what was timed of both servers; return {"summary", "records"}. The draft's counters are in the first part.

    `tokens`: number that the draft proposes in one step.
    """
    timed = [json.loads(path.read_text()) for path in parts]
    setting = {"num_speculative_tokens": tokens, "concurrency": concurrency}
    records = [dict(ChainMap(setting, *same)) for same in zip(*(part["records"] for part in timed), strict=True)]
    seconds = dict(ChainMap(*(part["seconds"] for part in timed)))
    counted = timed[0]["counted"]
    per_position = {int(position): count for position, count in counted["accepted_per_position"].items()}
    counters = DraftCounters(**{**counted, "accepted_per_position": per_position})
    return {"summary": {**setting, **summarise(records, seconds, counters, tokens)}, "records": records}


async def _one_by_one(
    job: Job, name: str, prompts: list[Prompt], clients: dict[str, Client], records: list[dict[str, Any]]
) -> dict[str, float]:
    """Fill `records` with one request at a time, alternating servers so that a slow period affects both equally."""
    for i, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        for side in list(clients)[:: 1 if i % 2 == 0 else -1]:
            answer = await _ask(job, clients[side], prompt, f"{prompt.id} one at a time")
            _keep(record, side, answer)
        job.progress(i + 1, len(prompts), f"prompts of {name}", concurrency=1)
    return {side: sum(record[side]["seconds"] for record in records) for side in clients}


async def _at_once(
    job: Job, name: str, prompts: list[Prompt], clients: dict[str, Client], records: list[dict[str, Any]]
) -> dict[str, float]:
    """Fill `records` with as many requests in flight as the client allows, alternating servers block by block.

    So a slow period affects both servers equally. Fewer requests are in flight at the end of a block; blocks are long
    enough that this has little weight, and it is the same for both servers.
    """
    seconds = dict.fromkeys(clients, 0.0)
    done = 0

    async def one(i: int, side: str) -> None:
        client = clients[side]
        answer = await _ask(job, client, prompts[i], f"{prompts[i].id}, {client.concurrency} at a time")
        _keep(records[i], side, answer)

    concurrency = next(iter(clients.values())).concurrency
    size = BLOCK * concurrency
    for number, begin in enumerate(range(0, len(prompts), size)):
        block = range(begin, min(begin + size, len(prompts)))
        for side in list(clients)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            async for _ in clients[side].map(partial(one, side=side), block):
                done += 1
                job.progress(
                    done, len(clients) * len(prompts), f"answers of {name}", concurrency=concurrency, server=side
                )
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
        **_sampling(job) if temperature is None else {"temperature": temperature},
        # A prefix cache, which an external server may have, must not speed up any answer.
        cache_salt=uuid.uuid4().hex,
        **template_fields(job.config.target, {}),
    )


def _sampling(job: Job) -> dict[str, Any]:
    """The sampling options of the requests that are timed."""
    if job.config.evaluate.sampling is Sampling.model:
        return model_sampling(job.inputs["target"])
    return {"temperature": job.config.evaluate.temperature}


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


async def _check(job: Job, name: str, prompts: list[Prompt], dtype: str, pair: tuple[str, str]) -> None:
    """Collect greedy answers of this phase's servers; compare them once both have answered and the baseline is up."""
    tokens, counts = _counts(job, pair[1])
    missing = [count for count in counts if not _compared(job, name, dtype, count).exists()]
    timed = pair[0] == "baseline" and _sampling(job) == {"temperature": 0.0}  # then the timed answers are greedy
    async with AsyncExitStack() as stack:
        clients = {
            side: await stack.enter_async_context(_client(job, service, LOSSLESS_CONCURRENCY, retries=2))
            for side, service in zip(SIDES, pair, strict=True)
            if service in job.services
        }
        answers = _part(job, f"greedy-{dtype}", name, list(clients), tokens)
        if missing and not timed and not answers.exists():
            write_json(answers, await _greedy_answers(job, name, prompts, clients, dtype))
        for count in missing if "baseline" in clients else ():
            if timed:
                path = _measured(job, name, count, job.config.evaluate.concurrency[0])
                records = json.loads(path.read_text())["records"]
            else:
                parts = [answers] if tokens else [_part(job, f"greedy-{dtype}", name, SIDES[1:], count), answers]
                same = zip(*(json.loads(part.read_text()) for part in parts), strict=True)
                records = [dict(ChainMap(*each)) for each in same]
            write_json(_compared(job, name, dtype, count), await _compare(clients["baseline"], records, dtype))


async def _compare(baseline: Client, records: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Compare the greedy answers of one dataset with and without the draft; returns `COUNTS` and all differences."""
    differences: list[dict[str, Any]] = []
    tokens = 0
    for record in records:
        sides = (record[side]["token_ids"] for side in SIDES)
        item = f"{record['id']} where its answers differ"
        comparison = await compare_answers(
            baseline, record["prompt_ids"], *sides, tolerance=TOLERANCES[dtype], item=item
        )
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
    job: Job, name: str, prompts: list[Prompt], clients: Mapping[str, Client], dtype: str
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"id": prompt.id} for prompt in prompts]
    done = 0

    async def one(i: int) -> None:
        for side, client in clients.items():
            answer = await _ask(job, client, prompts[i], f"{prompts[i].id} in {dtype}", temperature=0.0)
            _keep(records[i], side, answer)

    async for _ in next(iter(clients.values())).map(one, range(len(prompts))):
        done += 1
        job.progress(done, len(prompts), f"prompts of {name}", comparing=dtype)
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
    checks = {dtype: _lossless(job, dtype) for dtype in lossless_pairs(job)}
    target_dtype = job.config.target.dtype.name
    lossless = checks.get("float32") or checks.get(target_dtype)
    evaluation = {
        "datasets": datasets,
        "lossless": lossless,
        "lossless_served": checks.get(target_dtype) if len(checks) > 1 else None,
        "num_speculative_tokens": counts[0],
        "max_tokens": options.max_tokens,
        "temperature": _sampling(job)["temperature"],
        "dtype": job.config.target.dtype.value,
    }
    write_json(job.output / "evaluation.json", evaluation)
    job.record["datasets"] = {
        name: {**tallies[name].record(), "prompts": len(prompts[name]), "asked": options.num_prompts}
        for name in prompts
    }
    job.record["notes"] = [
        f"{name}: measured on {len(prompts[name])} prompts, of {options.num_prompts} requested: it has no more"
        for name in prompts
        if len(prompts[name]) < options.num_prompts
    ] + [note for name, tally in tallies.items() for note in tally.notes(name)]
    job.record["acceptance_length"] = {name: numbers["acceptance_length"] for name, numbers in datasets.items()}
    job.record["speed_up"] = {name: numbers["speed_up"] for name, numbers in datasets.items()}
    if lossless:
        job.record["lossless"] = {key: lossless[key] for key in COUNTS}


def _lossless(job: Job, dtype: str) -> dict[str, Any]:
    """Read the comparisons in one format and sum them."""
    comparisons = [
        {
            "dataset": name,
            "num_speculative_tokens": tokens,
            **json.loads(_compared(job, name, dtype, tokens).read_text()),
        }
        for name in job.config.evaluate.datasets
        for tokens in job.derived["num_speculative_tokens"]
    ]
    totals = {key: sum(comparison[key] for comparison in comparisons) for key in COUNTS}
    return {"dtype": dtype, "tolerance_nats": TOLERANCES[dtype], **totals, "comparisons": comparisons}
