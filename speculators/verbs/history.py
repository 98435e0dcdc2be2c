"""runs, show, compare: list, show and compare earlier runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speculators import ui
from speculators.config.execution import RunOptions
from speculators.errors import RecipeError
from speculators.runner import history, products
from speculators.runner.history import Run, Stage
from speculators.verbs import tokens, usage


def runs(argv: list[str]) -> int:
    """List the runs of a directory, oldest first."""
    directory, _, as_data = _parse("runs", argv)
    all_runs = history.list_runs(directory)
    if as_data:
        print(json.dumps([_as_json(run) for run in all_runs], indent=1))
    elif all_runs:
        head = ("run", "status", "time", "ran", "length", "speed-up")
        print(ui.columns([head, *map(_row, all_runs)], right=[2, 3, 4, 5]))
        if any(run.metrics for run in all_runs):
            print("\nran: stages that ran; length: acceptance length, tokens per step with the")
            print("bonus token, as the mean over datasets")
    else:
        ui.narrate("empty", str(directory))
    return 0


def show(argv: list[str]) -> int:
    """Show a run, stage by stage, or one of its stages, or a row of its tokens."""
    directory, names, as_data = _parse("show", argv)
    row = usage.parse("show", argv).flags.get("--row")
    of_tokens = names[:1] == ["tokens"]
    if not 1 <= len(names) - of_tokens <= 2:
        raise RecipeError("show needs the name of one run", "speculators-run show last, or show last train")
    run = history.find(directory, names[of_tokens])
    if of_tokens:
        tokens.show_tokens(run, names[2:], row or "0", as_data)
        return 0
    if row is not None:
        raise RecipeError("--row is for tokens", f"speculators-run show tokens {names[0]} --row {row}")
    stage = history.find_stage(run, names[1]) if names[1:] else None
    if as_data:
        stages = {name: dataclasses.asdict(stage) for name, stage in run.stages.items()}
        values = dataclasses.asdict(stage) if stage else {**_as_json(run), "stages": stages, "config": run.config}
        print(json.dumps(values, indent=1))
    else:
        print(_one_stage(run, stage) if stage else _whole_run(run))
    return 0


def _whole_run(run: Run) -> str:
    """A run: its stages, what they dropped, their artifacts and logs, and the metrics."""
    stages = [stage for stage in run.stages.values() if stage.attempts or stage.state not in ("unneeded", "")]
    rows = [_stage_row(stage) for stage in stages]
    paragraphs = [
        f"{run.name}  {run.status}  {ui.duration(run.seconds)}\n{run.path}"
        + ("\n" + ui.filled(f"arguments: {' '.join(run.argv)}", ui.width(), 11) if run.argv else ""),
        ui.stage_table(("state", "stage", "time", "key", "why"), rows, right=[2]) if rows else "",
        *(ui.filled(f"{stage.node} {stage.state}: {stage.message.splitlines()[0]}", ui.width(), 2)
          for stage in stages if stage.message and stage.state != "done"),
        _section("dropped", [(str(count), stage.node, reason) for stage in stages
                             for reason, count in history.dropped(stage.record).items()], right=[0]),
        _section("artifacts", [(stage.node, stage.path) for stage in stages if stage.path]),
        _section("logs", [(stage.node, _log(run, stage)) for stage in stages if stage.log]),
        _section("metrics", [(name, _number(value)) for name, value in run.metrics.items()], right=[1]),
        ui.labelled(products.next_steps(run), ui.width()),
    ]  # fmt: skip
    return "\n\n".join(filter(None, paragraphs))


def _one_stage(run: Run, stage: Stage) -> str:
    """A stage of a run: all that is known of it."""
    state, _, time, key, reason = _stage_row(stage)
    facts = [("run", run.name), ("time", time), ("why", reason), ("key", stage.key), ("artifact", stage.path)]
    facts += [("log", _log(run, stage))] if stage.log else []
    values = [(name, _value(value)) for name, value in history.values(stage.record).items()]
    paragraphs = [
        f"{stage.label}  {state}  {key}".rstrip() + "\n" + ui.listing((f"  {n}", v) for n, v in facts if v),
        stage.message if stage.state != "done" else "",
        _section("dropped", [(str(count), reason) for reason, count in history.dropped(stage.record).items()], [0]),
        _section("notes", [(note,) for note in stage.record.get("notes", ())]),
        _section("record", values),
    ]
    return "\n\n".join(filter(None, paragraphs))


def _section(title: str, rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Indented columns under a title; empty without rows."""
    if not rows:
        return ""
    aligned = ui.columns if len(rows[0]) - 1 in right else ui.listing
    return f"{title}\n" + aligned([("", *row) for row in rows], [i + 1 for i in right])


