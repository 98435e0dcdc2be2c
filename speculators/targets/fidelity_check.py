"""Fidelity check: do hidden states, through the target's norm and head, reproduce the server's own greedy tokens?

Training computes the target's distributions from the last-layer hidden state, the final norm and the head as
`checkpoint` reads them. If any of them is not what the server computes with, training still converges, to a draft that
is accepted too seldom. So the server is asked for its greedy token (the one with the largest logit) and that token's
log-probability at a few positions, and both have to follow from the hidden states. `picks.json`, next to the shards,
holds the server's tokens.

Rounding decides ties, so a token also counts as equal where its logit is below the largest by no more than rounding
explains. Where too many differ, alternative readings of the checkpoint are tried (`readings`), and the error names the
one that agrees. Which other layers were captured, a run of the target in transformers shows (`reference`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from torch import Tensor

from speculators.engine.client import Client, Completion
from speculators.errors import ContractError
from speculators.features.shards import ShardReader
from speculators.features.writer import check_hidden_states
from speculators.job import Job, write_json
from speculators.targets import readings, reference
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.targets.readings import Agreement, GreedyToken, Reading

GREEDY_TOKENS_FILE = "picks.json"
SAMPLED_ROWS = 48
"""Rows of a table that are sampled, each at one position near its beginning."""
FIRST_ROWS = 16
"""How many of these are the table's first rows, so that a wrong extraction ends with them."""
MIN_TOKENS, MAX_TOKENS = 8, 96
"""Tokens of a sampled row that the server gets: enough context, and little work compared to the row itself."""
TOKENS_PER_ANSWER = 4
"""Greedy tokens that are kept of an answer, where the server reports them while it answers."""
EXTRACT_AGAIN = "serve the weights and capture the layers of this recipe, and extract again: force=[extract]"
NO_READING = f"{EXTRACT_AGAIN}; target.max_reference_gib=N lets transformers find out which of them is wrong"

Sample = tuple[Tensor, Tensor]
"""Token ids [T] and hidden states [T, L, H] of a row, or of its beginning."""


