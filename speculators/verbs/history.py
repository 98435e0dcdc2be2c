"""runs, show, compare: what happened in earlier runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speculators import ui
from speculators.config.schema import RunOptions
from speculators.errors import RecipeError
from speculators.runner import history
from speculators.runner.history import Run, Stage


def runs(words: list[str]) -> int:
    """The runs of a directory, oldest first."""
    directory, names, as_data = _words(words)
    if names:
        raise RecipeError(f"`runs` takes no `{names[0]}`", "speculators-run runs run.dir=PATH")
    found = history.runs(directory)
    if as_data:
        print(json.dumps([_plain(run) for run in found], indent=1))
    elif found:
        head = ("run", "status", "took", "made", "accepted", "speed-up")
        print(ui.columns([head, *map(_row, found)], right=[2, 3, 4, 5]))
        if any(run.metrics for run in found):
            print("\naccepted: tokens a step, bonus included. Means over the sets of `evaluate`.")
    else:
        ui.narrate("empty", str(directory))
    return 0


def show(words: list[str]) -> int:
    """What one run did, stage by stage."""
    directory, names, as_data = _words(words)
    if len(names) != 1:
        raise RecipeError("show wants one run", "speculators-run show last")
    run = history.find(directory, names[0])
    if as_data:
        stages = {name: dataclasses.asdict(stage) for name, stage in run.stages.items()}
        print(json.dumps({**_plain(run), "stages": stages, "config": run.config}, indent=1))
        return 0
    print(f"{run.name}  {run.status}  {ui.duration(run.seconds)}\n{run.path}")
    print(f"words: {' '.join(run.argv)}\n" if run.argv else "")
    told = [stage for stage in run.stages.values() if stage.attempts or stage.state not in ("unneeded", "")]
    print(ui.columns(_stage_row(stage) for stage in told))
    for stage in told:
        if stage.message and stage.state != "done":
            print(f"\n{stage.node} {stage.state}: {stage.message.splitlines()[0]}")
    if logs := [(stage.node, _log(run, stage)) for stage in told if stage.log]:
        print("\nlogs\n" + ui.columns((f"  {name}", log) for name, log in logs))
    if run.metrics:
        print("\nmetrics\n" + ui.columns([(f"  {n}", _number(v)) for n, v in run.metrics.items()], right=[1]))
    return 0


def compare(words: list[str]) -> int:
    """Metrics of several runs, or of all below a directory, against the options in which they differ."""
    directory, names, as_data = _words(words)
    found = [run for name in names for run in _meant(directory, name)]
    if len(found) < 2:
        raise RecipeError("compare wants two runs or more", "speculators-run compare RUN RUN, or compare DIRECTORY")
    options, metrics = history.differing_options(found), history.metrics_by_run(found)
    if as_data:
        rows = [{**_plain(run), "options": {name: values[i] for name, values in options.items()}}
                for i, run in enumerate(found)]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return 0
    cells = {name: [_value(value) for value in values] for name, values in options.items()}
    cells |= {name: [_number(value) for value in values] for name, values in metrics.items()}
    print(comparison([run.name for run in found], [run.status for run in found], cells, ui.width()))
    if not options:
        print("\nno option differs")
    return 0


def comparison(names: Sequence[str], states: Sequence[str], cells: Mapping[str, Sequence[str]], width: int) -> str:
    """One row a run where that fits into `width` columns; else one row an option or metric, the runs numbered."""
    shared = {name.partition("-")[2].partition("-")[2] for name in names}
    # `20261122-125421-recipe`: where all are of one recipe, the time says which.
    labels = [name.removesuffix(f"-{next(iter(shared))}") for name in names] if len(shared) == 1 else list(names)
    heads = [_head(name) for name in cells]
    depth = max(map(len, heads), default=1)
    table = [["run" if i == 0 else "", *(head[i] if i < len(head) else "" for head in heads)] for i in range(depth)]
    table += [[label, *(values[i] for values in cells.values())] for i, label in enumerate(labels)]
    text = ui.columns(table, right=range(1, len(cells) + 1))
    if max(map(len, text.splitlines())) <= width:
        return text
    numbers = [str(i + 1) for i in range(len(names))]
    legend = ui.columns(zip(numbers, names, states, strict=True), right=[0])
    return legend + "\n\n" + "\n\n".join(_blocks(numbers, cells, width))


def _head(name: str) -> list[str]:
    """A dotted name over up to three lines."""
    parts = name.split(".", 2)
    return [*(f"{part}." for part in parts[:-1]), parts[-1]]


def _blocks(numbers: Sequence[str], cells: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """One row a name and one column a run, cut into blocks of as many runs as fit."""
    name_width = max(map(len, cells), default=0)
    cell_width = 2 + max(len(text) for texts in (numbers, *cells.values()) for text in texts)
    step = max(1, (width - name_width) // cell_width)
    blocks = []
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        rows = [["", *numbers[part]], *([name, *values[part]] for name, values in cells.items())]
        blocks.append(ui.columns(rows, right=range(1, len(rows[0]))))
    return blocks


def _words(words: list[str]) -> tuple[Path, list[str], bool]:
    """Where runs are, the names that were given, and whether data is wanted."""
    directory, names = RunOptions().dir, []
    for word in words:
        if word.startswith("run.dir="):
            directory = word.partition("=")[2]
        elif "=" in word or (word.startswith("-") and word != "--json"):
            raise RecipeError(f"`{word}` is not understood here", "there is run.dir=PATH, and --json")
        elif word != "--json":
            names.append(word)
    return Path(directory).expanduser(), names, "--json" in words


def _meant(directory: Path, name: str) -> list[Run]:
    """One run, or every run below a directory that is none itself."""
    below = history.runs(Path(name).expanduser())
    return below or [history.find(directory, name)]


def _plain(run: Run) -> dict[str, Any]:
    plain = dataclasses.asdict(run)
    del plain["config"], plain["stages"]
    return {"words": plain.pop("argv"), **plain, "path": str(run.path)}


def _row(run: Run) -> tuple[str, ...]:
    made = sum(stage.state == "done" for stage in run.stages.values())
    means = [_mean(run, name) for name in ("acceptance_length", "speed_up")]
    accepted, speed_up = (f"{mean:.2f}" if mean is not None else "-" for mean in means)
    return run.name, run.status, ui.duration(run.seconds), str(made or "-"), accepted, speed_up


def _mean(run: Run, name: str) -> float | None:
    values = [value for metric, value in run.metrics.items() if f".{name}." in metric]
    return sum(values) / len(values) if values else None


def _stage_row(stage: Stage) -> tuple[str, ...]:
    took = ui.duration(stage.seconds) if stage.seconds is not None else ""
    tries = f"  (attempt {stage.attempts})" if stage.attempts > 1 else ""
    return stage.state, stage.node, took, stage.key[:8], stage.reason + tries


def _log(run: Run, stage: Stage) -> str:
    """Within the run directory, which the head of the page names."""
    log = Path(stage.log)
    return str(log.relative_to(run.path)) if log.is_relative_to(run.path) else str(log)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _value(value: Any) -> str:
    """An option as it is typed, cut to fit a column."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if len(text) <= 24 else f"{text[:21]}..."
