"""Reads earlier runs from their directories: config.json, events.jsonl, run.json, and the records of artifacts.

Nothing here uses the store or composes a recipe, so a run stays readable without its recipe, its store or the release
that made it. A killed run has no run.json; its state comes from its events.
"""

from __future__ import annotations

import datetime
import json
import re
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
"""By kind of stage, the fields of its record that are results; a section means all numbers in it."""
_NOT_COMPARED = ("recipe", "run.", "force", "from_", "until", "only")
"""Options that do not affect results, only where and how much is run."""
_NO_RUNS = "runs are below the directory in which `speculators-run recipe=NAME` was started; for another: run.dir=PATH"


@dataclass(kw_only=True, slots=True)
class Stage:
    """One node of one run."""

    node: str
    kind: str = ""
    state: str = ""
    """`cached`, `done`, `failed`, `running`, `stopped`, or the planned state if it never started."""
    reason: str = ""
    key: str = ""
    seconds: float | None = None
    attempts: int = 0
    log: str = ""
    message: str = ""
    """The full error message of a failed stage."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Nodes by input name."""
    record: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    """Its output in the store; empty if there is none, or the run was killed."""

    @property
    def label(self) -> str:
        """`train`, or `extract (collect)` if the node is not named after its kind."""
        return f"{self.node} ({self.kind})" if self.kind not in ("", self.node) else self.node


@dataclass(kw_only=True, slots=True)
class Run:
    """One run, read from its directory."""

    name: str
    path: Path
    recipe: str
    started: str
    status: str
    """`done`, `failed`, `interrupted`, `running`, or `killed`: it ended without recording a status."""
    seconds: float
    argv: list[str]
    """Its command line."""
    config: dict[str, Any]
    """The resolved recipe."""
    stages: dict[str, Stage]
    metrics: dict[str, float]
    """`evaluate.speed_up.human_eval` -> 1.21; includes cached stages."""


def list_runs(directory: Path) -> list[Run]:
    """All runs below a directory, oldest first; other directories are skipped."""
    if not directory.is_dir():
        return []
    all_runs = [run for path in directory.iterdir() if path.is_dir() and (run := read_run(path)) is not None]
    return sorted(all_runs, key=lambda run: (run.started, run.name))


def find(directory: Path, name: str) -> Run:
    """Find a run by `last`, its name, an unambiguous prefix of its name, or its path.

    Raises:
        RecipeError: there is no such run, or several names have the prefix.
    """
    names = sorted(path.name for path in directory.iterdir() if _is_run(path)) if directory.is_dir() else []
    if name == "last":
        if not (all_runs := list_runs(directory)):
            raise RecipeError(f"there is no run in `{directory}`", _NO_RUNS)
        return all_runs[-1]
    fitting = [name] if name in names else [other for other in names if other.startswith(name)]
    if len(fitting) > 1:
        shown = ", ".join(fitting[:3]) + (", ..." if len(fitting) > 3 else "")
        raise RecipeError(f"{len(fitting)} runs begin with `{name}`: {shown}", "give more of the name")
    path = directory / fitting[0] if fitting else Path(name).expanduser()
    run = read_run(path) if fitting or _is_run(path) else None
    if run is None:
        if path.resolve() == directory.resolve():
            raise RecipeError(f"`{name}` holds no runs", _NO_RUNS)
        raise RecipeError(f"there is no run `{name}` in `{directory}`", closest(name, names) if names else _NO_RUNS)
    return run


def read_run(path: Path) -> Run | None:
    """Read a run's directory; None if it is not one. A damaged file counts as missing."""
    if not _is_run(path):
        return None
    events, report, config = list(_events(path)), _json(path / "run.json"), _json(path / "config.json")
    first: Mapping[str, Any] = next((e for e in events if e.get("event") == "run.started"), {})
    status = report.get("status") or ("running" if _alive(first.get("process", {})) else "killed")
    stages = _stages(events, report.get("steps", {}), over=status != "running")
    for name, stage in stages.items():
        stage.kind = stage.kind or config.get("pipeline", {}).get(name, {}).get("uses", name)
    return Run(
        name=path.resolve().name,
        path=path.resolve(),
        recipe=str(config.get("recipe") or first.get("recipe", "")),
        started=str(first.get("time", "")),
        status=status,
        seconds=float(report.get("seconds") or _span(events, running=status == "running")),
        argv=list(first.get("words", ())),
        config=config,
        stages=stages,
        metrics=_metrics(stages),
    )


