"""Executors start workers: as local processes, as Slurm jobs, or as Ray tasks.

The worker itself locks, resumes and publishes, so correctness does not depend on the executor. To add one: a module
with a class that has `submit`, and a line in `executor`, in `EXTRAS` and in `choices.ExecutorName`. One that submits
jobs to a cluster uses `remote`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from speculators.config.choices import ExecutorName
from speculators.config.execution import ExecutorOptions
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.packages import install_command
from speculators.runner.planning.graph import Node


class Handle(Protocol):
    """A worker that was started."""

    @property
    def pid(self) -> int:
        """Process id of the worker on its machine; 0 while it is queued."""

    def poll(self) -> int | None:
        """None while it runs; once all its processes have ended, its exit code, -N for death by signal N."""

    def terminate(self) -> None:
        """Ask it to stop: it writes a checkpoint and exits with code 143."""

    def kill(self) -> None:
        """Kill it and all its processes at once."""


class Executor(Protocol):
    """Starts workers."""

    def submit(self, request: Path, log: Path, env: dict[str, str]) -> Handle:
        """Start `python -m speculators.worker REQUEST` with `env` in its environment and output appended to `log`."""


EXTRAS = {"submitit": ("submitit", "slurm"), "slurm": ("submitit", "slurm"), "ray": ("ray", "ray")}
"""Executor -> the package that it needs and the extra that installs it."""


def executor(name: str, options: ExecutorOptions | None = None) -> Executor:
    """The executor of a name. Its module is imported here, since its package may not be installed."""
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
    return executor(executor_name(config, kind), config.executor)


def executor_name(config: Config, kind: str) -> str:
    """The name of a stage's executor: the option `executor` of its section, if set, else the recipe's."""
    override: ExecutorName | None = getattr(getattr(config, kind, None), "executor", None)
    return (override or config.executor.name).name


def check_executors(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check before the run starts that the executors, and trackers, can run these stages.

    Raises:
        RecipeError: a package is missing, or a job would have to divide its devices.
    """
    for node in nodes.values():
        name = executor_name(config, node.kind)
        overridden = getattr(getattr(config, node.kind, None), "executor", None) is not None
        option = f"{node.kind}.executor={name}" if overridden else f"executor={name}"
        needs = [(option, *EXTRAS[name])] if name in EXTRAS else []
        if node.kind == "train" and not is_remote(config, node.kind):
            needs += [(f"train.trackers=[{t.name}]", t.name, t.name) for t in config.train.trackers]
        for requirement, package, extra in needs:
            if importlib.util.find_spec(package) is None:
                raise RecipeError(
                    f"{requirement}: needs `{package}`, which is not installed",
                    install_command(extra),
                )
        if node.draws and has_remote_servers(config, node.kind):
            raise RecipeError(
                f"{option}: `{node.name}` streams hidden states from a server while it trains, and a {name} job cannot "
                "divide its devices between the two",
                f"{node.kind}.executor=local; or serve.url=URL of a server that every machine can reach; or "
                "pipeline=offline, which extracts before it trains",
            )


def is_remote(config: Config, kind: str) -> bool:
    """Whether the workers of this kind of stage run on other machines than the runner."""
    name = executor_name(config, kind)
    if name == "ray":
        from speculators.runner.executors.ray import is_local

        return not is_local(config.executor)
    return name == "slurm"


def has_remote_servers(config: Config, kind: str) -> bool:
    """Whether the servers of this kind of stage start in its workers' jobs, on other machines than the runner's."""
    return is_remote(config, kind) and (kind == "evaluate" or not config.serve.url)
