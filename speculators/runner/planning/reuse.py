"""Finds rows in the store that a stage which has to run need not request again: answers, and hidden states of tokens.

What the target answers depends on the target, the engine, the sampling options and the conversation. So answers are
looked for in all artifacts and unfinished attempts whose preimages agree in the first three, whatever pipeline, layers,
algorithm or other rows they were made with; `speculators.answers` has the identity of a conversation. If layers and
format fit, their hidden states are copied, too; else the target prefills the answers.

`extract` finds rows by their token ids. The runner cannot read tokens, so the stage counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speculators.answers import ANSWER_LOG, BAD_STATES, read_rows, row_digest
from speculators.config.choices import LastLayerPositions
from speculators.job import ReusableRows
from speculators.runner.planning import key
from speculators.runner.planning.graph import ENGINE_ARGUMENTS, KINDS, TARGET
from speculators.runner.store.artifact import Artifact, is_complete
from speculators.runner.store.artifacts import Store

SEEDED = 2
"""Version of `regenerate` since which each request has a seed of its own: sampled answers of earlier ones do not count.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Answers of earlier artifacts and attempts that a stage may use."""

    sources: tuple[ReusableRows, ...]
    """Preferred ones first."""
    artifacts: tuple[Artifact, ...]
    """The artifacts among them."""
    rows: int | None = None
    """Conversations of the stage; None while its input does not exist."""
    new: int = 0
    """How many of them have to be answered."""
    prefilled: int = 0
    """How many are answered and lack hidden states with the layers and in the format of the stage."""

    @property
    def complete(self) -> bool:
        """Whether earlier rows are all that the stage needs, so that no server has to start."""
        return self.rows is not None and not self.new and not self.prefilled

    def __str__(self) -> str:
        """`16 of 400 rows new`; empty without earlier rows."""
        if not self.sources:
            return ""
        if all(source.conversations is None for source in self.sources):
            return "rows with tokens of earlier rows are copied"
        if self.rows is None:
            return f"{len(_first_rows(self.sources))} answers in the store"
        again = f", {self.prefilled} prefilled again (a prefill computes all layers)" if self.prefilled else ""
        return f"{self.new} of {self.rows} rows new{again}"


NO_REUSE = Reuse(sources=(), artifacts=())


def find_answers(store: Store, stage: str, preimage: Mapping[str, Any], own_key: str, prompts: Path | None) -> Reuse:
    """Find earlier answers for a stage that answers conversations.

    `preimage` may lack the input `prompts`; `prompts` is that artifact's data. The work directory of `own_key` does not
    count: the stage resumes from it.
    """
    identity = answers_identity(preimage)
    if identity is None:
        return NO_REUSE
    same = [a for a in store.artifacts(stage) if answers_identity(a.preimage) == identity and _is_usable(a)]
    fitting = {a.key for a in same if _has_hidden_states(a.preimage["config"], preimage["config"])}
    same.sort(key=lambda a: (a.key in fitting, _finished(a)), reverse=True)
    sources = [
        ReusableRows(
            conversations=a.data / "conversations.jsonl", hidden_states=a.data / "states" if a.key in fitting else None
        )
        for a in same
    ]
    for work, of_attempt in store.attempts(stage):
        if work.name != own_key and answers_identity(of_attempt) == identity:
            sources.append(ReusableRows(conversations=work / "scratch" / ANSWER_LOG))
    reuse = Reuse(sources=tuple(sources), artifacts=tuple(same))
    if prompts is None or not sources:
        return reuse
    return _counted(reuse, prompts, keeps_states="capture_layer_ids" in preimage["config"])


def find_extracted(store: Store, stage: str, preimage: Mapping[str, Any]) -> Reuse:
    """Find earlier extractions whose rows have the hidden states of a stage, which it finds by their tokens."""

    def model(image: Mapping[str, Any]) -> list[Any]:
        """What hidden states depend on besides tokens, layers and stored format."""
        target_dtype = image["config"].get("target.dtype")
        arguments = image["config"].get(ENGINE_ARGUMENTS)
        return [image["version"], image["inputs"].get(TARGET), image["service"], target_dtype, arguments]

    same = [
        artifact
        for artifact in store.artifacts(stage)
        if model(artifact.preimage) == model(preimage)
        and _has_hidden_states(artifact.preimage["config"], preimage["config"])
        and _is_usable(artifact)
    ]
    same.sort(key=_finished, reverse=True)
    return Reuse(sources=tuple(ReusableRows(hidden_states=artifact.data) for artifact in same), artifacts=tuple(same))


def _counted(reuse: Reuse, prompts: Path, *, keeps_states: bool) -> Reuse:
    """Add the numbers of conversations in `prompts` that have to be answered or prefilled."""
    try:
        with (prompts / "conversations.jsonl").open(encoding="utf-8") as lines:
            digests = [row_digest(json.loads(line)) for line in lines]
    except (OSError, ValueError, LookupError):
        return reuse  # the stage reports a damaged input
    rows = _first_rows(reuse.sources)
    prefilled = sum(rows.get(digest) is False for digest in digests) if keeps_states else 0
    return replace(reuse, rows=len(digests), new=sum(digest not in rows for digest in digests), prefilled=prefilled)


def _first_rows(sources: Iterable[ReusableRows]) -> dict[str, bool]:
    """Digest -> whether hidden states can be copied, too; of several sources of a row the first one counts."""
    rows: dict[str, bool] = {}
    for source in sources:
        for row in read_rows(source.conversations.parent) if source.conversations else ():
            if row.dropped != BAD_STATES:
                rows.setdefault(row.digest, source.hidden_states is not None or row.line is None)
    return rows


def answers_identity(preimage: Mapping[str, Any]) -> str | None:
    """Digest of all that answers depend on besides the conversation; None while the target is unknown.

    Both sides of a comparison are computed by this release: only the version in a preimage says what an earlier one did
    differently.
    """
    prefixes = tuple(f"{name}." for name in KINDS["regenerate"].reads)
    options = {name: value for name, value in preimage["config"].items() if f"{name}.".startswith(prefixes)}
    # A masked answer is the one that is kept; only what ends a conversation changes what follows.
    for name in (name for name in ("regenerate.on_cut", "regenerate.on_loop") if options.get(name) == "mask"):
        del options[name]
    if TARGET not in preimage["inputs"]:
        return None
    one_seed = bool(options.get("regenerate.temperature")) and preimage["version"] < SEEDED
    return key.digest([preimage["inputs"][TARGET], preimage["service"], options, one_seed])


def _has_hidden_states(stored: Mapping[str, Any], required: Mapping[str, Any]) -> bool:
    """Whether hidden states with the options `stored` include those with the options `required`, in the same format."""
    if not {"capture_layer_ids", "last_state"} <= stored.keys() & required.keys():
        return False
    return (
        all(stored.get(name) == required.get(name) for name in ("extract.dtype", "extract.connector"))
        and set(required["capture_layer_ids"]) <= set(stored["capture_layer_ids"])
        and stored["last_state"] in (required["last_state"], LastLayerPositions.everywhere.name)
    )


def _finished(artifact: Artifact) -> str:
    """When an artifact was finished; times sort as text."""
    return str(artifact.provenance.get("finished", ""))


def _is_usable(artifact: Artifact) -> bool:
    """Whether an artifact has all its files; one of another user, in a shared store, may be unreadable."""
    try:
        return is_complete(artifact)
    except PermissionError:
        return False
