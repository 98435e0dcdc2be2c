"""Terminal output: messages on stderr, data on stdout, readable without colour and at 80 columns.

The progress of a run is in `live`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from speculators.errors import RunError

if TYPE_CHECKING:
    from speculators.runner.planning.explain import Explanation

STATE_STYLES = {
    "cached": "dim",
    "run": "yellow",
    "running": "cyan",
    "again": "yellow",
    "done": "green",
    "failed": "red",
    "waits": "dim",
    "unneeded": "dim",
}
"""Styles of a stage by its state."""
_ANSI = {"dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_RUN_NAME = re.compile(r"(?<!\S)(\d{8}-\d{6})-[\w.-]*\w(?![\w./-])")
"""`20261130-160935-smollm2_eagle3`: time and recipe; not in a path."""
_UNBROKEN = re.compile(r"(?<=\d) (?=(?:[KMGT]i)?B\b)|(?<=: explain) ")
"""Blanks of `50.0 GiB` and `explain train`, at which no line breaks."""
NO_CURSOR = ("dumb", "unknown")
"""Values of TERM without cursor movement."""


def error(failure: RunError) -> None:
    """Print an error to stderr: `error: MESSAGE`, a blank line, `hint: HINT`; wrapped only on a terminal."""
    _print_wrapped(f"error: {failure.message}\n\nhint: {failure.hint}", 0)


def narrate(verb: str, subject: str, detail: str = "") -> None:
    """Print a line to stderr, with verb and subject in columns; wrapped only on a terminal."""
    _print_wrapped(f"{verb:<9}{subject:<19} {detail}".rstrip(), 29 if len(subject) < 20 and detail else 9)


def _print_wrapped(text: str, indent: int) -> None:
    """Print to stderr; on a terminal, lines break between words, so that `grep` finds the whole text elsewhere."""
    if sys.stderr.isatty():
        text = "\n".join(filled(line, width(sys.stderr), indent) for line in text.split("\n"))
    print(text, file=sys.stderr)


def filled(text: str, columns: int, indent: int) -> str:
    """Wrap a line between words; further lines are indented. A word that is wider, such as a path, stays whole."""
    begin = text[:indent]  # columns, whose blanks count
    wrapped = textwrap.fill(
        _UNBROKEN.sub("\N{NO-BREAK SPACE}", text[indent:]), max(columns, indent + 20), initial_indent=begin,
        subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return wrapped.replace("\N{NO-BREAK SPACE}", " ") or begin


def duration(seconds: float) -> str:
    """Format a duration: `8.0s`, `12s`, `3m12s`, `2h05m`."""
    seconds = max(0.0, seconds)  # a clock was set back, or an estimate was exceeded
    rounded = int(seconds + 0.5)
    if rounded < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Format a number of bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def dim(text: str) -> str:
    """Dim a text for stdout, if that is a terminal with styles."""
    return styled(text, "dim")


def styled(text: str, style: str) -> str:
    """Style a text (`dim`, or a colour) for stdout, if that is a terminal with styles and NO_COLOR is not set."""
    no_styles = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") in NO_CURSOR
    return text if no_styles or style not in _ANSI else f"\x1b[{_ANSI[style]}m{text}\x1b[0m"


def width(stream: TextIO | None = None) -> int:
    """Width in columns of a stream, by default of stdout; 80 if it is no terminal. COLUMNS takes precedence."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return 80
    with contextlib.suppress(OSError, ValueError):
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format rows as aligned columns; `right` are the indices of right-aligned columns."""
    table = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def fit_runs(text: str, columns: int) -> str:
    """Shorten names of runs to their times, by which `show` finds them too, if a text does not fit."""
    return text if len(text) <= columns else _RUN_NAME.sub(r"\1", text)


def listing(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format rows as aligned columns, the last of which is wrapped to the width of stdout."""
    table = [list(row) for row in rows]
    starts = columns([[*row[:-1], "|"] for row in table], right).splitlines()
    indent = max(start.rindex("|") for start in starts)
    lines = []
    for start, row in zip(starts, table, strict=True):
        text = fit_runs(row[-1], width() - indent)
        lines.append(filled(f"{start[:-1]:<{indent}}{text}".rstrip(), width(), indent))
    return "\n".join(lines)


def stage_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format stages as a listing: the state, in its colour, first; the reason last.

    Columns without a value are left out.
    """
    table = [list(head), *(list(row) for row in rows)]
    last = len(head) - 1
    used = [i for i in range(last) if any(row[i] for row in table[1:])] + [last]
    lines = listing([[row[i] for i in used] for row in table], [used.index(i) for i in right if i in used])
    shown: list[str] = []
    for line in lines.splitlines():
        state = line.partition(" ")[0]
        shown.append(styled(state, STATE_STYLES.get(state, "")) + line[len(state) :] if shown else dim(line))
    return "\n".join(shown)


def explanation(explained: Explanation) -> str:
    """Format an explanation: state and reason, the nearest artifact and its run, differences, and values in the key."""
    lines = [f"{explained.node}  {explained.state}  {explained.key[:8]}".rstrip()]
    lines += [filled(f"  {fit_runs(explained.reason, width() - 2)}", width(), 2)]
    if explained.because:
        lines += [f"  waits for {explained.because}"]
    if explained.nearest:
        title, nearest = "made" if explained.state == "cached" else "nearest", explained.nearest
        origin = f"{title}  {nearest['key'][:8]}  by {nearest['run']}  {nearest['finished'][:16]}"
        lines += ["", fit_runs(origin, width())]
        lines += [filled(f"  {nearest['words']}", width(), 2)] if nearest["words"] else []
    for title, changes in (("differs", explained.changes), ("differs, not in the key", explained.outside_the_key)):
        if changes:
            cells = [(f"  {c.name}", f"{_cell(c.old)} -> {_cell(c.new)}  {c.runs}".rstrip()) for c in changes]
            section = f"{title}\n{listing(cells)}"
            lines += ["", dim(section) if changes is explained.outside_the_key else section]
    if explained.key_values:
        values = listing((f"  {name}", _cell(value)) for name, value in explained.key_values.items())
        lines += ["", "in the key", values]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """Format a value of a key: digests shortened, other values truncated to 48 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:8]
    return text if len(text) <= 48 else f"{text[:45]}..."


