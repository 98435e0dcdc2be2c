"""What starts a worker. The worker itself locks, resumes and publishes, so correctness does not depend on any of these.

To add one: a module with a class that has `submit`, and a line in `executor` and in `config.ExecutorName`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from speculators.errors import RecipeError, closest


class Handle(Protocol):
    """One worker that was started."""

    @property
    def pid(self) -> int:
        """Process id, where that means something."""

    def poll(self) -> int | None:
        """None while it runs; then its exit code, -N for death by signal N. Nothing of it is left then."""

    def terminate(self) -> None:
        """Ask it to stop: it keeps its work and exits 143."""

    def kill(self) -> None:
        """End it and all its processes at once."""


class Executor(Protocol):
    """A way to start workers."""

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> Handle:
        """Start `python -m speculators.worker request` with `env` added; its output is appended to `log`."""


def executor(name: str) -> Executor:
    """The executor of that name, imported only now: it may need what is not installed.

    Raises:
        RecipeError: there is none.
    """
    if name == "local":
        from speculators.runner.executors.local import LocalExecutor

        return LocalExecutor()
    raise RecipeError(f"executor.name: there is no executor `{name}`", closest(name, ["local"]))
