"""What happened in earlier runs, from what they left: config.json, events.jsonl, run.json, and artifacts' records.

Nothing here asks the store or composes a recipe, so a run can be looked at when its recipe, its store or the release
that made it are no more. A run that was killed has no run.json; its events tell how far it came.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.errors import RecipeError, closest
from speculators.runner.servers import guard

METRICS: Mapping[str, tuple[str, ...]] = {
    "train": ("validation.acceptance_length", "validation.loss"),
    "evaluate": ("acceptance_length", "speed_up", "lossless.faults"),
}
"""By kind of stage, what of its record is a result; a section stands for all numbers in it."""
_NOT_COMPARED = ("recipe", "run.", "force", "from_", "until", "only")
"""Options that say where and how much is run, and nothing about what comes out."""


@dataclass(kw_only=True, slots=True)
class Stage:
    """One node of one run."""

    node: str
    state: str = ""
    """`cached`, `done`, `failed`, `running`, `stopped`, or what was planned and never came to be."""
    reason: str = ""
    key: str = ""
    seconds: float | None = None
    attempts: int = 0
    log: str = ""
    message: str = ""
    """Of a failure, in full."""
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Run:
    """One run directory, read."""

    name: str
    path: Path
    recipe: str
    started: str
    status: str
    """`done`, `failed`, `interrupted`, `running`, or `killed`: it ended without a word."""
    seconds: float
    words: list[str]
    """Of its command line."""
    config: dict[str, Any]
    """The resolved recipe."""
    stages: dict[str, Stage]
    metrics: dict[str, float]
    """`evaluate.speed_up.human_eval` -> 1.21; of stages that were cached too."""


def runs(directory: Path) -> list[Run]:
    """Every run below a directory, oldest first; what is no run directory is passed over."""
    if not directory.is_dir():
        return []
    found = [run for path in directory.iterdir() if path.is_dir() and (run := read(path)) is not None]
    return sorted(found, key=lambda run: (run.started, run.name))


def find(directory: Path, word: str) -> Run:
    """The run that `word` means: `last`, its name, the only one whose name begins so, or its path.

    Raises:
        RecipeError: there is none, or several begin so.
    """
    names = sorted(path.name for path in directory.iterdir() if _is_run(path)) if directory.is_dir() else []
    if word == "last":
        if not (every := runs(directory)):
            raise RecipeError(f"there is no run in `{directory}`", "name where they are: run.dir=PATH")
        return every[-1]
    fitting = [word] if word in names else [name for name in names if name.startswith(word)]
    if len(fitting) > 1:
        shown = ", ".join(fitting[:3]) + (", ..." if len(fitting) > 3 else "")
        raise RecipeError(f"{len(fitting)} runs begin with `{word}`: {shown}", "type more of the name")
    path = directory / fitting[0] if fitting else Path(word).expanduser()
    run = read(path) if fitting or _is_run(path) else None
    if run is None:
        hint = closest(word, names) if names else "name where they are: run.dir=PATH"
        raise RecipeError(f"there is no run `{word}` in `{directory}`", hint)
    return run


def read(path: Path) -> Run | None:
    """The run at a directory, None if there is none. A file that is damaged counts as missing."""
    if not _is_run(path):
        return None
    events, report, config = list(_events(path)), _json(path / "run.json"), _json(path / "config.json")
    first: Mapping[str, Any] = next((e for e in events if e.get("event") == "run.started"), {})
    status = report.get("status") or ("running" if _alive(first.get("process", {})) else "killed")
    stages = _stages(events, report.get("steps", {}), over=status != "running")
    kinds = {name: step.get("stage", name) for name, step in report.get("steps", {}).items()}
    kinds = {name: wiring.get("uses", name) for name, wiring in config.get("pipeline", {}).items()} | kinds
    return Run(
        name=path.resolve().name,
        path=path.resolve(),
        recipe=str(config.get("recipe") or first.get("recipe", "")),
        started=str(first.get("time", "")),
        status=status,
        seconds=float(report.get("seconds") or _span(events)),
        words=list(first.get("words", ())),
        config=config,
        stages=stages,
        metrics=_metrics(stages, kinds),
    )


def options(found: Sequence[Run]) -> dict[str, list[Any]]:
    """The options of the resolved recipes in which runs differ: by dotted name, each run's value, None for none."""
    flat = [dict(_leaves(run.config)) for run in found]
    names = sorted({name for leaves in flat for name in leaves if not name.startswith(_NOT_COMPARED)})
    table = {name: [leaves.get(name) for leaves in flat] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def metrics(found: Sequence[Run]) -> dict[str, list[float | None]]:
    """Every metric that one of the runs has, with each run's value."""
    names = list(dict.fromkeys(name for run in found for name in run.metrics))
    return {name: [run.metrics.get(name) for run in found] for name in names}


def _is_run(path: Path) -> bool:
    return (path / "events.jsonl").is_file()


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether the runner that wrote this down about itself is at work on this machine."""
    start = guard.start_time(process["pid"]) if process.get("machine") == guard.machine() else None
    return start is not None and start == process["start"]


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The last line of a run that was killed may be cut off."""
    for line in (path / "events.jsonl").read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _span(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from the first to the last event."""
    times = [datetime.datetime.fromisoformat(e["time"]) for e in events if "time" in e]
    return (times[-1] - times[0]).total_seconds() if times else 0.0


def _stages(
    events: Sequence[Mapping[str, Any]], steps: Mapping[str, Mapping[str, Any]], *, over: bool
) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for event in events:
        if "node" in event:
            _hear(found.setdefault(event["node"], Stage(node=event["node"])), event)
    for name, step in steps.items():
        stage = found.setdefault(name, Stage(node=name, state=step.get("state", ""), reason=step.get("reason", "")))
        stage.key = stage.key or step.get("key", "")
        if not stage.record and step.get("path"):
            stage.record = _record(Path(step["path"]))
    for stage in found.values():
        if over and stage.state in ("running", "retrying"):
            stage.state = "stopped"
    return found


def _hear(stage: Stage, event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "stage.decided":
        stage.state, stage.reason, stage.key = event["state"], event["reason"], event["key"]
    elif kind == "stage.started":
        stage.state, stage.log = "running", event["log"]
        stage.attempts = event.get("attempt", 1)
    elif kind == "stage.retried":
        stage.state, stage.message = "retrying", event["message"]
    elif kind == "stage.finished":
        stage.state, stage.seconds, stage.key = "done", event["seconds"], event["key"]
        stage.record = event["record"]
    elif kind == "stage.failed":
        stage.state, stage.message = "failed", event["message"]


def _record(path: Path) -> dict[str, Any]:
    """The record of the artifact that a step's output is, a directory or one file in it; empty if it has gone."""
    data = next((p for p in (path, path.parent) if p.name == "data"), None)
    record = _json(data.parent / "artifact.json").get("record", {}) if data else {}
    return record if isinstance(record, dict) else {}


def _metrics(stages: Mapping[str, Stage], kinds: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, stage in stages.items():
        numbers = dict(_leaves(stage.record))
        for wanted in METRICS.get(kinds.get(name, name), ()):
            for leaf, value in numbers.items():
                if f"{leaf}.".startswith(f"{wanted}.") and isinstance(value, (int, float)):
                    found[f"{name}.{leaf}"] = value
    return found


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in value.items():
        if isinstance(child, Mapping):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
