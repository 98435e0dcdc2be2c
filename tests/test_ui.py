"""The terminal: what is going on, how fast, until when; at 80 columns, without colour, and in a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from speculators import ui

NODES = ["prompts", "regenerate", "tokenize", "train", "evaluate"]
KEY = "0123abcd" * 8


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(watch: ui.Live | ui.Lines, event: str, **fields: Any) -> None:
    watch({"event": event, **fields})


def stepped(watch: ui.Live | ui.Lines, clock: Clock, node: str, seconds: float, done: int, total: int = 384) -> None:
    """Progress, so many seconds later."""
    clock.now += seconds
    note = {"tokens/s": 140}
    told(watch, "stage.progress", node=node, done=done, total=total, unit="conversations", note=note)


@pytest.fixture
def screen(clock: Clock) -> Callable[..., tuple[ui.Live, Callable[[], list[str]]]]:
    """A live table, and what it shows, line by line; no escape may be in it."""

    def made(*nodes: str, height: int = 40) -> tuple[ui.Live, Callable[[], list[str]]]:
        console = Console(file=io.StringIO(), width=80, height=height)
        watch = ui.Live(nodes or NODES, console, clock)

        def lines() -> list[str]:
            with console.capture() as capture:
                console.print(watch.draw())
            text = capture.get()
            assert "\x1b" not in text
            assert all(len(line) <= 80 for line in text.splitlines())
            return [line.rstrip() for line in text.splitlines()]

        return watch, lines

    return made


def test_the_table_shows_every_stage_with_progress_rate_and_time_left(screen: Any, clock: Clock) -> None:
    watch, lines = screen()
    told(watch, "stage.decided", node="prompts", state="cached", reason="made by earlier", key=KEY)
    told(watch, "stage.decided", node="regenerate", state="run", reason="new", key=KEY)
    told(watch, "stage.started", node="regenerate", log="", phase=0, phases=1, attempt=1)
    stepped(watch, clock, "regenerate", 5, 100)  # found there by an earlier attempt: no speed of ours
    stepped(watch, clock, "regenerate", 10, 140)
    assert lines() == [
        "cached   prompts          made by earlier",
        "running  regenerate  15s  140/384 conversations  1m01s left  4/s  tokens/s 140",
        "-        tokenize",
        "-        train",
        "-        evaluate",
    ]


def test_servers_are_shown_while_they_are_up_and_a_starting_one_with_what_it_says(
    screen: Any, clock: Clock, tmp_path: Path
) -> None:
    watch, lines = screen("extract")
    log = tmp_path / "vllm.log"
    log.write_text("loading\n\x1b[32mINFO\x1b[0m shard 1\rINFO shard 2\r\n\n")
    told(watch, "service.starting", service="ab", mode="extract", log=str(log))
    clock.now += 12
    assert lines()[1] == "starting  vllm extract  12s  INFO shard 2"
    told(watch, "service.ready", service="ab", mode="extract", seconds=36.2)
    clock.now += 130
    assert lines()[1] == "ready     vllm extract  2m10s  started in 36s"
    told(watch, "service.stopped", service="ab", mode="extract")
    assert len(lines()) == 1


def test_a_stage_that_fails_shows_the_last_line_of_its_log_and_where_that_is(
    screen: Any, clock: Clock, tmp_path: Path
) -> None:
    watch, lines = screen("train")
    log = tmp_path / "t.log"
    log.write_text("step 1\nCUDA error: an illegal memory access\n")
    told(watch, "stage.started", node="train", log=str(log), phase=0, phases=1)
    assert "CUDA error" in lines()[0]  # while there is no progress, the log tells what it does
    clock.now += 3
    told(watch, "stage.failed", node="train", message="train was killed by SIGKILL\n\nits log")
    shown = lines()
    assert shown[0] == "failed  train  3.0s  train was killed by SIGKILL"
    assert shown[1] == "train: CUDA error: an illegal memory access"
    assert "".join(shown[2:]).replace("\n", "").replace(" ", "") == f"train:{log}"
    clock.now += 60
    assert lines()[0].split()[2] == "3.0s"  # its clock has stopped


def test_an_attempt_that_is_repeated_says_when_and_why(screen: Any) -> None:
    watch, lines = screen("train")
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=1)
    told(watch, "stage.retried", node="train", attempt=1, message="the server ended", seconds=8.0)
    assert "again" in lines()[0]
    assert "attempt 2 in 8.0s, because the server ended" in lines()[0]
    told(watch, "stage.started", node="train", log="", phase=0, phases=1, attempt=2)
    told(watch, "stage.progress", node="train", done=1, total=2, unit="steps", note={})
    assert "attempt 2  1/2 steps" in lines()[0]


def test_a_run_that_is_asked_to_stop_says_what_goes_on_and_what_a_second_signal_does(
    screen: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    live, seen = screen("tokenize", "train")
    for watch in (live, ui.Lines(clock)):
        told(watch, "stage.started", node="train", log="")
        told(watch, "run.stopping", seconds=30.0)
    assert seen()[-1] == "stopping  stages have 30 s for a checkpoint; Ctrl-C again ends them at once"
    assert len(seen()[-1] + "^C") < 80, "which the terminal writes behind it"
    assert "stopping stages have 30 s for a checkpoint" in capsys.readouterr().err
    told(live, "run.finished", status="interrupted", seconds=3.0)
    assert "stopped  train" in seen()[1]


def test_on_a_low_screen_only_what_goes_on_is_listed_and_the_rest_is_counted(screen: Any) -> None:
    watch, lines = screen(*(f"stage{i}" for i in range(300)), height=20)
    for i in range(5):
        told(watch, "stage.decided", node=f"stage{i}", state="cached", reason="made by r", key=KEY)
    told(watch, "stage.started", node="stage7", log="", phase=0, phases=1)
    shown = lines()
    assert shown[0].startswith("running  stage7")
    assert shown[1].split(maxsplit=1) == ["...", "5 cached, 294 -"]
    assert len(shown) == 2


def test_markup_in_a_name_or_a_message_is_no_markup(screen: Any) -> None:
    watch, lines = screen("train")
    told(watch, "stage.failed", node="train", message="list[int] [/bold] is wrong")
    assert lines()[0].endswith("list[int] [/bold] is wrong")


def test_a_rate_forgets_what_is_long_past_and_begins_anew_with_another_total() -> None:
    pace = ui.Pace()

    def hear(now: float, done: float, total: float = 1000) -> str:
        pace.update({"unit": "rows", "done": done, "total": total}, now)
        return str(pace)

    assert hear(0, 0) == ""
    assert hear(0.5, 5) == ""  # too short to be told
    assert hear(100, 100) == "15m43s left  57/min"
    for second in range(101, 200):
        said = hear(second, 100 + 2 * (second - 100))
    assert said == "5m51s left  2/s"
    assert hear(200, 1, total=20) == ""
    assert hear(300, 2, total=20) == "30m00s left  0.6/min"
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
    with ui.Lines(clock) as watch:
        told(watch, "stage.decided", node="prompts", state="cached", reason="made by r", key=KEY)
        told(watch, "stage.decided", node="train", state="run", reason="changed: train.lr 1 -> 2", key=KEY)
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
        "starting vllm extract",
        "ready    vllm extract        36s",
        "...      train               10/384 conversations  1m15s left  5/s  tokens/s 140",
        "...      train               90/384 conversations  59s left  5/s  tokens/s 140",
        "...      train               170/384 conversations  43s left  5/s  tokens/s 140",
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
    assert isinstance(ui.watcher(NODES), ui.Lines)


def test_a_file_gets_lines_and_a_terminal_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(ui.watcher(NODES), ui.Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(ui.watcher(NODES), ui.Live)


def test_no_color_leaves_no_colour_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watch = ui.Live(["train"], console)
    told(watch, "stage.failed", node="train", message="it died")
    with console.capture() as capture:
        console.print(watch.draw())
    assert "\x1b[31m" not in capture.get()
