"""Trackers: programs that show the metrics of a training while it goes on. Each is told by its own interface.

They are imported here and only if the recipe names them. One that is not installed, or that does not start, stops the
training before it begins; one that fails later is left out from there on, which is said once. What counts is
`metrics.jsonl`, and no tracker is needed to read it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from speculators.config.choices import Tracker
from speculators.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a tracker is told of the run. All attempts at one training say the same, and so are one run there."""

    project: str
    name: str
    options: Mapping[str, Any]
    """The recipe's options by dotted name, plain values."""
    directory: Path
    """For what is written to files."""
    scratch: Path
    """What one attempt leaves for the next."""


class Told(Protocol):
    """One tracker at work."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in metrics after `step` steps."""

    def close(self) -> None:
        """The training is over."""


class TensorBoard:
    """Event files in `directory/name`."""

    def __init__(self, about: About) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer: Any = writer(str(about.directory / about.name))
        self._writer.add_text("options", json.dumps(dict(about.options), indent=1, sort_keys=True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Told`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Told`."""
        self._writer.close()


class Wandb:
    """Weights & Biases. WANDB_MODE=offline, WANDB_ENTITY and the others are W&B's own, and work."""

    def __init__(self, about: About) -> None:
        about.directory.mkdir(parents=True, exist_ok=True)
        self._run: Any = importlib.import_module("wandb").init(
            project=about.project, name=about.name, id=about.name, resume="allow",
            config=dict(about.options), dir=str(about.directory),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Told`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Told`."""
        self._run.finish()


class Trackio:
    """Trackio: a local database, or a Space."""

    def __init__(self, about: About) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project=about.project, name=about.name, resume="allow", config=dict(about.options))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Told`."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """See `Told`."""
        self._trackio.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, about: About) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(about.project)
        # MLflow chooses the id of a run itself.
        kept = about.scratch / "mlflow-run"
        run = self._mlflow.start_run(run_name=about.name, run_id=kept.read_text() if kept.exists() else None)
        if not kept.exists():
            self._mlflow.log_params(dict(about.options))
        kept.write_text(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Told`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See `Told`."""
        self._mlflow.end_run()


KINDS: dict[Tracker, type[TensorBoard] | type[Wandb] | type[Trackio] | type[Mlflow]] = {
    Tracker.tensorboard: TensorBoard,
    Tracker.wandb: Wandb,
    Tracker.trackio: Trackio,
    Tracker.mlflow: Mlflow,
}


class Trackers:
    """All trackers of a run; none by default.

    Raises:
        RecipeError: one is not installed, or does not start.
    """

    def __init__(self, kinds: Sequence[Tracker] = (), about: About | None = None) -> None:
        check(kinds)
        self.failed: list[str] = []
        """What was left out on the way, with its reason."""
        self._told: dict[str, Told] = {}
        assert about is not None or not kinds
        for kind in kinds:
            try:
                self._told[kind.name] = KINDS[kind](about)  # type: ignore[arg-type]
            except Exception as error:
                self.close()
                raise RecipeError(
                    f"the tracker {kind.name} does not start: {type(error).__name__}: {error}",
                    f"mend that, or leave {kind.name} out of train.trackers",
                ) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics, with its `step`."""
        values: dict[str, float] = {}
        for name, value in line.items():
            if isinstance(value, Mapping):
                values |= {f"{name}/{inner}": float(its) for inner, its in value.items()}
            elif name != "step":
                values[f"train/{name}"] = float(value)
        for name in list(self._told):
            self._try(name, lambda told: told.log(line["step"], values))

    def close(self) -> None:
        """The training is over, well or not."""
        for name in list(self._told):
            self._try(name, lambda told: told.close())
        self._told.clear()

    def _try(self, name: str, what: Any) -> None:
        try:
            what(self._told[name])
        except Exception as error:
            del self._told[name]
            self.failed.append(f"the tracker {name} failed and was left out from then on: {error}")
            print(f"warning: {self.failed[-1]}", file=sys.stderr)


def check(kinds: Sequence[Tracker]) -> None:
    """Raises RecipeError where a tracker is not installed, for all of them. Packages and extras have its name."""
    missing = [kind.name for kind in kinds if not _importable(kind.name)]
    if missing:
        raise RecipeError(
            f"train.trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed here",
            f"pip install 'speculators-run[{','.join(missing)}]', or leave it out of train.trackers",
        )


def _importable(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