def compare(argv: list[str]) -> int:
    """Compare runs, or all runs of a directory: the options in which they differ, and their metrics."""
    directory, names, as_data = _parse("compare", argv)
    compared = [run for name in names for run in _find_runs(directory, name)]
    if len(compared) < 2:
        raise RecipeError(
            f"compare needs two runs or more, and `{' '.join(names)}` is one" if compared else "compare names no run",
            "name another one too; `speculators-run runs` lists them",
        )
    options, metrics = history.differing_options(compared), history.metrics_by_run(compared)
    if as_data:
        rows = [{**_as_json(run), "options": {name: values[i] for name, values in options.items()}}
                for i, run in enumerate(compared)]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return 0
    cells = {name: [_value(value) for value in values] for name, values in options.items()}
    cells |= {name: [_number(value) for value in values] for name, values in metrics.items()}
    print(comparison([run.name for run in compared], [run.status for run in compared], cells, ui.width()))
    if not options:
        print("\nno option differs")
    return 0


def comparison(names: Sequence[str], statuses: Sequence[str], cells: Mapping[str, Sequence[str]], width: int) -> str:
    """Format a comparison with one row per run if it fits into `width` columns, else one row per option or metric."""
    shared = {name.partition("-")[2].partition("-")[2] for name in names}
    # `20261122-125421-recipe`: the time suffices if all runs are of one recipe.
    labels = [name.removesuffix(f"-{next(iter(shared))}") for name in names] if len(shared) == 1 else list(names)
    heads = [_head(name) for name in cells]
    depth = max(map(len, heads), default=1)
    table = [["run" if i == 0 else "", *(head[i] if i < len(head) else "" for head in heads)] for i in range(depth)]
    table += [[label, *(values[i] for values in cells.values())] for i, label in enumerate(labels)]
    text = ui.columns(table, right=range(1, len(cells) + 1))
    if max(map(len, text.splitlines())) <= width:
        return text
    numbers = [str(i + 1) for i in range(len(names))]
    legend = ui.columns(zip(numbers, names, statuses, strict=True), right=[0])
    return legend + "\n\n" + "\n\n".join(_blocks(numbers, cells, width))


def _head(name: str) -> list[str]:
    """Split a dotted name into up to three lines."""
    parts = name.split(".", 2)
    return [*(f"{part}." for part in parts[:-1]), parts[-1]]


def _blocks(numbers: Sequence[str], cells: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """Tables with one row per name and one column per run, each with as many runs as fit."""
    name_width = max(map(len, cells), default=0)
    cell_width = 2 + max(len(text) for texts in (numbers, *cells.values()) for text in texts)
    step = max(1, (width - name_width) // cell_width)
    blocks = []
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        rows = [["", *numbers[part]], *([name, *values[part]] for name, values in cells.items())]
        blocks.append(ui.columns(rows, right=range(1, len(rows[0]))))
    return blocks


def _parse(verb: str, argv: list[str]) -> tuple[Path, list[str], bool]:
    """The directory of runs, the names of runs, and whether to print JSON."""
    arguments = usage.parse(verb, argv)
    return Path(arguments.options.get("run.dir") or RunOptions().dir).expanduser(), arguments.names, arguments.as_json


def _find_runs(directory: Path, name: str) -> list[Run]:
    """The runs of the directory `name`, else the run `name`."""
    below = history.list_runs(Path(name).expanduser())
    return below or [history.find(directory, name)]


def _as_json(run: Run) -> dict[str, Any]:
    values = dataclasses.asdict(run)
    del values["config"], values["stages"]
    return {"words": values.pop("argv"), **values, "path": str(run.path)}


def _row(run: Run) -> tuple[str, ...]:
    num_run = sum(stage.state == "done" for stage in run.stages.values())
    means = [_mean(run, name) for name in ("acceptance_length", "speed_up")]
    length, speed_up = (f"{mean:.2f}" if mean is not None else "-" for mean in means)
    return run.name, run.status, ui.duration(run.seconds), str(num_run or "-"), length, speed_up


def _mean(run: Run, name: str) -> float | None:
    values = [value for metric, value in run.metrics.items() if f".{name}." in metric]
    return sum(values) / len(values) if values else None


def _stage_row(stage: Stage) -> tuple[str, ...]:
    took = ui.duration(stage.seconds) if stage.seconds is not None else ""
    tries = f"  (attempt {stage.attempts})" if stage.attempts > 1 else ""
    return stage.state, stage.label, took, stage.key[:8], stage.reason + tries


def _log(run: Run, stage: Stage) -> str:
    """Path of a stage's log, relative to the run directory if it is inside."""
    log = Path(stage.log)
    return str(log.relative_to(run.path)) if log.is_relative_to(run.path) else str(log)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _value(value: Any) -> str:
    """Format the value of an option, truncated to 24 characters."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if len(text) <= 24 else f"{text[:21]}..."
