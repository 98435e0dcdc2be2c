"""Where the real engine is run: one store for all stories, so that what one has made the next one finds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parent / "small.yaml"
ONE_ROW = Path(__file__).parent / "one_row.yaml"
QUESTION = json.loads(ONE_ROW.with_name("row.jsonl").read_text())
"""The row of `ONE_ROW`."""


class World:
    """One store, one working directory, and the command run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "store"

    def start(self, *words: str, verb: str = "run", recipe: Path | str = RECIPE) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "speculators.cli", verb, *([f"recipe={recipe}"] if recipe else []), *words]
        env = {**os.environ, "SPECULATORS_STORE": str(self.store)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, env=env, stdout=pipe, stderr=pipe, text=True)

    def run(self, *words: str, verb: str = "run", recipe: Path | str = RECIPE) -> tuple[int, str, str]:
        process = self.start(*words, verb=verb, recipe=recipe)
        out, err = process.communicate()
        return process.returncode, out, err

    def last_run(self, stage: str = "") -> dict[str, Any]:
        """The newest run; with a stage, the newest that has it, as a run that finds everything leaves none."""
        runs = (path for path in sorted((self.root / "runs").iterdir(), reverse=True) if path.is_dir())
        directory = next(
            path for path in runs if not stage or stage in json.loads((path / "run.json").read_text())["steps"]
        )
        events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
        return {"directory": directory, "events": events, **json.loads((directory / "run.json").read_text())}

    def processes(self) -> list[int]:
        """Processes of this world: their command line names its directory."""
        found = []
        for proc in Path("/proc").iterdir():
            if proc.name.isdigit() and int(proc.name) != os.getpid():
                try:
                    words = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
                except OSError:
                    continue
                if str(self.root).encode() in words:
                    found.append(int(proc.name))
        return found

    def worker(self, stage: str) -> int | None:
        """The process that works on a stage, by what it says of itself."""
        for beat in (self.store / "work" / stage).glob("*/heartbeat.json"):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                pid = int(json.loads(beat.read_text())["pid"])
                return pid if pid in self.processes() else None
        return None

    def scratch(self, stage: str) -> Path | None:
        return next((self.store / "work" / stage).glob("*/scratch"), None)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} before it was killed:\n{process.communicate()[1]}")
        time.sleep(0.05)
    pytest.fail("it never came to the point at which it was to be killed")


def gone(world: World, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while world.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not world.processes()


def lines(path: Path | None, name: str) -> int:
    file = path / name if path else None
    return len(file.read_text().splitlines()) if file and file.exists() else 0
