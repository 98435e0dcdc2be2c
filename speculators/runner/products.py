"""Finds the trained drafts of runs, the files that belong to each, and the commands that use them."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.config.algorithms import proposed_tokens
from speculators.config.execution import RunOptions
from speculators.errors import RecipeError, StoreError
from speculators.runner import history
from speculators.runner.history import Run
from speculators.runner.planning.graph import KINDS, TARGET
from speculators.runner.store.artifacts import Store

CONFIG = "config.json"
EVALUATION = "evaluation.json"
LOCK = "lock.json"
"""File in the run directory: what the run's recipe resolved to, see `planning.lockfile`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A trained draft, and the run that it comes from, as far as that is known."""

    checkpoint: Path
    """Directory with config.json and model.safetensors."""
    run: Run | None = None
    """The run that trained it, or reused it."""
    node: str = ""
    """Its node in that run."""
    evaluation: Path | None = None
    """Content of the artifact with its `evaluation.json`, if the run measured it."""

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config: dict[str, Any] = json.loads((self.checkpoint / CONFIG).read_text())
        return config

    @property
    def verifier(self) -> str:
        """Name by which the checkpoint names its target: a hub id or a path."""
        return str(self.config["speculators_config"]["verifier"]["name_or_path"] or "")

    @property
    def target(self) -> Path | None:
        """Directory of its target's checkpoint, if the run recorded it."""
        stage = self.run.stages.get(TARGET) if self.run else None
        return Path(stage.path) if stage and stage.path else None

    @property
    def evaluated_tokens(self) -> int | None:
        """Tokens proposed in one step in the evaluation's first measurement; None if config.json has that number."""
        if self.evaluation is None:
            return None
        tokens = int(json.loads((self.evaluation / EVALUATION).read_text())["num_speculative_tokens"])
        return None if tokens == proposed_tokens(self.config) else tokens

    @property
    def training(self) -> Path:
        """Content of the artifact of the training."""
        return self.checkpoint.parent


def of_run(run: Run) -> list[Product]:
    """The drafts of a run whose checkpoints still exist, in data-flow order."""
    products = []
    for name, stage in run.stages.items():
        if stage.path and _gives_draft(stage.kind) and is_checkpoint(best := Path(stage.path) / "best"):
            measured = [Path(other.path) for other in run.stages.values()
                        if other.kind == "evaluate" and other.path and name in other.inputs.values()]  # fmt: skip
            evaluation = next((path for path in measured if path.is_dir()), None)
            products.append(Product(checkpoint=best, run=run, node=name, evaluation=evaluation))
    return products


def find_product(name: str, runs: Path, store: Store) -> Product:
    """Find a draft by run (`last`, name, prefix, path, or `RUN:NODE`), by artifact (`train:KEY`), or by directory.

    An empty name finds the draft of the last run that has one.

    Raises:
        RecipeError: there is no such run, or it has no draft, or several.
        StoreError: there is no such artifact, or several.
    """
    if not name:
        newest = (product for run in reversed(history.list_runs(runs)) for product in of_run(run))
        if (product := next(newest, None)) is None:
            raise RecipeError(f"no run in `{runs}` has a trained draft", "name one: a run, train:KEY or a directory")
        return product
    if is_checkpoint(Path(name).expanduser()):
        return Product(checkpoint=Path(name).expanduser())
    if (Path(name).expanduser() / CONFIG).is_file() and history.read_run(Path(name).expanduser()) is None:
        raise RecipeError(
            f"the {CONFIG} in `{name}` is none of a draft in the speculators format that names its target",
            "name the directory of such a checkpoint, a run, or train:KEY",
        )
    stage_or_run, _, key_or_node = name.partition(":")
    if stage_or_run in KINDS:
        return Product(checkpoint=_artifact(store, stage_or_run, key_or_node) / "best")
    return in_run(stage_or_run, runs, key_or_node)