def sample_positions(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Choose the (row, position) pairs to check of rows of these lengths: always the same, over the whole table."""
    count = SAMPLED_ROWS - FIRST_ROWS
    rows = {*range(min(FIRST_ROWS, len(lengths))), *(i * len(lengths) // count for i in range(count) if lengths)}
    return [(row, _sample_length(row, lengths[row]) - 1) for row in sorted(rows) if lengths[row]]


def _sample_length(row: int, length: int) -> int:
    return random.Random(row).randint(min(MIN_TOKENS, length), min(MAX_TOKENS, length))


async def request_greedy_token(client: Client, row: int, token_ids: Sequence[int], position: int) -> GreedyToken:
    """Have the server continue a row, up to and including `position`, by one greedy token."""
    prompt = token_ids[: position + 1]
    completion = await client.complete(prompt, item=f"row {row}", max_tokens=1, temperature=0.0, logprobs=1)
    return GreedyToken(row, position, *_most_probable(completion, 0))


def greedy_tokens_in_answer(completion: Completion) -> list[tuple[int, int, float | None]]:
    """Some of an answer's greedy tokens, as (index in the answer, token, log-probability); none without `logprobs`."""
    count = len(completion.token_ids)
    if not count or len(completion.logprobs) != count:
        return []
    indices = sorted({i * count // TOKENS_PER_ANSWER for i in range(TOKENS_PER_ANSWER)})
    return [(index, *_most_probable(completion, index)) for index in indices]


def _most_probable(completion: Completion, index: int) -> tuple[int, float | None]:
    """The most probable token at an index of the answer, which need not be the sampled one, and its log-probability."""
    if len(completion.logprobs) <= index or not completion.logprobs[index]:
        return completion.token_ids[index], None
    return max(completion.logprobs[index].items(), key=lambda entry: entry[1])


def write_greedy_tokens(directory: Path, tokens: Sequence[GreedyToken]) -> None:
    """Write the server's greedy tokens next to the shards."""
    write_json(directory / GREEDY_TOKENS_FILE, [list(token) for token in sorted(tokens, key=lambda token: token[:2])])


def read_greedy_tokens(directory: Path) -> list[GreedyToken]:
    """Read the greedy tokens of a directory of shards; none where another program made the hidden states."""
    path = directory / GREEDY_TOKENS_FILE
    return [GreedyToken(*fields) for fields in json.loads(path.read_text())] if path.exists() else []


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityCheck:
    """Compares hidden states with one target's checkpoint and greedy tokens."""

    checkpoint: Path
    layer_ids: list[int]
    """The captured layers, in order; the last one is the last layer's output."""
    compute_dtype: torch.dtype
    """What the server computes in."""
    stored_dtype: torch.dtype
    """What the hidden states were rounded to last."""
    min_agreement: float
    """Share of the greedy tokens that has to be reproduced; 0 disables the check."""
    max_reference_gib: float
    """Largest checkpoint that is also run in transformers."""

    def check(self, tokens: Sequence[GreedyToken], sample: Callable[[int], Sample]) -> dict[str, Any]:
        """Compare the rows of the greedy tokens; `sample(row)` gives a row's. Returns the results for the record.

        Raises:
            ContractError: they do not agree; the message names the mistake.
        """
        if not tokens or not self.min_agreement:
            return {"picks": 0}
        target = TargetCheckpoint(self.checkpoint)
        drift = self._drift(target)
        rows = {row: sample(row) for row in dict.fromkeys(token.row for token in tokens)}
        hidden_states = torch.stack([rows[token.row][1][token.position] for token in tokens]).float()

        def compare(reading: Reading) -> Agreement:
            return readings.agreement(reading, hidden_states, tokens, drift, torch.finfo(self.compute_dtype).eps / 2)

        result = compare(readings.checkpoint_reading(target)) if target.has_head else None
        passed = result is not None and result.passes(self.min_agreement)
        if not passed:
            for alternative in readings.alternative_readings(target, self.layer_ids):
                if compare(alternative.reading).passes(self.min_agreement):
                    mistake = f"{alternative.mistake}; read that way they agree"
                    raise ContractError(f"{self._error_prefix(result)}{mistake}", alternative.hint)
        layers = self._compare_layers(target, rows.values())
        if layers.problem:
            raise ContractError(f"{self._error_prefix(result)}{layers.problem}", EXTRACT_AGAIN)
        if result is None or not passed:
            problem = "no reading of norm and head agrees" + (f" ({layers.note})" if layers.note else "")
            raise ContractError(f"{self._error_prefix(result)}{problem}", NO_READING)
        error = round(result.logprob_error, 4)
        return {"picks": result.compared, "agree": result.equal, "logprob_off": error, "states_off": layers.difference}

    def check_layers(self, samples: Iterable[Sample]) -> dict[str, Any]:
        """Check hidden states that came without greedy tokens: whether a small target has these layers.

        Raises:
            ContractError: they are of other layers or other weights.
        """
        if not self.min_agreement:
            return {"picks": 0}
        layers = self._compare_layers(TargetCheckpoint(self.checkpoint), samples)
        if layers.problem:
            raise ContractError(f"these hidden states are not the target's: {layers.problem}", EXTRACT_AGAIN)
        return {"picks": 0, "states_off": layers.difference}

    def _compare_layers(self, target: TargetCheckpoint, samples: Iterable[Sample]) -> reference.LayerComparison:
        """Run the beginnings of the first few rows in transformers."""
        first = itertools.islice(samples, reference.ROWS)
        short = [(token_ids[:MAX_TOKENS], hidden_states[:MAX_TOKENS]) for token_ids, hidden_states in first]
        drift = self._drift(target)
        return reference.compare_layers(
            target, short, self.layer_ids, drift, self.compute_dtype, self.max_reference_gib
        )

    def _drift(self, target: TargetCheckpoint) -> float:
        """Standard deviation of the rounding error of a hidden state, relative to its norm."""
        unit = torch.finfo(self.compute_dtype).eps / 2
        # Every layer adds to the residual stream, and rounds it; storing rounds once more.
        return math.hypot(unit * math.sqrt(target.config["num_hidden_layers"]), torch.finfo(self.stored_dtype).eps / 4)

    def _error_prefix(self, result: Agreement | None) -> str:
        if result is None:
            return "the target has no head of its own: "
        if result.equal < self.min_agreement * result.compared:
            return (
                f"the target's norm and head reproduce {result.equal} of {result.compared} greedy tokens of the "
                f"server, a share of {self.min_agreement:g} is required: "
            )
        if result.excess > 0:
            return (
                "the target's norm and head reproduce the server's greedy tokens, but their log-probabilities are "
                f"off by {result.logprob_error:.3g} nats: "
            )
        return "the target's norm and head reproduce the server's greedy tokens, but "


def check_for(job: Job, stored_dtype: torch.dtype) -> FidelityCheck:
    """Build the check of a stage, for hidden states that were rounded to `stored_dtype`."""
    options = job.config.target
    return FidelityCheck(
        checkpoint=job.inputs["target"],
        layer_ids=job.derived["capture_layer_ids"],
        compute_dtype=getattr(torch, options.dtype.name),
        stored_dtype=stored_dtype,
        min_agreement=options.min_greedy_agreement,
        max_reference_gib=options.max_reference_gib,
    )


class EarlyFidelityCheck:
    """The check of an extraction that is running: it is done once, when the first rows have come in."""

    def __init__(self, check: FidelityCheck, tokens: Sequence[GreedyToken], output: Path) -> None:
        self._check = check
        self._output = output
        self._waiting = {token.row: token for token in tokens}
        self._tokens: list[GreedyToken] = []
        self._samples: dict[int, Sample] = {}
        self.result: dict[str, Any] = {}
        """The results for the record, once the check was done."""

    def add(self, row: int, token_ids: Tensor, hidden_states: Tensor) -> None:
        """Add a row, ids [T] and hidden states [T, L, H]; the last row that is waited for starts the check.

        Raises:
            ContractError: the hidden states are not what the server computes with. The output is empty then.
        """
        token = self._waiting.pop(row, None)
        if token is not None:
            self._tokens.append(token)
            self._samples[row] = token_ids, hidden_states
            self._check_when_complete()

    def skip(self, row: int) -> None:
        """Do not wait for this row: it has no hidden states. Otherwise as `add`."""
        if self._waiting.pop(row, None) is not None:
            self._check_when_complete()

    def _check_when_complete(self) -> None:
        if self._waiting:
            return
        try:
            self.result = self._check.check(self._tokens, self._samples.__getitem__)
        except ContractError:
            # Tokens and sealed shards are of the same server, and the next attempt may have the right one.
            for path in self._output.iterdir():
                path.unlink()
            raise
        self._tokens, self._samples = [], {}


async def start_early_check(
    job: Job, client: Client, table: Any, done: Container[int], rows: range
) -> EarlyFidelityCheck:
    """Request the greedy tokens of an extraction, and return the check of its first rows.

    The tokens of the sampled rows are written to the output first, unless an earlier attempt has written them. A worker
    that does not have the table's first rows has another server, so tokens of its own first rows are requested too.
    `rows` are the extraction's rows of the token table, `done` those that an earlier attempt has extracted.
    """

    async def request(sample: tuple[int, int]) -> GreedyToken:
        row, position = sample
        return await request_greedy_token(client, row, table[row]["input_ids"], position)

    lengths = table["seq_len"]
    if not (job.output / GREEDY_TOKENS_FILE).exists():
        samples = [sample for sample in sample_positions(lengths) if sample[0] in rows]
        write_greedy_tokens(job.output, [token async for token in client.map(request, samples)])
    first = [row for row in rows[:FIRST_ROWS] if row not in done and lengths[row]]
    tokens = {token.row: token for token in read_greedy_tokens(job.output)}
    missing = [(row, _sample_length(row, lengths[row]) - 1) for row in first if row not in tokens]
    tokens |= {token.row: token async for token in client.map(request, missing)}
    stored = getattr(torch, job.config.extract.dtype.name)  # a server may round to it already
    return EarlyFidelityCheck(check_for(job, stored), [tokens[row] for row in first], job.output)


def check_server(job: Job) -> None:
    """Check the hidden states of a live server before training draws on it; the results go into the record.

    Raises:
        ContractError: they are not what the server computes with.
    """
    if not job.config.target.min_greedy_agreement:
        return
    table, options = load_from_disk(str(job.inputs["tokens"])), job.config.extract
    compute_dtype = getattr(torch, job.config.target.dtype.name)

    async def request_samples() -> list[tuple[GreedyToken, Sample]]:
        client = Client(
            job.services["target"], concurrency=options.concurrency, retries=options.retries, timeout=options.timeout
        )

        async def request(sample: tuple[int, int]) -> tuple[GreedyToken, Sample]:
            row, position = sample
            prompt, item = list(table[row]["input_ids"])[: position + 1], f"row {row}"
            token = await request_greedy_token(client, row, prompt, position)
            token_ids, hidden_states = (await client.hidden_states(prompt, item=item)).load()
            check_hidden_states(item, prompt, token_ids, hidden_states, compute_dtype)
            return token, (token_ids, hidden_states)

        async with client:
            return [pair async for pair in client.map(request, sample_positions(table["seq_len"])[:FIRST_ROWS])]

    pairs = sorted(asyncio.run(request_samples()), key=lambda pair: pair[0][:2])
    samples = {token.row: sample for token, sample in pairs}
    check = check_for(job, getattr(torch, options.dtype.name))  # a server may round to it already
    job.record["fidelity"] = check.check([token for token, _ in pairs], samples.__getitem__)


def check_features(job: Job, features: ShardReader) -> None:
    """Check stored hidden states before anything is trained on them; the results go into the record.

    Raises:
        ContractError: they are not what the server computes with.
    """
    rows = set(features.rows)
    tokens = [
        t for t in read_greedy_tokens(features.directory) if t.row in rows and t.position < features.length(t.row)
    ]
    check = check_for(job, getattr(torch, features.contract["dtype"]))

    def sample(row: int) -> Sample:
        return features.token_ids(row), features.hidden_states(row)

    if tokens:
        job.record["fidelity"] = check.check(tokens, sample)
        return
    job.record["fidelity"] = check.check_layers(map(sample, features.rows))
    job.record.setdefault("notes", []).append(
        f"these hidden states came without {GREEDY_TOKENS_FILE}: "
        "whether norm and head reproduce the server's greedy tokens was not checked"
    )
