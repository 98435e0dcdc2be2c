"""The progress of a run on stderr: a live table on a terminal, else (a pipe, a file, CI) lines of text.

The only module that imports rich, and only for the table.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from speculators.runner.execution.endings import ATTEMPT
from speculators.ui import NO_CURSOR, STATE_STYLES, duration, fit_runs, narrate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_SERVER_LOG = re.compile(r"^(\(\w+ pid=\d+\)\s+)?([A-Z]+ [\d-]+ [\d:]+ \[\S+\]\s+)?")
"""Prefix of vLLM's log lines: process, level, time, source line."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
"""Escape sequences and control characters."""


class Pace:
    """Estimates a stage's rate and remaining time from its progress in the last minute.

    The window excludes the work of an earlier attempt and a slow start; a new unit or total resets the estimate.
    """

    WINDOW, SHORTEST = 60.0, 1.0
    """Longest and shortest period, in seconds, over which the rate is computed."""

    def __init__(self) -> None:
        self._unit_and_total: tuple[str, float] = ("", 0.0)
        self._window: deque[tuple[float, float]] = deque()
        """(seconds, units that were done), oldest first."""

    def update(self, event: Mapping[str, Any], now: float) -> None:
        """Add an event `stage.progress`; `now` in seconds."""
        unit_and_total = (event["unit"], event["total"])
        if unit_and_total != self._unit_and_total or (self._window and event["done"] < self._window[-1][1]):
            self._unit_and_total = unit_and_total
            self._window.clear()
        self._window.append((now, event["done"]))
        while now - self._window[0][0] > self.WINDOW and len(self._window) > 2:
            self._window.popleft()

    @property
    def rate(self) -> float:
        """Units per second; 0 while there is too little progress."""
        if not self._window:
            return 0.0
        (began, first), (now, done) = self._window[0], self._window[-1]
        return (done - first) / (now - began) if now - began >= self.SHORTEST and done > first else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds; None while the rate is unknown."""
        return max(0.0, self._unit_and_total[1] - self._window[-1][1]) / self.rate if self.rate else None

    def __str__(self) -> str:
        """`3.9/s  1m04s left`; empty while there is too little progress."""
        left = self.seconds_left
        if left is None:
            return ""
        number, unit = (self.rate, "s") if self.rate >= 1 else (60 * self.rate, "min")
        rate = f"{number:.0f}/{unit}" if number >= 100 else f"{number:.{3 if unit == 's' else 2}g}/{unit}"
        return f"{rate}  {duration(left)} left"


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
            narrate("started", name, _part(event))
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
        elif kind == "run.estimated" and not self._paces and None not in event["seconds"].values():
            narrate("expected", "run", f"about {duration(sum(event['seconds'].values()))}")

    def _progress(self, name: str, event: Mapping[str, Any]) -> None:
        now, pace = self._clock(), self._paces.setdefault(name, Pace())
        pace.update(event, now)
        # The first line comes a second after the stage's start: a shorter stage needs none.
        if now - self._last_line_at.setdefault(name, now - self.EVERY + Pace.SHORTEST) >= self.EVERY:
            self._last_line_at[name] = now
            notes = "  ".join(notes_of(event))
            narrate("...", name, "  ".join(filter(None, [_percent(event), str(pace), _count(event), notes])))


class Live:
    """Shows the events of a run as a table that is redrawn four times a second.

    A line for each stage; a running one has a bar, its rate and remaining time, and a second line with its figures.
    Below are the servers, the time that the run has taken and is expected to take, and notes.
    """

    MARGIN = 8
    """Lines of the screen that are reserved for servers, notes and the prompt."""
    MIN_BAR, MAX_BAR = 5, 40
    """Widths of a progress bar, in columns."""
    LOG_AFTER = 10.0
    """Seconds after which a stage without progress shows the last line of its log."""

    def __init__(
        self,
        nodes: Iterable[str],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        lazy: Collection[str] = (),
    ) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._clock = clock
        self._rows: dict[str, dict[str, Any]] = {
            name: {"state": "" if name in lazy else "waits", "detail": ""} for name in nodes
        }
        self._servers: dict[str, dict[str, Any]] = {}
        self._expected: dict[str, float | None] = {}
        self._began = clock()
        self._over = False
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
        elif kind == "run.estimated":
            self._expected = event["seconds"]
        elif kind == "run.finished":
            self._over = True
            for row in self._rows.values():
                if row["state"] in ("running", "again"):
                    row.update(state="stopped", detail=_count(row["progress"]) if row.get("progress") else "")
        elif "node" in event:
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
            row.setdefault("began", self._clock())
            row.update(state="running", pace=Pace(), log=event["log"], started=self._clock(), progress=None)
            row["detail"] = "  ".join(filter(None, ["started, no progress yet", _part(event)]))
        elif kind == "stage.progress":
            pace = row.setdefault("pace", Pace())
            pace.update(event, self._clock())
            row["progress"] = event
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
        """Draw the table, then the running servers, the time of the run, and notes."""
        from rich.console import Group
        from rich.text import Text

        rows, servers = self._shown(), list(self._servers.values())
        names = [name for name, _ in rows] + [f"vllm {server['mode']}" for server in servers] + ["run"]
        wide = max(map(len, names))
        lines = []
        for name, row in rows:
            seconds = row.get("seconds", self._clock() - row["began"] if "began" in row else None)
            line = self._line(row["state"], f"{name:<{wide}}", "" if seconds is None else duration(seconds))
            if row["state"] == "running" and row.get("progress"):
                lines += [self._bar(line, row), self._line("", "", "", self._figures(row))]
                continue
            lines.append(line.append(fit_runs(row["detail"], self._console.width - line.cell_len)))
            log = last_line(row["log"]) if row["state"] == "running" else ""
            if log and not log.startswith(ATTEMPT) and self._clock() - row["started"] > self.LOG_AFTER:
                lines.append(self._line("", "", "", log))
        lines += [self._server(server, wide) for server in servers]
        if not self._over:
            lines.append(self._line("", f"{'run':<{wide}}", duration(self._clock() - self._began), self._time_left()))
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines, *(Text(note) for note in self._notes))

    def _line(self, state: str, name: str, seconds: str, detail: str = "") -> Text:
        """`running  train  1m04s  DETAIL`; a line of details alone begins below the stage's name."""
        from rich.text import Text

        if not name:
            return Text(f"{'':10}{detail}", style="dim")
        return Text.assemble((f"{state:<10}", STATE_STYLES.get(state, "")), name, f"{seconds:>8}  ", detail)

    def _bar(self, line: Text, row: Mapping[str, Any]) -> Text:
        """Add a bar, the share that is done, the rate and the remaining time."""
        event, pace = row["progress"], row["pace"]
        after = "  ".join(filter(None, [_percent(event), str(pace)]))
        width = max(self.MIN_BAR, min(self.MAX_BAR, self._console.width - line.cell_len - max(len(after), 27)))
        filled = int(width * _share(event))
        full, empty = "#-" if self._console.options.ascii_only else "━─"
        return line.append(full * filled, "cyan").append(empty * (width - filled), "dim").append(after)

    def _figures(self, row: Mapping[str, Any]) -> str:
        return "  ".join([_count(row["progress"]), *notes_of(row["progress"])])

    def _time_left(self) -> str:
        """`about 9m12s left`, by the stages' estimates; `at least` if one is unknown.

        A running stage's progress counts too, but it may be that of a part: `evaluate` counts each dataset anew.
        """
        left, known = 0.0, True
        for name, expected in self._expected.items():
            row = self._rows.get(name, {"state": "waits"})
            if row["state"] in ("done", "cached", "failed", "unneeded"):
                continue
            pace = row["pace"].seconds_left if row["state"] == "running" else None
            known = known and expected is not None
            if expected is not None:
                expected = max(0.0, expected - (self._clock() - row["began"] if "began" in row else 0.0))
            left += max(pace or 0.0, expected or 0.0)
        return f"{'about' if known else 'at least'} {duration(left)} left" if left else ""

    def _shown(self) -> list[tuple[str, dict[str, Any]]]:
        """All stages, or on a low screen the active ones and a count of the others; lazy ones once they have events."""
        rows = [(name, row) for name, row in list(self._rows.items()) if row["state"]]  # a copy: another thread adds
        busy = [(name, row) for name, row in rows if row["state"] in ("running", "again", "failed")]
        if len(rows) + len(busy) <= max(1, self._console.height - self.MARGIN):
            return rows
        others = Counter(row["state"] for _, row in rows if row["state"] not in ("running", "again", "failed"))
        rest = ", ".join(f"{count} {state}" for state, count in others.items())
        return [*busy[: (self._console.height - self.MARGIN) // 2], ("", {"state": "...", "detail": rest})]

    def _server(self, row: Mapping[str, Any], wide: int) -> Text:
        """`starting  vllm extract  12s  LAST LINE OF LOG`, or `ready  vllm extract  3m10s  started in 36s`."""
        detail = (
            _SERVER_LOG.sub("", last_line(row["log"])) if row["state"] == "starting" else f"started in {row['took']}"
        )
        name = f"vllm {row['mode']}"
        return self._line(row["state"], f"{name:<{wide}}", duration(self._clock() - row["since"]), detail)


def watcher(nodes: Iterable[str], lines_only: bool = False, lazy: Collection[str] = ()) -> Lines | Live:
    """A `Live` table on a terminal, else `Lines`.

    `lines_only` if several runs share the terminal; `lazy` nodes are shown once they have events.
    """
    lines_only = lines_only or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") in NO_CURSOR
    return Lines() if lines_only else Live(nodes, lazy=lazy)


def notes_of(event: Mapping[str, Any]) -> list[str]:
    """The figures of an event `stage.progress`: `loss 2.71`, `acceptance length 1.52`, `140 tokens/s`."""
    note = dict(event["note"])
    first = {name: note.pop(name) for name in ("loss", "acceptance_length") if name in note}
    return [
        f"{value} {name.removesuffix('_per_second')}/s"
        if name.endswith("_per_second")
        else f"{name.replace('_', ' ')} {value}"
        for name, value in (first | note).items()
    ]


def _count(event: Mapping[str, Any]) -> str:
    """`128/384 conversations`."""
    done, total = (f"{n:.0f}" if n == int(n) else f"{n:.1f}" for n in (event["done"], event["total"]))
    return f"{done}/{total} {event['unit']}"


def _share(event: Mapping[str, Any]) -> float:
    """The share that is done, 0 to 1."""
    return min(1.0, max(0.0, event["done"] / event["total"])) if event["total"] else 0.0


def _percent(event: Mapping[str, Any]) -> str:
    return f"{int(100 * _share(event)):3}%"


def _part(event: Mapping[str, Any]) -> str:
    """`phase 1 of 2  attempt 2`, as far as there are several phases and it is not the first attempt."""
    attempt = f"attempt {event['attempt']}" if event.get("attempt", 1) > 1 else ""
    phase = f"phase {event['phase'] + 1} of {event['phases']}" if event.get("phases", 1) > 1 else ""
    return "  ".join(filter(None, [phase, attempt]))


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
