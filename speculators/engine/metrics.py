"""What a vLLM server counts about speculative decoding, read from its /metrics page.

The counters belong to the server, not to a request: a measurement is the difference of two readings, and nothing
else may talk to the server in between.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import dataclass, field

import httpx

from speculators.errors import ServiceError
from speculators.job import Endpoint

_LINE = re.compile(r"^vllm:spec_decode_(?P<name>\w+)_total(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
_SETTLING = 0.05
_PATIENCE = 100


@dataclass(frozen=True, slots=True)
class DraftCounters:
    """Counters of a server since it started, or, as a difference, of one measurement."""

    drafts: int = 0
    """Times that the draft proposed; each is one step of the target for one sequence."""
    proposed: int = 0
    """Tokens proposed."""
    accepted: int = 0
    """Tokens of these that the target agreed with."""
    accepted_at: dict[int, int] = field(default_factory=dict)
    """Position in the proposal, from 0 -> how often it, and so everything before it, was accepted."""

    def __sub__(self, earlier: DraftCounters) -> DraftCounters:
        return DraftCounters(
            self.drafts - earlier.drafts,
            self.proposed - earlier.proposed,
            self.accepted - earlier.accepted,
            {p: n - earlier.accepted_at.get(p, 0) for p, n in self.accepted_at.items()},
        )

    def acceptance_length(self) -> float:
        """Tokens that one step of the target yields on average, its own bonus token included; 1 is no gain."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    def per_position(self, positions: int) -> list[float]:
        """Share of the proposals in which position k, and so all before it, was accepted."""
        return [self.accepted_at.get(k, 0) / self.drafts if self.drafts else 0.0 for k in range(positions)]

    def conditional(self, positions: int) -> list[float | None]:
        """Share in which position k was accepted where all before it were; None where that never happened."""
        reached = [self.drafts, *(self.accepted_at.get(k, 0) for k in range(positions))]
        return [now / before if before else None for before, now in itertools.pairwise(reached)]


def parse(page: str) -> DraftCounters:
    """The counters on a /metrics page, summed over engines; all zero where the server does not speculate."""
    totals: dict[str, int] = {}
    accepted_at: dict[int, int] = {}
    for line in _LINE.finditer(page):
        value = int(float(line["value"]))
        position = _POSITION.search(line["labels"] or "")
        if line["name"] == "num_accepted_tokens_per_pos" and position:
            accepted_at[int(position[1])] = accepted_at.get(int(position[1]), 0) + value
        else:
            totals[line["name"]] = totals.get(line["name"], 0) + value
    return DraftCounters(
        totals.get("num_drafts", 0),
        totals.get("num_draft_tokens", 0),
        totals.get("num_accepted_tokens", 0),
        dict(sorted(accepted_at.items())),
    )


async def read_counters(endpoint: Endpoint) -> DraftCounters:
    """The counters once they stand still: the engine may report its last step after the answer is out.

    Raises:
        ServiceError: there is no such page, or something else keeps the server busy.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    async with httpx.AsyncClient(base_url=endpoint.url, headers=headers, timeout=30.0, trust_env=False) as http:
        before = None
        for _ in range(_PATIENCE):
            try:
                page = (await http.get("/metrics")).raise_for_status().text
            except httpx.HTTPError as error:
                raise ServiceError(
                    f"{endpoint.url}/metrics cannot be read: {error}",
                    "acceptance is counted there; serve with vLLM and without --disable-log-stats",
                ) from error
            now = parse(page)
            if now == before:
                return now
            before = now
            await asyncio.sleep(_SETTLING)
    raise ServiceError(
        f"the counters of {endpoint.url} do not come to rest", "let nothing else use the server during evaluation"
    )
