"""The guard: nothing of the tree it owns survives, whatever dies first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from speculators.runner.servers import guard

FAKE = Path(__file__).parents[1] / "fake_server.py"
pytestmark = pytest.mark.skipif(not guard.HAS_PROC, reason="the guard sees only the group where there is no /proc")


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return guard.start_time(pid) is not None


def guarded(tmp_path: Path, *argv: str, grace: float = 5.0) -> subprocess.Popen[bytes]:
    words = [
        sys.executable,
        "-I",
        "-S",
        guard.__file__,
        "--log",
        str(tmp_path / "log"),
        "--pids",
        str(tmp_path / "pids.json"),
    ]
    return subprocess.Popen([*words, "--grace", str(grace), "--", *argv], stdin=subprocess.PIPE)


def tree(tmp_path: Path, *options: str, grace: float = 5.0) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A guard with a server that has left a detached process behind; the pids of those two."""
    pid_file = tmp_path / "orphan"
    argv = [sys.executable, str(FAKE), "0", "m", "--detach", str(pid_file), *options]
    process = guarded(tmp_path, *argv, grace=grace)
    until(lambda: pid_file.exists() and pid_file.read_text())
    orphan = int(pid_file.read_text())
    until(lambda: orphan in recorded(tmp_path) and len(recorded(tmp_path)) == 2)
    return process, recorded(tmp_path)


def recorded(tmp_path: Path) -> list[int]:
    record = guard._load(tmp_path / "pids.json")
    return [p["pid"] for p in record["processes"]] if record else []


def test_a_guard_whose_directory_was_taken_away_ends_what_it_started(tmp_path: Path) -> None:
    """Its runner died before this one could write down what it owns, and the next run has cleaned up."""
    home, started = tmp_path / "home", tmp_path / "started"
    code = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    words = [sys.executable, "-I", "-S", guard.__file__, "--log", str(tmp_path / "log"), "--pids", str(home / "p.json")]
    with subprocess.Popen([*words, "--", sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.wait(10) == 128 + signal.SIGTERM
    assert not started.exists() or not alive(int(started.read_text()))


@pytest.mark.parametrize("code", [0, 3])
def test_it_ends_with_the_exit_code_of_the_program_and_keeps_its_output(tmp_path: Path, code: int) -> None:
    with guarded(tmp_path, sys.executable, "-c", f"import sys; print('said'); sys.exit({code})") as process:
        assert process.wait(10) == code
    assert (tmp_path / "log").read_text() == "said\n"


def test_a_death_by_signal_and_a_program_that_is_not_there_have_codes_of_their_own(tmp_path: Path) -> None:
    with guarded(tmp_path, sys.executable, "-c", "import os; os.kill(os.getpid(), 9)") as process:
        assert process.wait(10) == 128 + 9
    with guarded(tmp_path, "/nowhere/python") as process:
        assert process.wait(10) == 127
    assert "cannot start /nowhere/python" in (tmp_path / "log").read_text()


def test_closing_its_input_ends_the_tree_and_what_was_detached_from_it(tmp_path: Path) -> None:
    process, pids = tree(tmp_path)
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 128 + signal.SIGTERM
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("after", [None, 0.0, 1.5])
def test_who_lives_waits_for_an_orderly_end_and_the_dead_do_not(tmp_path: Path, after: float | None) -> None:
    """The holder asks for the end, and lives; or dies, at once or while it waits."""
    process, pids = tree(tmp_path, "--stubborn", grace=guard.DEAD_HOLDER_GRACE + 1.5)
    with process:
        assert process.stdin is not None
        began = time.monotonic()
        if after != 0.0:
            process.stdin.write(guard.STOP)
            process.stdin.flush()
        if after is not None:
            time.sleep(after)
            process.stdin.close()
        process.wait(30)
        assert (time.monotonic() - began > guard.DEAD_HOLDER_GRACE + 1) == (after is None)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_it_ends_the_tree_even_if_that_ignores_signals(tmp_path: Path, number: int) -> None:
    process, pids = tree(tmp_path, "--stubborn", grace=0.3)
    with process:
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)  # in the middle of ending
        assert process.wait(10) == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in pids)


def test_when_the_program_ends_what_it_left_is_ended_too(tmp_path: Path) -> None:
    process, pids = tree(tmp_path, "--die", str(tmp_path / "die"))
    with process:
        (tmp_path / "die").touch()
        assert process.wait(10) == 1
    assert not any(alive(pid) for pid in pids)


def test_the_death_of_who_holds_it_ends_the_tree(tmp_path: Path) -> None:
    holder = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)"
    )
    words = [guard.__file__, "--log", str(tmp_path / "log"), "--pids", str(tmp_path / "pids.json"), "--"]
    server = [sys.executable, str(FAKE), "0", "m", "--detach", str(tmp_path / "orphan")]
    with subprocess.Popen([sys.executable, "-c", holder, sys.executable, *words, *server]) as process:
        until(lambda: len(recorded(tmp_path)) == 2)
        pids = recorded(tmp_path)
        process.kill()
    until(lambda: not any(alive(pid) for pid in pids))


def test_after_a_killed_guard_the_next_run_reaps_what_is_left(tmp_path: Path) -> None:
    process, pids = tree(tmp_path, "--stubborn")
    with process:
        assert guard.reap(tmp_path / "pids.json") == [], "a guard that lives does its own work"
        process.kill()
    assert all(alive(pid) for pid in pids), "this server ignores the signal that it gets when its guard dies"
    assert guard.abandoned(tmp_path / "pids.json")
    assert guard.reap(tmp_path / "pids.json") == sorted(pids)
    assert not any(alive(pid) for pid in pids)


def test_a_server_ends_by_itself_when_its_guard_is_killed(tmp_path: Path) -> None:
    process, pids = tree(tmp_path)
    with process:
        process.kill()
    orphan = int((tmp_path / "orphan").read_text())
    until(lambda: not any(alive(pid) for pid in pids if pid != orphan))
    assert guard.reap(tmp_path / "pids.json") == [orphan]


def test_a_pid_that_belongs_to_another_process_by_now_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        start = guard.start_time(stranger.pid)
        assert start is not None
        record = {"machine": guard.machine(), "guard": {"pid": os.getpid(), "start": 1}}
        pids = tmp_path / "pids.json"
        for machine, claimed in ((guard.machine(), start - 1), ("another boot", start)):
            process = {"pid": stranger.pid, "start": claimed}
            pids.write_text(json.dumps({**record, "machine": machine, "processes": [process]}))
            assert guard.reap(pids) == []
        assert stranger.poll() is None
        pids.write_text("{")
        assert guard.reap(pids) == []
        stranger.communicate(b"\n")
