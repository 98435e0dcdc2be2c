"""Expected duration and size of each stage, from the nearest earlier artifact of its kind.

Durations are taken only from artifacts of a machine that is as fast as this one (processor, number of cores, GPUs),
made with the same target in the same dtype. They are scaled by the amount of work, except for the start of servers and
processes. Rows that earlier artifacts have already are no work. Nothing is guessed: without such an artifact a duration
is unknown.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speculators.machine import describe_machine, equally_fast
from speculators.runner import executors
from speculators.runner.planning import key
from speculators.runner.planning.graph import TARGET
from speculators.runner.planning.plan import Planner, State, Step
from speculators.runner.planning.workload import Workload
from speculators.runner.store.artifact import Artifact

IMPORT_SECONDS = 5.0
"""First seconds of a stage, in which it imports packages: a stage that took no longer tells nothing of its speed."""
SIMILAR_AMOUNT = 4.0
"""Amounts of work that differ by less than this factor count as equal, so that the newest artifact is taken."""
SHARED_SERVERS = {"generate", "extract"}
"""Modes of servers that stages share, so that only the first of them waits for the start."""
GROWING = {"regenerate", "tokenize", "extract", "adopt_tokens", "adopt_states"}
"""Kinds of stages whose output grows with the amount of work."""
NO_OPTION = ("input ", "package ", "service ", "version")
"""Beginnings of the names in a preimage that are not options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Expected duration and size of a stage; None: unknown."""

    seconds: float | None
    bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """How long an earlier attempt took, in seconds."""

    start: float
    """Until the stage began: the start of its servers and of its worker."""
    fixed: float
    """Part of the stage that does not depend on the amount of work."""
    scaled: float
    """The other part, for `amount`."""
    amount: float
    """Amount of work, in tokens; 1 where all artifacts that are compared took the same."""
    bytes: int
    """Size of the artifact."""
    phases: int
    """How often the stage started servers, one set after the other."""


def expected(planner: Planner, steps: Mapping[str, Step], work: Workload | None) -> dict[str, Expected]:
    """Estimate every stage that runs, by node, in data-flow order."""
    nearest = _nearest(planner, steps, work)
    shared_start = max((m.start for name, m in nearest.items() if steps[name].node.mode in SHARED_SERVERS), default=0.0)
    estimates: dict[str, Expected] = {}
    for name, step in steps.items():
        if step.state not in (State.run, State.waits):
            continue
        measured, amount = nearest.get(name), _planned_amount(planner, step, work)
        if measured is None or not amount:
            estimates[name] = Expected(seconds=None, bytes=None)
            continue
        ratio, start = amount / measured.amount, measured.start * _phases(planner, step) / measured.phases
        if step.node.mode in SHARED_SERVERS:  # the first stage that uses the server waits for its start
            start, shared_start = shared_start, 0.0
        size = measured.bytes * (ratio if step.node.kind in GROWING else 1.0)
        seconds = start + measured.fixed + ratio * _new_share(step) * measured.scaled
        estimates[name] = Expected(seconds=seconds, bytes=round(size))
    return estimates


def _nearest(planner: Planner, steps: Mapping[str, Step], work: Workload | None) -> dict[str, _Measured]:
    """The nearest earlier artifact of each stage: by the number of different options, the amount of work, and age."""
    machine = describe_machine()
    digests = {name: step.digest for name, step in steps.items() if step.digest}
    nearest: dict[str, _Measured] = {}
    for name, step in steps.items():
        best: tuple[float, float, str] | None = None
        amount = _planned_amount(planner, step, work) or 1.0
        image = planner.known(name, digests)
        elsewhere = executors.is_remote(planner.config, step.node.kind)
        for artifact in planner.store.artifacts(step.node.kind):
            if not (elsewhere or equally_fast(artifact.provenance, machine)) or not _comparable(artifact, image):
                continue
            if (measured := _measured(artifact)) is None:
                continue
            different = sum(
                not name.startswith(NO_OPTION) for name, *_ in key.preimage_differences(artifact.preimage, image)
            )
            distance = abs(math.trunc(math.log(amount / measured.amount, SIMILAR_AMOUNT)))
            rank = (-different, -distance, str(artifact.provenance.get("finished", "")))
            if best is None or rank > best:
                best, nearest[name] = rank, measured
    return nearest


def _comparable(artifact: Artifact, image: Mapping[str, Any]) -> bool:
    """Whether the duration of an earlier artifact says something about a stage with this preimage."""
    earlier = artifact.preimage
    if artifact.stage == "fetch":
        return bool(earlier["config"].get("source") == image["config"].get("source"))
    if artifact.stage == "prompts":  # reads the whole data files, whatever it keeps of them
        return bool(earlier["inputs"] == image["inputs"])
    if "target.dtype" not in image["config"]:
        return True
    same_dtype = earlier["config"].get("target.dtype") == image["config"]["target.dtype"]
    return bool(same_dtype and earlier["inputs"].get(TARGET) == image["inputs"].get(TARGET))


def _measured(artifact: Artifact) -> _Measured | None:
    """The durations of an earlier artifact; None if it does not have them, or did no work."""
    record, provenance = artifact.record, artifact.provenance
    seconds, amount = float(record.get("seconds") or 0.0), _amount(artifact)
    if not seconds or not amount:
        return None
    start = 0.0
    if "began" in provenance and provenance.get("attempt") == 1:
        start = max(0.0, _between(provenance["began"], provenance["finished"]) - seconds)
    speed = float(record.get("tokens_per_second") or 0.0)
    if artifact.stage == "train":
        # An attempt that resumed has trained on a part of the tokens only, so its speed counts.
        fixed = max(0.0, seconds - float(record.get("seconds_in_steps", seconds)))
        scaled = float(record.get("tokens", 0)) / speed if speed else seconds - fixed
    elif artifact.stage in ("regenerate", "extract"):
        if not speed:
            return None
        scaled = amount / speed
        fixed = 0.0 if record.get("resumed") or record.get("reused") else max(0.0, seconds - scaled)
    else:
        fixed = min(seconds, max(IMPORT_SECONDS, float(provenance.get("import_seconds", 0.0))))
        scaled = seconds - fixed
    phases = _passes(artifact) if artifact.stage == "evaluate" else 1
    return _Measured(start=start, fixed=fixed, scaled=scaled, amount=amount, bytes=artifact.bytes, phases=phases)


def _amount(artifact: Artifact) -> float:
    """Amount of work of an earlier artifact; 0 if it is unknown."""
    record, options = artifact.record, artifact.preimage["config"]
    if artifact.stage in ("fetch", "prompts"):
        return 1.0
    if artifact.stage == "train":
        return float(record.get("steps", 0) * options.get("train.batch_tokens", 0))
    if artifact.stage == "evaluate":
        prompts = sum(counts.get("prompts", 0) for counts in record.get("datasets", {}).values())
        concurrencies = len(options.get("evaluate.concurrency", ()))
        return float(prompts * options.get("evaluate.max_tokens", 0) * concurrencies * _passes(artifact))
    names = {"regenerate": "answer_tokens", "vocab": "supervised_tokens"}
    return float(record.get(names.get(artifact.stage, "tokens"), 0))


def _passes(artifact: Artifact) -> int:
    """How often an evaluation had its prompts answered: by the baseline, and with each number of speculative tokens."""
    return 1 + len(artifact.preimage["config"].get("num_speculative_tokens") or [0])


def _phases(planner: Planner, step: Step) -> int:
    """The same for a stage of the plan; 1 for other stages than `evaluate`."""
    return 1 + max(1, len({*planner.config.evaluate.num_speculative_tokens})) if step.node.kind == "evaluate" else 1


def _new_share(step: Step) -> float:
    """The share of a stage's conversations that have to be answered; one that is only prefilled counts as none."""
    return step.reuse.new / step.reuse.rows if step.reuse.rows else 1.0


def _planned_amount(planner: Planner, step: Step, work: Workload | None) -> float | None:
    """Amount of work of a stage of the plan, in the unit of `_amount`; None if it is unknown."""
    config, kind = planner.config, step.node.kind
    if kind in ("fetch", "prompts"):
        return 1.0
    if kind == "evaluate":
        options = config.evaluate
        prompts = options.num_prompts * len(options.datasets)
        return float(prompts * options.max_tokens * len(options.concurrency) * _phases(planner, step))
    if work is None or step.node.parts or step.node.part is not None:
        return None
    if kind == "train":
        tokens = config.train.epochs * work.tokens * (1 - config.train.validation_ratio)
        longest = math.inf if config.train.max_steps is None else config.train.max_steps * config.train.batch_tokens
        return min(tokens, longest)
    return float(work.answer_tokens if kind in ("regenerate", "vocab") else work.tokens)


def _between(began: str, finished: str) -> float:
    """Seconds between two times of a provenance."""
    first, last = (datetime.datetime.fromisoformat(time) for time in (began, finished))
    return (last - first).total_seconds()
