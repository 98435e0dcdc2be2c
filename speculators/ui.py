"""What a person sees: the only door to rich. Narration goes to stderr, data to stdout.

Where stderr is a terminal there is one live table of the run; elsewhere (a pipe, a file, CI) the same facts come
as plain lines. Everything reads without colour and at 80 columns. rich is imported only when it draws.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from speculators.errors import RunError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from speculators.runner.explain import Explanation

_COLOURS = {
    "cached": "dim",
    "run": "yellow",
    "running": "cyan",
    "done": "green",
    "failed": "red",
    "waits": "dim",
    "unneeded": "dim",
}


def error(failure: RunError) -> None:
    """`error: ...`, a blank line, `hint: ...`; a message of several lines keeps them."""
    print(f"error: {failure.message}\n\nhint: {failure.hint}", file=sys.stderr)


def narrate(verb: str, subject: str, detail: str = "") -> None:
    """One line about one thing, with the verb padded so that subjects stand in a column."""
    print(f"{verb:<9}{subject:<20}{detail}".rstrip(), file=sys.stderr)


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
    if found.made:
        said = "made" if found.state == "cached" else "nearest"
        lines += ["", f"{said}  {found.made['key'][:8]}  by {found.made['run']}  {found.made['finished'][:16]}"]
        lines += [f"  {found.made['words']}"] if found.made["words"] else []
    for title, changes in (("differs", found.changes), ("differs, but is not in the key", found.beside)):
        if changes:
            cells = [(f"  {c.name}", f"{_cell(c.old)} -> {_cell(c.new)}", c.made) for c in changes]
            lines += ["", title, columns(cells)]
    if found.leaves:
        lines += ["", "in the key", columns((f"  {name}", _cell(value)) for name, value in found.leaves.items())]
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


class Lines:
    """A run as plain lines: what is decided, what starts, how it ends, and progress now and then."""

    EVERY = 15.0
    """Seconds between two progress lines of one stage."""

    def __init__(self) -> None:
        self._spoken = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stderr.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        """Hear one event of `runner.events`."""
        kind, name = event["event"], event.get("node") or event.get("service") or ""
        if kind == "stage.decided" and event["state"] == "cached":
            narrate("cached", name, event["key"][:8])
        elif kind == "stage.decided":
            narrate(event["state"], name, event["reason"])
        elif kind == "stage.finished":
            narrate("done", name, f"{duration(event['seconds'])}  {event['key'][:8]}")
            for note in event["record"].get("notes", ()):
                narrate("note", name, note)
        elif kind == "stage.failed":
            narrate("failed", name, event["message"].splitlines()[0])
        elif kind.startswith("service."):
            narrate(kind.removeprefix("service."), f"vllm {event['mode']}", _service(event))
        elif kind == "stage.progress" and time.monotonic() - self._spoken > self.EVERY:
            self._spoken = time.monotonic()
            narrate("...", name, progress(event))


class Live:
    """A run as one table that is drawn anew four times a second."""

    def __init__(self, nodes: Iterable[str]) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._rows: dict[str, dict[str, Any]] = {name: {"state": "", "detail": ""} for name in nodes}
        self._services: dict[str, str] = {}
        self._notes: list[str] = []
        self._live = RichLive(
            get_renderable=self._draw, console=Console(stderr=True), refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Hear one event of `runner.events`."""
        kind = event["event"]
        if kind.startswith("service."):
            self._services[event["service"]] = (
                f"{kind.removeprefix('service.')}  vllm {event['mode']}  {_service(event)}"
            )
            return
        if "node" not in event:
            return
        # A source gets a line when something is done about it, and not before.
        row = self._rows.setdefault(event["node"], {"state": "", "detail": ""})
        if kind == "stage.decided":
            row.update(state=event["state"], detail=event["reason"])
        elif kind == "stage.started":
            row.update(state="running", began=time.monotonic(), detail="")
        elif kind == "stage.progress":
            row.update(detail=progress(event))
        elif kind == "stage.finished":
            row.update(state="done", seconds=event["seconds"], detail=event["key"][:8])
            self._notes += [f"note  {event['node']}: {note}" for note in event["record"].get("notes", ())]
        elif kind == "stage.failed":
            row.update(state="failed", detail=event["message"].splitlines()[0])

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, row in self._rows.items():
            seconds = row.get("seconds", time.monotonic() - row["began"] if "began" in row else 0.0)
            state = Text(row["state"] or "-", style=_COLOURS.get(row["state"], ""))
            table.add_row(
                state,
                name,
                duration(seconds) if seconds else "",
                Text(row["detail"], overflow="ellipsis", no_wrap=True),
            )
        servers = [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in self._services.values()]
        return Group(table, *servers, *(Text(note) for note in self._notes))


def watcher(nodes: Iterable[str], plain: bool = False) -> Lines | Live:
    """The live table on a terminal, lines elsewhere, and where several runs share the terminal."""
    plain = plain or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    return Lines() if plain else Live(nodes)


def progress(event: Mapping[str, Any]) -> str:
    """`128/384 conversations  tokens/s 140`."""
    notes = "  ".join(f"{name} {value}" for name, value in event["note"].items())
    return f"{event['done']:g}/{event['total']:g} {event['unit']}  {notes}".rstrip()


def _service(event: Mapping[str, Any]) -> str:
    return duration(event["seconds"]) if "seconds" in event else ""
