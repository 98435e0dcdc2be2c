"""Captures of the terminal: `python -m tests.goldens.update captures` writes them; look at the diff."""

from __future__ import annotations

import re

from tests.goldens import captures


def test_captures_are_what_a_person_read_and_liked() -> None:
    golden = {file.name: file.read_text() for file in captures.DIRECTORY.iterdir()}
    assert captures.captures() == golden, "look at what changed: `python -m tests.goldens.update captures`"


def test_no_line_of_a_capture_is_wider_than_its_terminal_but_for_a_path_or_a_command_typed() -> None:
    for file in captures.DIRECTORY.iterdir():
        columns = int(file.stem.rpartition("_")[2])
        for line in file.read_text().splitlines():
            is_path = re.search(r"/\S{40,}$", line) or line.startswith("$ ")
            assert len(line) <= columns or is_path, f"{file.name}: {line}"
