"""How a process ended, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.runner.execution import endings


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL: probably out of memory"),
        (137, "was killed by SIGKILL: probably out of memory"),
        (-7, "was killed by SIGBUS: probably no space in /dev/shm or on the disk"),
        (-12, "was killed by SIGUSR2"),
        (2, "ended with exit code 2"),
        (128, "ended with exit code 128"),
        (255, "ended with exit code 255"),
    ],
)
def test_signals_have_names_and_the_usual_ones_reasons(code: int, words: str) -> None:
    assert endings.describe_exit(code) == words


def test_the_command_for_one_stage_keeps_every_word_but_the_choice_of_stages() -> None:
    words = ["recipe=mine", "until=train", "force=vocab", "from=train", "target.source=/a b/c", "train.lr=1e-3"]
    command = "speculators-run recipe=mine 'target.source=/a b/c' train.lr=1e-3 only=evaluate"
    assert endings.retry_command(words, "evaluate") == command
    assert endings.retry_command(["-m", "train.lr=1,2"], "train") == "", "a sweep's words are those of several runs"


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert endings.tail(log) == []
    log.write_bytes(b"\xff\n" + b"".join(b"%d\n" % n for n in range(50)))
    assert endings.tail(log, 3) == ["47", "48", "49"]


def test_what_the_worker_says_itself_is_not_told_twice(tmp_path: Path) -> None:
    log = tmp_path / "log"
    own = "error: no rows\nat all\n\nhint: give it some\n"
    log.write_text(f"--- seed: attempt 1\n{own}--- seed: attempt 2\nreading\n{own}")
    lines = ["--- seed: attempt 1", *own.splitlines(), "--- seed: attempt 2", "reading"]
    assert endings.tail_before(log, "no rows\nat all") == lines
    assert endings.tail_before(log, "was killed") == [*lines, *own.splitlines()]
    log.write_text(f"--- seed: attempt 1\n{own}")
    assert endings.tail_before(log, "no rows\nat all") == [], "nothing but that"


def test_a_log_that_was_never_begun_is_not_pointed_to(tmp_path: Path) -> None:
    assert endings.hint_with_log("mend it", tmp_path / "log", "again") == "mend it\n\nagain:  again"
    assert endings.hint_with_log("mend it", tmp_path / "log", "") == "mend it"
