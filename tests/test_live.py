"""The terminal: what is going on, how fast, until when; at 80 columns, without colour, and in a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from speculators import live, ui

NODES = ["prompts", "regenerate", "tokenize", "train", "evaluate"]
KEY = "0123abcd" * 8


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(watch: live.Live | live.Lines, event: str, **fields: Any) -> None:
    watch({"event": event, **fields})


def stepped(
    watch: live.Live | live.Lines, clock: Clock, node: str, seconds: float, done: int, total: int = 384
) -> None:
    """Progress, so many seconds later."""
    clock.now += seconds
    note = {"tokens_per_second": 140}
    told(watch, "stage.progress", node=node, done=done, total=total, unit="conversations", note=note)


@pytest.fixture
def screen(clock: Clock) -> Callable[..., tuple[live.Live, Callable[[], list[str]]]]:
    """A live table, and what it shows, line by line; no escape may be in it."""

    def made(
        *nodes: str, height: int = 40, width: int = 80, lazy: Collection[str] = ()
    ) -> tuple[live.Live, Callable[[], list[str]]]:
        console = Console(file=io.StringIO(), width=width, height=height)
        watch = live.Live(nodes or NODES, console, clock, lazy)

        def lines() -> list[str]:
            with console.capture() as capture:
                console.print(watch.draw())
            text = capture.get()
            assert "\x1b" not in text
            assert all(len(line) <= width for line in text.splitlines())
            return [line.rstrip() for line in text.splitlines()]

        return watch, lines

    return made


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_stages_with_bar_rate_time_left_and_figures(screen: Any, clock: Clock, width: int) -> None:
    watch, lines = screen("target", *NODES, width=width, lazy={"target", "dataset.a"})
    expected = {"regenerate": 70.0, "tokenize": 9.0, "train": 300.0, "evaluate": 60.0}
    told(watch, "run.estimated", seconds=expected)
    told(watch, "stage.decided", node="prompts", state="cached", reason="made by earlier", key=KEY)
    told(watch, "stage.decided", node="regenerate", state="run", reason="16 of 400 rows new", key=KEY)
    told(watch, "stage.started", node="regenerate", log="", phase=0, phases=1, attempt=1)
    stepped(watch, clock, "regenerate", 5, 100)  # found there by an earlier attempt: no speed of ours
    stepped(watch, clock, "regenerate", 10, 140)
    bar = {80: "━━━━━━━━───────────────", 120: "━━━━━━━━━━━━━━──────────────────────────"}[width]
    assert lines() == [
        "cached    prompts             made by earlier",
        f"running   regenerate     15s  {bar} 36%  4/s  1m01s left",
        "          140/384 conversations  140 tokens/s",
        "waits     tokenize",
        "waits     train",
        "waits     evaluate",
        "          run            15s  about 7m10s left",
    ]
    told(watch, "stage.finished", node="regenerate", seconds=76.0, record={"notes": ["a note"]}, key=KEY)
    told(watch, "stage.decided", node="train", state="run", reason="changed: train.lr 1 -> 2", key=KEY)
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=2)
    assert lines()[3] == "running   train         0.0s  started, no progress yet  attempt 2"
    note = {"acceptance_length": 1.523, "loss": 2.71, "tokens_per_second": 1140}  # sorted by name, in a file
    for done in range(0, 800, 40):
        clock.now += 4
        told(watch, "stage.progress", node="train", done=done, total=2000, unit="steps", note=note)
    shown = lines()
    assert shown[3].endswith(" 38%  10/s  2m04s left")
    assert shown[4] == "          760/2000 steps  loss 2.71  acceptance length 1.523  1140 tokens/s"
    assert shown[6] == "          run          1m35s  about 4m49s left"
    assert shown[7] == "note  regenerate: a note"


def test_an_expectation_without_a_stage_is_a_lower_bound_and_no_duration_is_negative(screen: Any, clock: Clock) -> None:
    watch, lines = screen("train", "evaluate")
    told(watch, "run.estimated", seconds={"train": 10.0, "evaluate": None})
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=1)
    assert lines()[-1].endswith("at least 10s left")
    told(watch, "stage.finished", node="evaluate", seconds=1.0, record={}, key=KEY)
    assert lines()[-1].endswith("about 10s left")
    clock.now += 60
    stepped(watch, clock, "train", 0, 380)
    stepped(watch, clock, "train", 10, 400)  # more than there were to do
    assert "100%" in lines()[0]
    assert "0.0s left" in lines()[0]
    assert lines()[-1] == "          run        1m10s"
    clock.now -= 1000  # a clock that was set back
    assert "-" not in "".join(lines()).replace("no progress", "")
    assert ui.duration(-5) == "0.0s"


def test_a_stage_that_starts_says_so_and_shows_its_log_only_after_a_while(
    screen: Any, clock: Clock, tmp_path: Path
) -> None:
    watch, lines = screen("train")
    log = tmp_path / "t.log"
    log.write_text("--- train: attempt 1, phase 1 of 1\nreading the target\n")
    told(watch, "stage.started", node="train", log=str(log), phase=0, phases=2)
    assert lines()[0] == "running   train    0.0s  started, no progress yet  phase 1 of 2"
    clock.now += 11
    assert lines()[1] == "          reading the target"


def test_servers_are_shown_while_they_are_up_and_a_starting_one_with_its_log(
    screen: Any, clock: Clock, tmp_path: Path
) -> None:
    watch, lines = screen("extract")
    log = tmp_path / "vllm.log"
    log.write_text("loading\n(EngineCore pid=7) \x1b[32mINFO\x1b[0m 11-30 16:11:46 [a.py:1] shard 1\rshard 2\r\n\n")
    told(watch, "service.starting", service="ab", mode="extract", log=str(log))
    clock.now += 12
    assert lines()[1] == "starting  vllm extract     12s  shard 2"
    log.write_text("(EngineCore pid=7) INFO 11-30 16:11:46 [a.py:1] Loading weights\n")
    assert lines()[1] == "starting  vllm extract     12s  Loading weights"
    told(watch, "service.ready", service="ab", mode="extract", seconds=36.2)
    clock.now += 130
    assert lines()[1] == "ready     vllm extract   2m10s  started in 36s"
    told(watch, "service.stopped", service="ab", mode="extract")
    assert len(lines()) == 2


def test_a_stage_that_fails_shows_the_last_line_of_its_log_and_where_that_is(
    screen: Any, clock: Clock, tmp_path: Path
) -> None:
    watch, lines = screen("train")
    log = tmp_path / "t.log"
    log.write_text("step 1\nCUDA error: an illegal memory access\n")
    told(watch, "stage.started", node="train", log=str(log), phase=0, phases=1)
    clock.now += 3
    told(watch, "stage.failed", node="train", message="train was killed by SIGKILL\n\nits log")
    shown = lines()
    assert shown[0] == "failed    train    3.0s  train was killed by SIGKILL"
    assert shown[2] == "train: CUDA error: an illegal memory access"
    assert "".join(shown[3:]).replace("\n", "").replace(" ", "") == f"train:{log}"
    clock.now += 60
    assert lines()[0].split()[2] == "3.0s"  # its clock has stopped


def test_an_attempt_that_is_repeated_says_when_and_why(screen: Any) -> None:
    watch, lines = screen("train")
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=1)
    told(watch, "stage.retried", node="train", attempt=1, message="the server ended", seconds=8.0)
    assert "again" in lines()[0]
    assert "attempt 2 in 8.0s, because the server ended" in lines()[0]
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=2)
    assert "attempt 2" in lines()[0]
    told(watch, "stage.progress", node="train", done=1, total=2, unit="steps", note={})
    assert lines()[1] == "          1/2 steps"


def test_a_run_that_is_asked_to_stop_says_what_goes_on_and_what_a_second_signal_does(
    screen: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    table, seen = screen("tokenize", "train")
    for watch in (table, live.Lines(clock)):
        told(watch, "stage.started", node="train", log="")
        told(watch, "run.stopping", seconds=30.0)
    assert seen()[-1] == "stopping  stages have 30 s for a checkpoint; Ctrl-C again ends them at once"
    assert len(seen()[-1] + "^C") < 80, "which the terminal writes behind it"
    assert "stopping stages have 30 s for a checkpoint" in capsys.readouterr().err
    assert seen()[1].endswith("started, no progress yet")
    told(table, "stage.progress", node="train", done=7, total=9, unit="steps", note={})
    told(table, "run.finished", status="interrupted", seconds=3.0)
    assert seen()[1:] == ["stopped   train       0.0s  7/9 steps", seen()[-1]]


def test_on_a_low_screen_only_what_goes_on_is_listed_and_the_rest_is_counted(screen: Any) -> None:
    watch, lines = screen(*(f"stage{i}" for i in range(300)), height=20)
    for i in range(5):
        told(watch, "stage.decided", node=f"stage{i}", state="cached", reason="made by r", key=KEY)
    told(watch, "stage.started", node="stage7", log="", phase=0, phases=1)
    shown = lines()
    assert shown[0].startswith("running   stage7")
    assert shown[1].split(maxsplit=1) == ["...", "5 cached, 294 waits"]
    assert len(shown) == 3


def test_markup_in_a_name_or_a_message_is_no_markup(screen: Any) -> None:
    watch, lines = screen("train")
    told(watch, "stage.failed", node="train", message="list[int] [/bold] is wrong")
    assert lines()[0].endswith("list[int] [/bold] is wrong")


def test_a_rate_forgets_what_is_long_past_and_begins_anew_with_another_total() -> None:
    pace = live.Pace()

    def hear(now: float, done: float, total: float = 1000) -> str:
        pace.update({"unit": "rows", "done": done, "total": total}, now)
        return str(pace)

    assert hear(0, 0) == ""
    assert hear(0.5, 5) == ""  # too short to be told
    assert hear(100, 100) == "57/min  15m43s left"
    for second in range(101, 200):
        said = hear(second, 100 + 2 * (second - 100))
    assert said == "2/s  5m51s left"
    assert hear(200, 1, total=20) == ""
    assert hear(210, 50_001, total=60_000) == ""
    assert hear(220, 55_001, total=60_000) == "500/s  10s left"
    assert hear(200, 1, total=20) == ""
    assert hear(300, 2, total=20) == "0.6/min  30m00s left"
    assert hear(301, 1, total=20) == ""  # backwards: another pass


def test_a_long_subject_is_set_apart_from_what_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    ui.narrate("locked", "smollm2_eagle3.lock.json", "5 of 10 keys known")
    ui.narrate("cached", "train", "0123abcd")
    assert capsys.readouterr().err.splitlines() == [
        "locked   smollm2_eagle3.lock.json 5 of 10 keys known",
        "cached   train               0123abcd",
    ]


def test_in_a_file_a_run_is_plain_lines(capsys: pytest.CaptureFixture[str], clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "t.log"
    log.write_text("the last line\n")
    with live.Lines(clock) as watch:
        told(watch, "stage.decided", node="prompts", state="cached", reason="made by r", key=KEY)
        told(watch, "stage.decided", node="train", state="run", reason="changed: train.lr 1 -> 2", key=KEY)
        told(watch, "run.estimated", seconds={"train": 70.0, "evaluate": 20.0})
        told(watch, "service.starting", service="ab", mode="extract", log="")
        told(watch, "service.ready", service="ab", mode="extract", seconds=36.2)
        told(watch, "stage.started", node="train", log=str(log), phase=0, phases=1, attempt=1)
        for done in range(0, 200, 10):
            stepped(watch, clock, "train", 2, done)
        told(watch, "stage.retried", node="train", attempt=1, message="it died", seconds=1.0)
        told(watch, "stage.failed", node="train", message="train was killed by SIGKILL")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "cached   prompts             0123abcd",
        "run      train               changed: train.lr 1 -> 2",
        "expected run                 about 1m30s",
        "starting vllm extract",
        "ready    vllm extract        36s",
        "started  train",
        "...      train                 2%  5/s  1m15s left  10/384 conversations  140 tokens/s",
        "...      train                23%  5/s  59s left  90/384 conversations  140 tokens/s",
        "...      train                44%  5/s  43s left  170/384 conversations  140 tokens/s",
        "again    train               attempt 2 in 1.0s, because it died",
        "failed   train               train was killed by SIGKILL",
        "                             the last line",
        f"                             {log}",
    ]


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    assert isinstance(live.watcher(NODES), live.Lines)


def test_a_file_gets_lines_and_a_terminal_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(live.watcher(NODES), live.Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(live.watcher(NODES), live.Live)


def test_no_color_leaves_no_colour_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watch = live.Live(["train"], console)
    told(watch, "stage.failed", node="train", message="it died")
    with console.capture() as capture:
        console.print(watch.draw())
    assert "\x1b[31m" not in capture.get()
