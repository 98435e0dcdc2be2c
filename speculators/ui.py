"""Terminal output: progress and messages on stderr, data on stdout. The only module that imports rich.

If stderr is a terminal, a run is shown as a live table; otherwise (a pipe, a file, CI) as lines of text. All output is
readable without colour and at 80 columns. rich is imported only for the table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from speculators.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from speculators.runner.planning.explain import Explanation

_COLOURS = {
    "cached": "dim",
    "run": "yellow",
    "running": "cyan",
    "again": "yellow",
    "done": "green",
    "failed": "red",
    "waits": "dim",
    "unneeded": "dim",
}
_NO_CURSOR = ("dumb", "unknown")
"""Values of TERM without cursor movement."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
"""Escape sequences and control characters."""


def error(failure: RunError) -> None:
    """Print an error to stderr: `error: MESSAGE`, a blank line, `hint: HINT`."""
    print(f"error: {failure.message}\n\nhint: {failure.hint}", file=sys.stderr)


def narrate(verb: str, subject: str, detail: str = "") -> None:
    """Print a line to stderr, with verb and subject in columns."""
    print(f"{verb:<9}{subject:<19} {detail}".rstrip(), file=sys.stderr)


def duration(seconds: float) -> str:
    """Format a duration: `8.0s`, `12s`, `3m12s`, `2h05m`."""
    rounded = int(seconds + 0.5)
    if rounded < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{rounded}s"
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
    no_styles = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") in _NO_CURSOR
    return text if no_styles else f"\x1b[2m{text}\x1b[0m"


def width() -> int:
    """Width of stdout in columns; 80 if it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 80


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Format rows as aligned columns; `right` are the indices of right-aligned columns."""
    table = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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
    """Format `evaluation.json`: a table with one row per dataset, then the result of the losslessness check."""
    k = results["num_speculative_tokens"]
    # Names of two words take two lines, so that the table fits 80 columns with up to four positions.
    above = ["", "acceptance", *([""] * k), "baseline", "speculative", ""]
    head = ["dataset", "length", *(f"pos {i + 1}" for i in range(k)), "tok/s", "tok/s", "speed-up"]
    rows = [above, head]
    for name, row in results["datasets"].items():
        positions = [f"{p:.3f}" for p in row["per_position"]]
        length = f"{row['acceptance_length']:.3f}"
        baseline, speculative = row["baseline"]["tokens_per_second"], row["speculative"]["tokens_per_second"]
        rows.append([name, length, *positions, f"{baseline:.1f}", f"{speculative:.1f}", f"{row['speed_up']:.2f}x"])
    notes = [
        f"acceptance length: tokens per step with the bonus token ({k} proposed)\n"
        "pos i: share of steps that accept at least i tokens"
    ]
    if lossless := results.get("lossless"):
        notes.append(
            f"greedy in float32: {lossless['identical']} of {lossless['prompts']} outputs identical\n"
            f"({lossless['ties']} differ at numeric ties, {lossless['faults']} differ otherwise)"
        )
    return columns(rows, right=range(1, len(head))) + "\n\n" + "\n".join(notes)


class Pace:
    """Estimates a stage's rate and remaining time from its progress in the last minute.

    The window excludes the work of an earlier attempt and a slow start; a new unit or total resets the estimate.
    """

    WINDOW, SHORTEST = 60.0, 1.0
    """Longest and shortest period, in seconds, over which the rate is computed."""

    def __init__(self) -> None:
        self._target: tuple[str, float] = ("", 0.0)
        self._seen: deque[tuple[float, float]] = deque()

    def update(self, event: Mapping[str, Any], now: float) -> None:
        """Add an event `stage.progress`; `now` in seconds."""
        target = (event["unit"], event["total"])
        if target != self._target or (self._seen and event["done"] < self._seen[-1][1]):
            self._target = target
            self._seen.clear()
        self._seen.append((now, event["done"]))
        while now - self._seen[0][0] > self.WINDOW and len(self._seen) > 2:
            self._seen.popleft()

    def __str__(self) -> str:
        """`1m04s left  3.9/s`; empty while there is too little progress."""
        if not self._seen:
            return ""
        (began, first), (now, done) = self._seen[0], self._seen[-1]
        if now - began < self.SHORTEST or done <= first:
            return ""
        rate = (done - first) / (now - began)
        rate_text = f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.2g}/min"
        return f"{duration((self._target[1] - done) / rate)} left  {rate_text}"


