"""Terminal output: messages on stderr, data on stdout, readable without colour and at 80 columns.

The progress of a run is in `live`.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    return textwrap.fill(
        text[indent:], max(columns, indent + 20), initial_indent=begin, subsequent_indent=" " * indent,
        break_on_hyphens=False, break_long_words=False,
    ) or begin  # fmt: skip


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


def listing(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format rows as aligned columns, the last of which is wrapped to the width of stdout."""
    table = [list(row) for row in rows]
    lines = columns([[*row[:-1], "|"] for row in table], right).splitlines()
    indent = max(line.rindex("|") for line in lines)
    texts = zip(lines, table, strict=True)
    return "\n".join(filled(f"{line[:-1]:<{indent}}{row[-1]}".rstrip(), width(), indent) for line, row in texts)


def stage_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format stages as columns: the state, in its colour, first; the reason last, wrapped to the width of stdout.

    Columns without a value are left out. A reason that is too long begins in the columns before it if these are empty.
    """
    table = [list(head), *(list(row) for row in rows)]
    used = [i for i in range(len(head)) if any(row[i] for row in table[1:])]
    lines = columns([[row[i] for i in used[:-1]] for row in table], [used.index(i) for i in right if i in used[:-1]])
    wide = max(map(len, lines.splitlines())) + 2
    named = sum(max(len(row[i]) for row in table) + 2 for i in (0, 1))
    shown = []
    for line, row in zip(lines.splitlines(), table, strict=True):
        start = named if wide + len(row[-1]) > width() and not any(row[2:-1]) else wide
        wrapped = textwrap.wrap(
            row[-1], max(width(), start + 20), initial_indent=f"{line:<{start}}", subsequent_indent=" " * start,
            break_on_hyphens=False,
        ) or [line]  # fmt: skip
        state = row[0]
        wrapped[0] = (styled(state, STATE_STYLES.get(state, "")) + wrapped[0][len(state) :]).rstrip()
        shown += [dim(line) if row is table[0] else line for line in wrapped]
    return "\n".join(shown)


def explanation(explained: Explanation) -> str:
    """Format an explanation: state and reason, the nearest artifact and its run, differences, and values in the key."""
    lines = [f"{explained.node}  {explained.state}  {explained.key[:8]}".rstrip(), f"  {explained.reason}"]
    if explained.because:
        lines += [f"  waits for {explained.because}"]
    if explained.nearest:
        title, nearest = "made" if explained.state == "cached" else "nearest", explained.nearest
        lines += ["", f"{title}  {nearest['key'][:8]}  by {nearest['run']}  {nearest['finished'][:16]}"]
        lines += [f"  {nearest['words']}"] if nearest["words"] else []
    for title, changes in (("differs", explained.changes), ("differs, not in the key", explained.outside_the_key)):
        if changes:
            cells = [(f"  {c.name}", f"{_cell(c.old)} -> {_cell(c.new)}", c.runs) for c in changes]
            section = f"{title}\n{columns(cells)}"
            lines += ["", dim(section) if changes is explained.outside_the_key else section]
    if explained.key_values:
        values = columns((f"  {name}", _cell(value)) for name, value in explained.key_values.items())
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
    # Names of two words take two lines, so that the table fits 80 columns with up to four positions.
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
    return columns(rows, right=range(1, len(head))) + "\n\n" + "\n".join(notes)


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


def labelled(steps: Iterable[tuple[str, str]]) -> str:
    """Format labels and paths or commands; what does not fit 80 columns starts on a line of its own."""
    return "\n".join(f"{label:<9}" + (text if len(text) <= 71 else f"\n{text}") for label, text in steps)
