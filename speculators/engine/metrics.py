"""Reads the speculative-decoding counters of a vLLM server from its /metrics page.

The counters belong to the server, not to a request. A measurement is the difference of two readings, and no other
client may use the server between them.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import dataclass, field

import httpx

from speculators.errors import ServiceError
from speculators.job import Endpoint
from speculators.timeouts import METRICS_POLL_SECONDS, METRICS_SECONDS

_LINE = re.compile(r"^vllm:spec_decode_(?P<name>\w+)_total(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
_MAX_POLLS = 100
"""Readings after which the counters are reported as still changing."""


@dataclass(frozen=True, slots=True)
class DraftCounters:
    """Speculative-decoding counters of a server since its start, or, as a difference, of one measurement."""

    drafts: int = 0
    """Proposals of the draft model; each is verified by one step of the target for one sequence."""
    proposed: int = 0
    """Draft tokens in these proposals."""
    accepted: int = 0
    """Draft tokens that the target accepted."""
    accepted_per_position: dict[int, int] = field(default_factory=dict)
    """Position in the proposal, from 1 -> number of proposals accepted up to and including it."""

    def __sub__(self, earlier: DraftCounters) -> DraftCounters:
        return DraftCounters(
            self.drafts - earlier.drafts,
            self.proposed - earlier.proposed,
            self.accepted - earlier.accepted,
            {p: n - earlier.accepted_per_position.get(p, 0) for p, n in self.accepted_per_position.items()},
        )

    def acceptance_length(self) -> float:
        """Mean tokens per target step, the bonus token included; 1 means that no draft token was accepted."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    def per_position_acceptance(self, positions: int) -> list[float]:
        """For positions 1 to `positions`: the share of proposals accepted up to and including that position."""
        counts = (self.accepted_per_position.get(position, 0) for position in range(1, positions + 1))
        return [count / self.drafts if self.drafts else 0.0 for count in counts]

    def conditional_acceptance(self, positions: int) -> list[float | None]:
        """For positions 1 to `positions`: the share accepted among proposals whose earlier positions all were.

        None for a position that no proposal reached.
        """
        counts = (self.accepted_per_position.get(position, 0) for position in range(1, positions + 1))
        reached = [self.drafts, *counts]
        return [count / previous if previous else None for previous, count in itertools.pairwise(reached)]


def parse_counters(page: str) -> DraftCounters:
    """Parse the counters of a /metrics page, summed over its engines; all are 0 if the server does not speculate."""
    totals: dict[str, int] = {}
    accepted_per_position: dict[int, int] = {}
    for line in _LINE.finditer(page):
        value = int(float(line["value"]))
        label = _POSITION.search(line["labels"] or "")
        if line["name"] == "num_accepted_tokens_per_pos" and label:
            position = int(label[1]) + 1  # vLLM counts positions from 0
            accepted_per_position[position] = accepted_per_position.get(position, 0) + value
        else:
            totals[line["name"]] = totals.get(line["name"], 0) + value
    return DraftCounters(
        totals.get("num_drafts", 0),
        totals.get("num_draft_tokens", 0),
        totals.get("num_accepted_tokens", 0),
        dict(sorted(accepted_per_position.items())),
    )


async def read_counters(endpoint: Endpoint) -> DraftCounters:
    """Read the counters of an idle server.

    The engine may count its last step after the answer was sent, so the page is read until it no longer changes.

    Raises:
        ServiceError: the page cannot be read, or the counters keep changing.
    """
    auth = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    async with httpx.AsyncClient(base_url=endpoint.url, headers=auth, timeout=METRICS_SECONDS, trust_env=False) as http:
        previous = None
        for _ in range(_MAX_POLLS):
            try:
                page = (await http.get("/metrics")).raise_for_status().text
            except httpx.HTTPError as error:
                raise ServiceError(
                    f"{endpoint.url}/metrics cannot be read: {error}",
                    "acceptance is counted there: serve with vLLM, without --disable-log-stats",
                ) from error
            counters = parse_counters(page)
            if counters == previous:
                return counters
            previous = counters
            await asyncio.sleep(METRICS_POLL_SECONDS)
    raise ServiceError(
        f"the speculative-decoding counters of {endpoint.url} keep changing",
        "stop the other clients of this server while evaluation runs",
    )
