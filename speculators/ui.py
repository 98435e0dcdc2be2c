"""What a person sees: the only door to rich. Narration goes to stderr, data to stdout.

Where stderr is a terminal there is one live table of the run; elsewhere (a pipe, a file, CI) the same facts come
as plain lines. Everything reads without colour and at 80 columns. rich is imported only when it draws.
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
"""Values of TERM."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
"""Colours, and what else would move a cursor."""


def error(failure: RunError) -> None:
    """`error: ...`, a blank line, `hint: ...`; a message of several lines keeps them."""
    print(f"error: {failure.message}\n\nhint: {failure.hint}", file=sys.stderr)


def narrate(verb: str, subject: str, detail: str = "") -> None:
    """One line about one thing, with the verb padded so that subjects stand in a column."""
    print(f"{verb:<9}{subject:<19} {detail}".rstrip(), file=sys.stderr)


def duration(seconds: float) -> str:
    """`8s`, `3m12s`, `2h05m`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def dim(text: str) -> str:
    """Text for stdout that matters less than the rest, where a terminal can show that."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") in _NO_CURSOR
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def width() -> int:
    """Columns that a table on stdout may take: the terminal's, 80 elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 80


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as text, each column as wide as its widest cell, those in `right` aligned to the right."""
    table = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def explanation(found: Explanation) -> str:
    """What `explain` prints: state and reason, who made what is there, what differs, and what is in the key."""
    lines = [f"{found.node}  {found.state}  {found.key[:8]}".rstrip(), f"  {found.reason}"]
    if found.because:
        lines += [f"  waits in the end for {found.because}"]
    if found.nearest:
        said = "made" if found.state == "cached" else "nearest"
        lines += [
            "",
            f"{said}  {found.nearest['key'][:8]}  by {found.nearest['run']}  {found.nearest['finished'][:16]}",
        ]
        lines += [f"  {found.nearest['words']}"] if found.nearest["words"] else []
    for title, changes in (("differs", found.changes), ("differs, but is not in the key", found.outside_the_key)):
        if changes:
            cells = [(f"  {c.name}", f"{_cell(c.old)} -> {_cell(c.new)}", c.runs) for c in changes]
            shown = f"{title}\n{columns(cells)}"
            lines += ["", dim(shown) if changes is found.outside_the_key else shown]
    if found.key_values:
        lines += ["", "in the key", columns((f"  {name}", _cell(value)) for name, value in found.key_values.items())]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value of a key: digests shortened, the rest cut to fit a line."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:8]
    return text if len(text) <= 48 else f"{text[:45]}..."


def evaluation(results: Mapping[str, Any]) -> str:
    """The table that a run ends in, from `evaluation.json`: one row a data set, then what losslessness showed."""
    k = results["num_speculative_tokens"]
    head = ["set", "accepted", *(f"pos {i + 1}" for i in range(k)), "plain", "drafted", "speed-up"]
    rows = [head]
    for name, row in results["sets"].items():
        positions = [f"{p:.3f}" for p in row["per_position"]]
        plain, drafted = row["plain"]["tokens_per_second"], row["speculative"]["tokens_per_second"]
        rows.append(
            [
                name,
                f"{row['acceptance_length']:.3f}",
                *positions,
                f"{plain:.1f}",
                f"{drafted:.1f}",
                f"{row['speed_up']:.2f}x",
            ]
        )
    notes = [f"accepted: tokens a step, bonus included ({k} proposed); plain, drafted: tokens/s"]
    if lossless := results.get("lossless"):
        notes.append(
            f"greedy in float32, with and without the draft: {lossless['identical']} of {lossless['prompts']} identical"
            f", {lossless['ties']} part at\na tie, {lossless['faults']} at a fault"
        )
    return columns(rows, right=range(1, len(head))) + "\n\n" + "\n".join(notes)


class Pace:
    """How fast a stage goes and how long it still takes, by its own progress over the last minute.

    What an earlier attempt did, and a slow start, drop out of it; another unit or total begins anew.
    """

    WINDOW, SHORTEST = 60.0, 1.0
    """Seconds that are looked back at most, and at least: a rate over less is noise."""

    def __init__(self) -> None:
        self._of: tuple[str, float] = ("", 0.0)
        self._seen: deque[tuple[float, float]] = deque()

    def hear(self, event: Mapping[str, Any], now: float) -> None:
        """Take one `stage.progress`, at a time in seconds."""
        of = (event["unit"], event["total"])
        if of != self._of or (self._seen and event["done"] < self._seen[-1][1]):
            self._of = of
            self._seen.clear()
        self._seen.append((now, event["done"]))
        while now - self._seen[0][0] > self.WINDOW and len(self._seen) > 2:
            self._seen.popleft()

    def __str__(self) -> str:
        """`1m04s left  3.9/s`; empty while it cannot be told."""
        if not self._seen:
            return ""
        (began, first), (now, done) = self._seen[0], self._seen[-1]
        if now - began < self.SHORTEST or done <= first:
            return ""
        rate = (done - first) / (now - began)
        said = f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.2g}/min"
        return f"{duration((self._of[1] - done) / rate)} left  {said}"


