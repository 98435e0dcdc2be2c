"""What starts a worker. The worker itself locks, resumes and publishes, so correctness does not depend on any of these.

To add one: a module with a class that has `submit`, and a line in `executor`, in `EXTRAS` and in
`choices.ExecutorName`. What runs on machines of its own takes the far end from `remote`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from speculators.config.choices import ExecutorName
from speculators.config.schema import Config, ExecutorOptions
from speculators.errors import RecipeError
from speculators.runner.planning.graph import Node


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


EXTRAS = {"submitit": ("submitit", "slurm"), "slurm": ("submitit", "slurm"), "ray": ("ray", "ray")}
"""Executors that need a package, that package, and the extra that brings it."""


def executor(name: str, options: ExecutorOptions | None = None) -> Executor:
    """The executor of that name, imported only now: it may need what is not installed."""
    options = options or ExecutorOptions()
    if name in ("submitit", "slurm"):
        from speculators.runner.executors.submitit import SubmititExecutor

        return SubmititExecutor(options, here=name == "submitit")
    if name == "ray":
        from speculators.runner.executors.ray import RayExecutor

        return RayExecutor(options)
    from speculators.runner.executors.local import LocalExecutor

    return LocalExecutor()


def executor_of(config: Config, kind: str) -> Executor:
    """The executor of one kind of stage."""
    return executor(chosen(config, kind), config.executor)


def chosen(config: Config, kind: str) -> str:
    """The name of its executor: what its own section says, or the recipe's."""
    own: ExecutorName | None = getattr(getattr(config, kind, None), "executor", None)
    return (own or config.executor.name).name


def check(config: Config, nodes: Mapping[str, Node]) -> None:
    """Refuse before anything is started what an executor could not do hours later.

    Raises:
        RecipeError: a package is missing, or a job would have to divide its devices.
    """
    for node in nodes.values():
        name = chosen(config, node.kind)
        own = getattr(getattr(config, node.kind, None), "executor", None) is not None
        option = f"{node.kind}.executor={name}" if own else f"executor={name}"
        needs = [(option, *EXTRAS[name])] if name in EXTRAS else []
        if node.kind == "train" and not elsewhere(config, node.kind):
            needs += [(f"train.trackers=[{t.name}]", t.name, t.name) for t in config.train.trackers]
        for wanted, package, extra in needs:
            if importlib.util.find_spec(package) is None:
                raise RecipeError(
                    f"{wanted}: needs `{package}`, which is not installed", f"pip install 'speculators-run[{extra}]'"
                )
        if node.draws and served_there(config, node.kind):
            raise RecipeError(
                f"{option}: `{node.name}` draws from a server while it trains, and a job of {name} on another machine "
                "does not divide its devices between the two",
                f"{node.kind}.executor=local; or serve.url=URL of a server that all can reach; or extract before: "
                "pipeline=offline",
            )


def elsewhere(config: Config, kind: str) -> bool:
    """Whether the workers of this kind of stage run on other machines than the runner."""
    name = chosen(config, kind)
    if name == "ray":
        from speculators.runner.executors.ray import is_here

        return not is_here(config.executor)
    return name == "slurm"


def served_there(config: Config, kind: str) -> bool:
    """Whether this kind of stage has its servers started beside its workers, on other machines than the runner's."""
    return elsewhere(config, kind) and not config.serve.url