def evaluation(results: Mapping[str, Any]) -> str:
    """Format `evaluation.json`: a table with one row per measurement, then the result of the losslessness check.

    Rows are grouped by the number of speculative tokens, and have a column for the requests in flight, if there are
    several.
    """
    measured = [(name, row) for name, dataset in results["datasets"].items() for row in dataset["measurements"]]
    counts = list(dict.fromkeys(row["num_speculative_tokens"] for _, row in measured))
    longest, several = max(counts), len({row["concurrency"] for _, row in measured}) > 1
    # Names of two words take two lines, so that the table fits 80 columns with up to four positions; else it is split.
    above = ["", *(["in"] if several else []), "acceptance", *([""] * longest), "baseline", "speculative", ""]
    head = ["dataset", *(["flight"] if several else []), "length"]
    head += [*(f"pos {i + 1}" for i in range(longest)), "tok/s", "tok/s", "speed-up"]
    rows = [above, head]
    for count in counts:
        rows += [[f"{count} tokens", *([""] * (len(head) - 1))]] if len(counts) > 1 else []
        for name, row in measured:
            if row["num_speculative_tokens"] == count:
                in_flight = [str(row["concurrency"])] if several else []
                rows.append([name, *in_flight, *_measurement(row, longest)])
    proposed = f" ({counts[0]} proposed)" if len(counts) == 1 else ""
    notes = [
        f"acceptance length: tokens per step with the bonus token{proposed}\n"
        "pos i: share of steps that accept at least i tokens"
    ]
    for lossless in filter(None, map(results.get, ("lossless_served", "lossless"))):
        notes.append(
            f"greedy in {lossless['dtype']}: {lossless['identical']} of {lossless['prompts']} outputs identical\n"
            f"({lossless['ties']} differ at numeric ties, {lossless['faults']} differ otherwise)"
        )
    return _split_positions(rows, head.index("pos 1"), longest) + "\n\n" + "\n".join(notes)


def _split_positions(rows: Sequence[Sequence[str]], first: int, count: int) -> str:
    """Format an evaluation as one table, or with its `count` columns of positions below where stdout is too narrow."""
    tables = [rows]
    if max(map(len, columns(rows).splitlines())) > width():
        tables = [[[*row[:first], *row[first + count :]] for row in rows]]
        names = [row[: first - 1] for row in rows]
        step = max(1, (width() - max(map(len, columns(names).splitlines()))) // 8)
        for start in range(first, first + count, step):
            end = min(start + step, first + count)
            tables.append([[*name, *row[start:end]] for name, row in zip(names, rows, strict=True)])
    texts = (columns(table, right=range(1, len(table[0]))) for table in tables)
    return "\n\n".join(text.strip("\n") for text in texts)


def _measurement(row: Mapping[str, Any], positions: int) -> list[str]:
    """The cells of a measurement, with so many positions."""
    shares = [f"{share:.3f}" for share in row["per_position"]]
    speeds = [f"{row[side]['tokens_per_second']:.1f}" for side in ("baseline", "speculative")]
    blank = [""] * (positions - len(shares))
    return [f"{row['acceptance_length']:.3f}", *shares, *blank, *speeds, f"{row['speed_up']:.2f}x"]


def training(summary: Mapping[str, Any]) -> str:
    """Format `summary.json` of a training: what it measured itself."""
    measured = summary.get("validation") or {}
    if "acceptance_length" not in measured:
        return f"{summary['steps']} steps; no validation split (train.validation_ratio=0)"
    return (
        f"acceptance length {measured['acceptance_length']:.3f} on the validation split "
        f"({summary['validation_rows']} conversations),\n"
        f"simulated from hidden states, after {summary['best_step']} of {summary['steps']} steps"
    )


def labelled(steps: Iterable[tuple[str, str]], columns: int) -> str:
    """Format labels and paths or commands.

    A command that does not fit `columns` goes on in the next line, behind a backslash, so that it works when pasted.
    """
    lines = []
    for label, text in steps:
        line = f"{label:<8}"
        for i, argument in enumerate(map(shlex.quote, shlex.split(text))):
            if i > 1 and len(line) + len(argument) + 3 > columns:
                lines.append(f"{line} \\")
                line = " " * 10
            line += f" {argument}"
        lines.append(line)
    return "\n".join(lines)
