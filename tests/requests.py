"""Request files as the runner writes them, of a stage that takes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from speculators.job import Request
from speculators.runner.planning import key as keys


def make_request(stage: str, store: Path, *, config: dict[str, Any] | None = None, **fields: Any) -> Request:
    """A request for one phase of `stage`; the key is that of `config` and no inputs."""
    preimage = keys.preimage(stage, 1, config=config or {}, inputs={}, packages={}, service={})
    key = keys.digest(preimage)
    request = Request(
        node=stage, stage=stage, key=key, config={}, derived={}, inputs={}, digests={}, services={}, orders={},
        reuse=[],
        work=str(store / "work" / stage / key), store=str(store), preimage=preimage, digest=None, forced=False,
        provenance={"run": "run-1"}, phase=0, phases=1,
    )  # fmt: skip
    return dataclasses.replace(request, **fields)