class Lines:
    """Reports the events of a run as lines of text."""

    EVERY = 15.0
    """Seconds between progress lines of a stage."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_line_at: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._logs: dict[str, str] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stderr.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        """Report an event of `runner.execution.events`."""
        kind, name = event["event"], event.get("node") or event.get("service") or ""
        if kind == "stage.decided" and event["state"] == "cached":
            narrate("cached", name, event["key"][:8])
        elif kind == "stage.decided":
            narrate(event["state"], name, event["reason"])
        elif kind == "stage.started":
            self._logs[name] = event["log"]
            self._paces[name] = Pace()
        elif kind == "stage.progress":
            self._progress(name, event)
        elif kind == "stage.retried":
            narrate("again", name, retried(event))
        elif kind == "stage.waiting":
            narrate("waits", name, event["reason"])
        elif kind == "stage.finished":
            narrate("done", name, f"{duration(event['seconds'])}  {event['key'][:8]}")
            for note in event["record"].get("notes", ()):
                narrate("note", name, note)
        elif kind == "stage.failed":
            narrate("failed", name, event["message"].splitlines()[0])
            for line in log_summary(self._logs.get(name, ""), event["message"]):
                narrate("", "", line)
        elif kind.startswith("service."):
            narrate(kind.removeprefix("service."), f"vllm {event['mode']}", _took(event))
        elif kind == "run.stopping":
            narrate("stopping", stopping(event))

    def _progress(self, name: str, event: Mapping[str, Any]) -> None:
        now, pace = self._clock(), self._paces.setdefault(name, Pace())
        pace.update(event, now)
        # A stage that takes less than a second needs no progress line.
        if now - self._last_line_at.setdefault(name, now - self.EVERY + Pace.SHORTEST) >= self.EVERY:
            self._last_line_at[name] = now
            narrate("...", name, progress(event, pace))


class Live:
    """Shows the events of a run as a table that is redrawn four times a second."""

    MARGIN = 8
    """Lines of the screen that are reserved for servers, notes and the prompt."""

    def __init__(
        self, nodes: Iterable[str], console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._clock = clock
        self._rows: dict[str, dict[str, Any]] = {name: {"state": "", "detail": ""} for name in nodes}
        self._servers: dict[str, dict[str, Any]] = {}
        self._notes: list[str] = []
        self._console = console or Console(stderr=True)
        self._live = RichLive(get_renderable=self.draw, console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Report an event of `runner.execution.events`."""
        kind = event["event"]
        if kind.startswith("service."):
            self._update_server(kind.removeprefix("service."), event)
        elif kind == "run.stopping":
            self._notes.append(f"stopping  {stopping(event)}")
        elif kind == "run.finished":
            for row in self._rows.values():
                row["state"] = "stopped" if row["state"] in ("running", "again") else row["state"]
        elif "node" in event:
            # Sources are added when they have events.
            self._update_stage(kind, self._rows.setdefault(event["node"], {"state": "", "detail": ""}), event)

    def _update_server(self, state: str, event: Mapping[str, Any]) -> None:
        if state == "stopped":
            self._servers.pop(event["service"], None)
            return
        row = self._servers.setdefault(event["service"], {"mode": event["mode"], "log": event.get("log", "")})
        row.update(state=state, since=self._clock(), took=_took(event))

    def _update_stage(self, kind: str, row: dict[str, Any], event: Mapping[str, Any]) -> None:
        if kind == "stage.decided":
            row.update(state=event["state"], detail=event["reason"])
        elif kind == "stage.started":
            attempt = event.get("attempt", 1)
            row.setdefault("began", self._clock())
            row.update(state="running", pace=Pace(), log=event["log"], detail="")
            row["attempt"] = f"attempt {attempt}  " if attempt > 1 else ""
        elif kind == "stage.progress":
            pace = row.setdefault("pace", Pace())
            pace.update(event, self._clock())
            row["detail"] = row.get("attempt", "") + progress(event, pace)
        elif kind == "stage.retried":
            row.update(state="again", detail=retried(event))
        elif kind == "stage.waiting":
            row.update(state="waits", detail=event["reason"])
        elif kind == "stage.finished":
            row.update(state="done", seconds=event["seconds"], detail=event["key"][:8])
            self._notes += [f"note  {event['node']}: {note}" for note in event["record"].get("notes", ())]
        elif kind == "stage.failed":
            row.update(state="failed", detail=event["message"].splitlines()[0])
            row["seconds"] = self._clock() - row.get("began", self._clock())
            self._notes += [f"{event['node']}: {line}" for line in log_summary(row.get("log", ""), event["message"])]

    def draw(self) -> RenderableType:
        """Draw the table, then the running servers, then notes."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, row in self._shown():
            seconds = row.get("seconds", self._clock() - row["began"] if "began" in row else 0.0)
            state = Text(row["state"] or "-", style=_COLOURS.get(row["state"], ""))
            detail = row["detail"] or (last_line(row["log"]) if row["state"] == "running" else "")
            cells = (Text(name), duration(seconds) if seconds else "")
            table.add_row(state, *cells, Text(detail, overflow="ellipsis", no_wrap=True))
        servers = [self._server(row) for row in list(self._servers.values())]
        lines = [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in servers]
        return Group(table, *lines, *(Text(note) for note in self._notes))

    def _shown(self) -> list[tuple[str, dict[str, Any]]]:
        """All stages, or on a low screen the active ones and a count of the others."""
        rows = list(self._rows.items())  # a copy, because another thread adds events
        if len(rows) <= max(1, self._console.height - self.MARGIN):
            return rows
        busy = [(name, row) for name, row in rows if row["state"] in ("running", "again", "failed")]
        others = Counter(row["state"] or "-" for _, row in rows if row["state"] not in ("running", "again", "failed"))
        rest = ", ".join(f"{count} {state}" for state, count in others.items())
        return [*busy[: self._console.height - self.MARGIN], ("", {"state": "...", "detail": rest})]

    def _server(self, row: Mapping[str, Any]) -> str:
        """`starting  vllm extract  12s  LAST LINE OF LOG`, or `ready     vllm extract  3m10s  started in 36s`."""
        detail = last_line(row["log"]) if row["state"] == "starting" else f"started in {row['took']}"
        return f"{row['state']:<8}  vllm {row['mode']}  {duration(self._clock() - row['since'])}  {detail}".rstrip()


def watcher(nodes: Iterable[str], lines_only: bool = False) -> Lines | Live:
    """A `Live` table on a terminal, else `Lines`; `lines_only` if several runs share the terminal."""
    lines_only = lines_only or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") in _NO_CURSOR
    return Lines() if lines_only else Live(nodes)


def progress(event: Mapping[str, Any], pace: Pace) -> str:
    """`128/384 conversations  1m04s left  3.9/s  tokens/s 140`."""
    notes = [f"{name} {value}" for name, value in event["note"].items()]
    done, total = (
        f"{count:.0f}" if count == int(count) else f"{count:.1f}" for count in (event["done"], event["total"])
    )
    return "  ".join(filter(None, [f"{done}/{total} {event['unit']}", str(pace), *notes]))


def retried(event: Mapping[str, Any]) -> str:
    """`attempt 2 in 8.0s, because ...`."""
    return f"attempt {event['attempt'] + 1} in {duration(event['seconds'])}, because {event['message']}"


def stopping(event: Mapping[str, Any]) -> str:
    """Effect of the first Ctrl-C and of a second one."""
    return f"stages have {event['seconds']:.0f} s for a checkpoint; Ctrl-C again ends them at once"


def log_summary(log: str, message: str) -> list[str]:
    """Last line of a failed stage's log, unless `message` contains it, and the path of the log."""
    last = last_line(log)
    return [line for line in (last if last not in message else "", log) if line]


def last_line(log: str) -> str:
    """Last line of a file that is not blank, as a terminal would show it; empty if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # A progress bar rewrites its line: only the text after the last carriage return is visible.
    lines = [_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).strip() for line in text.split("\n")]
    return next((line for line in reversed(lines) if line), "")


def _took(event: Mapping[str, Any]) -> str:
    return duration(event["seconds"]) if "seconds" in event else ""