def find_stage(run: Run, name: str) -> Stage:
    """Find a stage of a run by its name, or by its kind if the run has one stage of it.

    Raises:
        RecipeError: there is no such stage, or there are several of the kind.
    """
    of_kind = [stage for stage in run.stages.values() if stage.kind == name]
    if name in run.stages or len(of_kind) == 1:
        return run.stages.get(name) or of_kind[0]
    if of_kind:
        names = ", ".join(stage.node for stage in of_kind)
        raise RecipeError(f"several stages of {run.name} are of kind `{name}`", f"name one: {names}")
    raise RecipeError(f"{run.name} has no stage `{name}`", closest(name, run.stages))


def dropped(record: Mapping[str, Any]) -> dict[str, int]:
    """What a stage dropped, from its record: the reason -> how many, largest first.

    A record has them in sections `dropped` ({reason: count}, also by dataset), or as counts `dropped rows: REASON`.
    """
    counts = {}
    for name, count in _flatten(record):
        match = re.fullmatch(r"(?:(?P<of>.+)\.)?dropped(?:\.| (?P<what>\w+): )(?P<reason>.+)", name)
        if match and isinstance(count, int) and count:
            prefix = match["what"] or (match["of"] or "").rpartition(".")[2]
            counts[f"{prefix}: {match['reason']}" if prefix else match["reason"]] = count
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The other values of a record, by dotted name."""
    return {
        name: value for name, value in _flatten(record) if name != "notes" and re.search(r"\bdropped\b", name) is None
    }


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options in which the resolved recipes of runs differ: dotted name -> each run's value, None if unset."""
    configs = [dict(_flatten(run.config)) for run in runs]
    names = sorted({name for config in configs for name in config if not name.startswith(_NOT_COMPARED)})
    table = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def metrics_by_run(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """All metrics of these runs: name -> each run's value, None if it lacks the metric."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return {name: [run.metrics.get(name) for run in runs] for name in names}


def _is_run(path: Path) -> bool:
    return (path / "events.jsonl").is_file()


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether the runner with this record of itself still runs on this machine."""
    start = guard.start_time(process["pid"]) if process.get("machine") == guard.machine() else None
    return start is not None and start == process["start"]


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Read a run's events; the last line of a killed run may be truncated and is skipped."""
    for line in (path / "events.jsonl").read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _span(events: Sequence[Mapping[str, Any]], *, running: bool) -> float:
    """Seconds from the first event to the last, or to now while the run goes on."""
    times = [datetime.datetime.fromisoformat(e["time"]) for e in events if "time" in e]
    if not times:
        return 0.0
    return ((datetime.datetime.now(datetime.UTC) if running else times[-1]) - times[0]).total_seconds()


def _stages(
    events: Sequence[Mapping[str, Any]], steps: Mapping[str, Mapping[str, Any]], *, over: bool
) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for event in events:
        if "node" in event:
            _apply(stages.setdefault(event["node"], Stage(node=event["node"])), event)
    for name, step in steps.items():
        stage = stages.setdefault(name, Stage(node=name, state=step.get("state", ""), reason=step.get("reason", "")))
        stage.key = stage.key or step.get("key", "")
        stage.kind, stage.path, stage.inputs = step.get("stage", ""), step.get("path") or "", step.get("inputs", {})
        if not stage.record and step.get("path"):
            stage.record = _record(Path(step["path"]))
    for stage in stages.values():
        if over and stage.state in ("running", "retrying"):
            stage.state = "stopped"
    return stages


def _apply(stage: Stage, event: Mapping[str, Any]) -> None:
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
    """The record of the artifact at a step's output path, a directory or a file in it; {} if it is gone."""
    data = next((p for p in (path, path.parent) if p.name == "data"), None)
    record = _json(data.parent / "artifact.json").get("record", {}) if data else {}
    return record if isinstance(record, dict) else {}


def _metrics(stages: Mapping[str, Stage]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, stage in stages.items():
        numbers = dict(_flatten(stage.record))
        for prefix in METRICS.get(stage.kind, ()):
            for metric, value in numbers.items():
                if f"{metric}.".startswith(f"{prefix}.") and isinstance(value, (int, float)):
                    metrics[f"{name}.{metric}"] = value
    return metrics


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in value.items():
        if isinstance(child, Mapping):
            yield from _flatten(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