def in_run(name: str, runs: Path, node: str = "") -> Product:
    """Find a draft of a run; `node` selects one of several.

    Raises:
        RecipeError: as `find_product`.
    """
    run = history.find(runs, name)
    products = [product for product in of_run(run) if node in ("", product.node)]
    if not products:
        which = f"no draft of `{node}`" if node else "no trained draft"
        raise RecipeError(
            f"the run {run.name} has {which}, or its artifact was deleted",
            f"run it again: {again(run)}" if run.argv else f"see its stages: speculators-run show {run.name}",
        )
    if len(products) > 1:
        names = [f"{name}:{product.node}" for product in products]
        raise RecipeError(f"the run {run.name} has {len(products)} drafts", f"choose one: {', '.join(names)}")
    return products[0]


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a draft in the speculators format, which names its target."""
    try:
        return bool(Product(checkpoint=directory).verifier)
    except (OSError, ValueError, TypeError, LookupError):
        return False


def link_results(run: Run) -> None:
    """Link a run's results into its directory: `draft`, `evaluation`, `metrics`; of several, `draft-NODE` and so on."""
    for name, entries in _results(run).items():
        for node, path in entries.items():
            link_path = run.path / _of_node(name, node, len(entries))
            with contextlib.suppress(OSError):  # a file system without links, or a directory that is not writable
                link_path.unlink(missing_ok=True)
                link_path.symlink_to(path)


def next_steps(run: Run) -> Iterator[tuple[str, str]]:
    """What to do after a run, as (label, path or command); the commands work in the current directory.

    A run that did nothing has no directory any more: then they name the last run with the same draft, or the artifact.
    """
    for product in of_run(run):
        recorded = product if run.path.is_dir() else _in_last_run(product.checkpoint, run.path.parent)
        if recorded is None or recorded.run is None:
            yield "draft", shlex.quote(_relative(product.checkpoint))
            yield "serve", shlex.join(["speculators-run", "serve", f"train:{product.training.parent.name[:8]}"])
            continue
        drafts, name = len(of_run(recorded.run)), argument(recorded)
        link_path = recorded.run.path / _of_node("draft", recorded.node, drafts)
        yield "draft", shlex.quote(_relative(link_path if link_path.is_symlink() else product.checkpoint))
        yield "serve", shlex.join(["speculators-run", "serve", name])
        directory = f"{_of_node(run.recipe, product.node, len(of_run(run)))}-draft"
        yield "publish", shlex.join(["speculators-run", "publish", name, directory])
    if run.argv:
        yield "again", again(run)


def argument(product: Product) -> str:
    """The shortest argument by which `find_product` finds a draft of a run from the current directory."""
    assert product.run is not None
    name = _name(product.run)
    return name if len(of_run(product.run)) == 1 else f"{name}:{product.node}"


def again(run: Run) -> str:
    """The command of a run."""
    return shlex.join(["speculators-run", *run.argv])


def _results(run: Run) -> dict[str, dict[str, Path]]:
    """Paths of a run's results by name and node."""
    results: dict[str, dict[str, Path]] = {"draft": {}, "metrics": {}, "evaluation": {}}
    for product in of_run(run):
        results["draft"][product.node] = product.checkpoint
        results["metrics"][product.node] = product.training / "metrics.jsonl"
    for name, stage in run.stages.items():
        if stage.kind == "evaluate" and stage.path:
            results["evaluation"][name] = Path(stage.path)
    return results


def _gives_draft(kind: str) -> bool:
    return kind in KINDS and "speculator" in KINDS[kind].gives


def _artifact(store: Store, stage: str, prefix: str) -> Path:
    """Content of the artifact `STAGE:KEY-PREFIX` of a draft."""
    fitting = [artifact for artifact in store.artifacts(stage) if artifact.key.startswith(prefix)]
    fitting = [artifact for artifact in fitting if is_checkpoint(artifact.data / "best")]
    if len(fitting) != 1:
        there_is = ", ".join(f"{stage}:{artifact.key[:8]}" for artifact in fitting)
        raise StoreError(
            f"{len(fitting)} drafts match `{stage}:{prefix}`",
            f"choose one: {there_is}" if fitting else "`speculators-run ls train` lists the drafts of the store",
        )
    return fitting[0].data


def _in_last_run(checkpoint: Path, runs: Path) -> Product | None:
    """A draft as that of the last run that ended in it."""
    for path in sorted(runs.iterdir() if runs.is_dir() else (), reverse=True):  # names begin with the time
        run = history.read_run(path)
        for product in of_run(run) if run else ():
            if product.checkpoint == checkpoint:
                return product
    return None


def _of_node(name: str, node: str, count: int) -> str:
    """The name of a run's result: with its node where the run has several."""
    return name if count == 1 else f"{name}-{node}"


def _name(run: Run) -> str:
    """The shortest name by which `history.find` finds a run from the current directory."""
    parent = run.path.parent
    if Path(RunOptions().dir).resolve() != parent:
        return _relative(run.path)
    time = run.name.removesuffix(f"-{run.recipe}")
    siblings = [path for path in parent.iterdir() if path.name.startswith(time)]
    return time if len(siblings) == 1 else run.name


def _relative(path: Path) -> str:
    """A path as short as it works in the current directory."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