class Lines:
    """A run as plain lines: what is decided, what starts, how it ends, and progress now and then."""

    EVERY = 15.0
    """Seconds between two progress lines of one stage."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spoken: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._logs: dict[str, str] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stderr.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        """Hear one event of `runner.execution.events`."""
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
            for line in last_words(self._logs.get(name, ""), event["message"]):
                narrate("", "", line)
        elif kind.startswith("service."):
            narrate(kind.removeprefix("service."), f"vllm {event['mode']}", _took(event))
        elif kind == "run.stopping":
            narrate("stopping", stopping(event))

    def _progress(self, name: str, event: Mapping[str, Any]) -> None:
        now, pace = self._clock(), self._paces.setdefault(name, Pace())
        pace.hear(event, now)
        # Not at the very beginning: a stage that takes a second needs no line between its first and its last.
        if now - self._spoken.setdefault(name, now - self.EVERY + Pace.SHORTEST) >= self.EVERY:
            self._spoken[name] = now
            narrate("...", name, progress(event, pace))


class Live:
    """A run as one table that is drawn anew four times a second."""

    MARGIN = 8
    """Lines of the screen that the table leaves to servers, notes and the prompt."""

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
        """Hear one event of `runner.execution.events`."""
        kind = event["event"]
        if kind.startswith("service."):
            self._hear_server(kind.removeprefix("service."), event)
        elif kind == "run.stopping":
            self._notes.append(f"stopping  {stopping(event)}")
        elif kind == "run.finished":
            for row in self._rows.values():
                row["state"] = "stopped" if row["state"] in ("running", "again") else row["state"]
        elif "node" in event:
            # A source gets a line when something is done about it, and not before.
            self._hear_stage(kind, self._rows.setdefault(event["node"], {"state": "", "detail": ""}), event)

    def _hear_server(self, state: str, event: Mapping[str, Any]) -> None:
        if state == "stopped":
            self._servers.pop(event["service"], None)
            return
        row = self._servers.setdefault(event["service"], {"mode": event["mode"], "log": event.get("log", "")})
        row.update(state=state, since=self._clock(), took=_took(event))

    def _hear_stage(self, kind: str, row: dict[str, Any], event: Mapping[str, Any]) -> None:
        if kind == "stage.decided":
            row.update(state=event["state"], detail=event["reason"])
        elif kind == "stage.started":
            attempt = event.get("attempt", 1)
            row.setdefault("began", self._clock())
            row.update(state="running", pace=Pace(), log=event["log"], detail="")
            row["attempt"] = f"attempt {attempt}  " if attempt > 1 else ""
        elif kind == "stage.progress":
            pace = row.setdefault("pace", Pace())
            pace.hear(event, self._clock())
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
            self._notes += [f"{event['node']}: {line}" for line in last_words(row.get("log", ""), event["message"])]

    def draw(self) -> RenderableType:
        """The table as it is now, the servers that are up below it, then notes."""
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
        """Every stage, or, where the screen is too low, those at which something happens, and how many others."""
        rows = list(self._rows.items())  # a copy: events come in from another thread than this one
        if len(rows) <= max(1, self._console.height - self.MARGIN):
            return rows
        busy = [(name, row) for name, row in rows if row["state"] in ("running", "again", "failed")]
        others = Counter(row["state"] or "-" for _, row in rows if row["state"] not in ("running", "again", "failed"))
        rest = ", ".join(f"{count} {state}" for state, count in others.items())
        return [*busy[: self._console.height - self.MARGIN], ("", {"state": "...", "detail": rest})]

    def _server(self, row: Mapping[str, Any]) -> str:
        """`starting  vllm extract  12s  ...` with what it says last; `ready     vllm extract  3m10s`."""
        said = last_line(row["log"]) if row["state"] == "starting" else f"started in {row['took']}"
        return f"{row['state']:<8}  vllm {row['mode']}  {duration(self._clock() - row['since'])}  {said}".rstrip()


def watcher(nodes: Iterable[str], plain: bool = False) -> Lines | Live:
    """The live table on a terminal, lines elsewhere, and where several runs share the terminal."""
    plain = plain or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") in _NO_CURSOR
    return Lines() if plain else Live(nodes)


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
    """What the first Ctrl-C does, and what a second one would."""
    return f"stages have {event['seconds']:.0f} s for a checkpoint; Ctrl-C again ends them at once"


def last_words(log: str, message: str) -> list[str]:
    """Of a stage that failed: what its log says last, unless the message has it already, and where the log is."""
    said = last_line(log)
    return [line for line in (said if said not in message else "", log) if line]


def last_line(log: str) -> str:
    """The last line of a file that says something, as a terminal would show it; empty if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # A progress bar rewrites its line: what stands after the last carriage return is what can be seen.
    lines = [_CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).strip() for line in text.split("\n")]
    return next((line for line in reversed(lines) if line), "")


def _took(event: Mapping[str, Any]) -> str:
    return duration(event["seconds"]) if "seconds" in event else ""
