"""The fidelity gate: do stored states, through the target's norm and head, give what the server itself picked?

Training computes the target's distributions from the last captured state, the final norm and the head as `checkpoint`
reads them. If any of these is not what the server computes with, training converges all the same, to a draft that is
accepted too seldom. So the server is asked, at a few places, which token it picks greedily and how likely it is, and
both have to come out of the stored states. `picks.json` lies beside them.

Rounding turns ties: a pick also counts as given where its logit is below the largest one by no more than rounding
explains. Where too many differ, other readings of the same checkpoint are tried, and the one that agrees is named.
What the last state cannot tell, which layers the others are, a run of the target by transformers does (`reference`).
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
from speculators.features.writer import check_states
from speculators.job import Job, write_json
from speculators.targets import reference
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.targets.readings import (
    Agreement,
    GreedyToken,
    Reading,
    agreement,
    alternative_readings,
    checkpoint_reading,
)

GREEDY_TOKENS_FILE = "picks.json"
PLACES = 48
"""Rows of a table at whose beginning the server is asked."""
EARLY = 16
"""How many of these are the first rows, so that an extraction which goes wrong ends with them."""
SHORTEST, LONGEST = 8, 96
"""Tokens of a row that the server gets: enough to say something, and next to nothing beside the row itself."""
OF_ANSWER = 4
"""Places of an answer that are kept, where answering gives them."""


def sample_positions(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(row, position) of what to ask about rows of these lengths: always the same, and over the whole table."""
    spread = PLACES - EARLY
    rows = {*range(min(EARLY, len(lengths))), *(i * len(lengths) // spread for i in range(spread) if lengths)}
    return [(row, _cut(row, lengths[row]) - 1) for row in sorted(rows) if lengths[row]]


def _cut(row: int, length: int) -> int:
    return random.Random(row).randint(min(SHORTEST, length), min(LONGEST, length))


async def ask(client: Client, row: int, token_ids: Sequence[int], position: int) -> GreedyToken:
    """Have the server continue the beginning of a row, up to and with `position`, by one token."""
    begun = token_ids[: position + 1]
    said = await client.complete(begun, item=f"row {row}", max_tokens=1, temperature=0.0, logprobs=1)
    return GreedyToken(row, position, *_likeliest(said, 0))


def greedy_tokens_in_answer(said: Completion) -> list[tuple[int, int, float | None]]:
    """Some of the picks in an answer, as (place in the answer, token, log-probability); none without `logprobs`."""
    count = len(said.token_ids)
    wanted = sorted({i * count // OF_ANSWER for i in range(OF_ANSWER)}) if count and len(said.logprobs) == count else []
    return [(place, *_likeliest(said, place)) for place in wanted]


def _likeliest(said: Completion, place: int) -> tuple[int, float | None]:
    if len(said.logprobs) <= place or not said.logprobs[place]:
        return said.token_ids[place], None
    return max(said.logprobs[place].items(), key=lambda entry: entry[1])


def write_greedy_tokens(directory: Path, picks: Sequence[GreedyToken]) -> None:
    """Put them beside the states."""
    write_json(directory / GREEDY_TOKENS_FILE, [list(pick) for pick in sorted(picks, key=lambda pick: pick[:2])])


def read_greedy_tokens(directory: Path) -> list[GreedyToken]:
    """Those beside the states; none where states came without, from another program for one."""
    path = directory / GREEDY_TOKENS_FILE
    return [GreedyToken(*plain) for plain in json.loads(path.read_text())] if path.exists() else []


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityCheck:
    """One target's gate."""

    checkpoint: Path
    layer_ids: list[int]
    """What is captured, in order; the last is the last layer's output."""
    compute: torch.dtype
    """What the server computes in."""
    stored: torch.dtype
    """What the states were rounded to last."""
    least: float
    """Share of the picks that have to agree; 0 lets everything through."""
    reference_gib: float
    """Largest checkpoint that is also run by transformers."""

    def check(self, picks: Sequence[GreedyToken], states: Callable[[int], tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Compare; `states(row)` gives token ids [T] and states [T, L, H]. Returns what was found, for the record.

        Raises:
            ContractError: they do not agree; the message says what is wrong.
        """
        if not picks or not self.least:
            return {"picks": 0}
        target = TargetCheckpoint(self.checkpoint)
        drift = self._drift(target)
        rows = {row: states(row) for row in dict.fromkeys(pick.row for pick in picks)}
        at = torch.stack([rows[pick.row][1][pick.position] for pick in picks]).float()

        def compare(reading: Reading) -> Agreement:
            return agreement(reading, at, picks, drift, torch.finfo(self.compute).eps / 2)

        own = compare(checkpoint_reading(target)) if target.has_head else None
        passed = own is not None and own.passes(self.least)
        if not passed:
            for mistake in alternative_readings(target, self.layer_ids):
                if compare(mistake.reading).passes(self.least):
                    raise ContractError(f"{self._begin(own)}{mistake.name}; read that way they agree", mistake.hint)
        seen = reference.compare_layers(target, _samples(rows.values()), self.layer_ids, drift, self.reference_gib)
        if seen.verdict:
            raise ContractError(f"{self._begin(own)}{seen.verdict}", AGAIN)
        if own is None or not passed:
            raise ContractError(f"{self._begin(own)}no reading of norm and head agrees ({seen.note})", WHICH)
        return {"picks": own.picks, "agree": own.agree, "logprob_off": round(own.off, 4), "states_off": seen.off}

    def check_layers(self, rows: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """What can be checked of states that no server's picks came with: which layers they are, of a small target.

        Raises:
            ContractError: they are of other layers or other weights.
        """
        if not self.least:
            return {"picks": 0}
        target = TargetCheckpoint(self.checkpoint)
        seen = reference.compare_layers(target, _samples(rows), self.layer_ids, self._drift(target), self.reference_gib)
        if seen.verdict:
            raise ContractError(f"these hidden states are not the target's: {seen.verdict}", AGAIN)
        return {"picks": 0, "states_off": seen.off}

    def _drift(self, target: TargetCheckpoint) -> float:
        """Standard deviation of what rounding does to a state, relative to it."""
        unit = torch.finfo(self.compute).eps / 2
        # Every layer adds to the residual stream, and rounds it; storing rounds once more.
        return math.hypot(unit * math.sqrt(target.config["num_hidden_layers"]), torch.finfo(self.stored).eps / 4)

    def _begin(self, own: Agreement | None) -> str:
        """How a refusal begins."""
        if own is None:
            return "the target has no head of its own: "
        if own.agree < self.least * own.picks:
            return (
                f"the target's norm and head give the token that the server picks from {own.agree} of {own.picks} "
                f"stored states, a share of {self.least:g} has to agree: "
            )
        if own.excess > 0:
            return (
                "the target's norm and head give the tokens that the server picks, but their log-probabilities are "
                f"off by {own.off:.3g} nats: "
            )
        return "the target's norm and head give the tokens that the server picks, but "


def _samples(rows: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The beginnings of a few rows, for the reference."""
    return [(ids[:LONGEST], states[:LONGEST]) for ids, states in itertools.islice(rows, reference.ROWS)]


AGAIN = "serve this recipe's target, its weights and its layers, and extract the hidden states again: force=[extract]"
WHICH = (
    "either the last captured state is not the last layer's output, or the states are of another revision of the "
    "weights: serve this recipe's target and extract again; target.max_reference_gib=N lets transformers tell which it "
    "is"
)


def check_for(job: Job, stored: torch.dtype) -> FidelityCheck:
    """The gate for states that a stage has in hand, rounded to `stored`."""
    options = job.config.target
    return FidelityCheck(
        checkpoint=job.inputs["target"],
        layer_ids=job.derived["capture_layer_ids"],
        compute=getattr(torch, options.dtype.name),
        stored=stored,
        least=options.min_greedy_agreement,
        reference_gib=options.max_reference_gib,
    )


class EarlyFidelityCheck:
    """The gate of an extraction that runs: it is passed once, with the first rows that come in."""

    def __init__(self, gate: FidelityCheck, picks: Sequence[GreedyToken], output: Path) -> None:
        self._gate = gate
        self._output = output
        self._waiting = {pick.row: pick for pick in picks}
        self._picks: list[GreedyToken] = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.found: dict[str, Any] = {}
        """What was found, once it was."""

    def see(self, row: int, token_ids: Tensor, states: Tensor) -> None:
        """Take one row in, ids [T] and states [T, L, H]; the last one that is waited for decides.

        Raises:
            ContractError: the states are not what the server computes with. The output is empty then.
        """
        pick = self._waiting.pop(row, None)
        if pick is not None:
            self._picks.append(pick)
            self._seen[row] = token_ids, states
            self._decide()

    def leave_out(self, row: int) -> None:
        """Do not wait for this row: it has no states. Otherwise as `see`."""
        if self._waiting.pop(row, None) is not None:
            self._decide()

    def _decide(self) -> None:
        if self._waiting:
            return
        try:
            self.found = self._gate.check(self._picks, self._seen.__getitem__)
        except ContractError:
            # Picks and sealed shards are of the same server, and the next attempt may have the right one.
            for path in self._output.iterdir():
                path.unlink()
            raise
        self._picks, self._seen = [], {}


async def start_early_check(
    job: Job, client: Client, table: Any, done: Container[int], rows: range
) -> EarlyFidelityCheck:
    """The gate of an extraction of some rows of the token table, of which the rows `done` are kept already.

    The server is asked for the picks of these rows first, unless an earlier attempt has asked. One that does not begin
    with the table's first rows has a server of its own too, and its first rows are asked about for the gate alone.
    """

    async def work(place: tuple[int, int]) -> GreedyToken:
        row, position = place
        return await ask(client, row, table[row]["input_ids"], position)

    lengths = table["seq_len"]
    if not (job.output / GREEDY_TOKENS_FILE).exists():
        wanted = [place for place in sample_positions(lengths) if place[0] in rows]
        write_greedy_tokens(job.output, [pick async for pick in client.map(work, wanted)])
    early = [row for row in rows[:EARLY] if row not in done and lengths[row]]
    picks = {pick.row: pick for pick in read_greedy_tokens(job.output)}
    unasked = [(row, _cut(row, lengths[row]) - 1) for row in early if row not in picks]
    picks |= {pick.row: pick async for pick in client.map(work, unasked)}
    stored = getattr(torch, job.config.extract.dtype.name)  # a server may round to it already
    return EarlyFidelityCheck(check_for(job, stored), [picks[row] for row in early], job.output)


def check_server(job: Job) -> None:
    """Put the states that a live server gives through the gate before training draws on them; as `check_features`.

    Raises:
        ContractError: they are not what the server computes with.
    """
    if not job.config.target.min_greedy_agreement:
        return
    table, options = load_from_disk(str(job.inputs["tokens"])), job.config.extract
    sample = sample_positions(table["seq_len"])[:EARLY]

    async def draw() -> list[tuple[GreedyToken, tuple[Tensor, Tensor]]]:
        client = Client(
            job.services["target"], concurrency=options.concurrency, retries=options.retries, timeout=options.timeout
        )

        async def work(place: tuple[int, int]) -> tuple[GreedyToken, tuple[Tensor, Tensor]]:
            row, position = place
            begun = list(table[row]["input_ids"])[: position + 1]
            item = f"row {row}"
            pick, file = await ask(client, row, begun, position), await client.hidden_states(begun, item=item)
            token_ids, states = file.load()
            check_states(item, begun, token_ids, states, getattr(torch, job.config.target.dtype.name))
            return pick, (token_ids, states)

        async with client:
            return [drawn async for drawn in client.map(work, sample)]

    drawn = sorted(asyncio.run(draw()), key=lambda pair: pair[0][:2])
    states = {pick.row: its for pick, its in drawn}
    gate = check_for(job, getattr(torch, options.dtype.name))  # a server may round to it already
    job.record["fidelity"] = gate.check([pick for pick, _ in drawn], states.__getitem__)


def check_features(job: Job, features: ShardReader) -> None:
    """Put stored states through the gate before anything is trained on them; what it found goes into the record.

    Raises:
        ContractError: they are not what the server computes with.
    """
    kept = set(features.rows)
    picks = [p for p in read_greedy_tokens(features.directory) if p.row in kept and p.position < features.length(p.row)]
    gate = check_for(job, getattr(torch, features.contract["dtype"]))

    def states(row: int) -> tuple[Tensor, Tensor]:
        return features.token_ids(row), features.states(row)

    if picks:
        job.record["fidelity"] = gate.check(picks, states)
        return
    job.record["fidelity"] = gate.check_layers(map(states, features.rows))
    job.record.setdefault("notes", []).append(
        f"these hidden states came without {GREEDY_TOKENS_FILE}: "
        "whether norm and head reproduce the server's greedy tokens was not checked"
    )
