"""Trackers: programs that show the metrics of a training while it runs, each behind one interface.

They are imported here, and only if the recipe names them. One that is not installed or does not start ends the run
before training begins; one that fails later is dropped with one warning. The reference is `metrics.jsonl`, which does
not depend on trackers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from speculators.config.choices import Tracker
from speculators.errors import RecipeError
from speculators.packages import install_command


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a tracker shows of a run. It is the same for all attempts, so that they are one run of the tracker."""

    project: str
    name: str
    options: Mapping[str, Any]
    """The recipe's options by dotted name."""
    directory: Path
    """Where trackers write files."""
    scratch: Path
    """Directory that the next attempt finds again."""


class MetricsTracker(Protocol):
    """One tracker of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics after `step` steps."""

    def close(self) -> None:
        """End the tracker's run."""


class TensorBoard:
    """Event files in `directory/name`."""

    def __init__(self, info: RunInfo) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer: Any = writer(str(info.directory / info.name))
        self._writer.add_text("options", json.dumps(dict(info.options), indent=1, sort_keys=True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsTracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `MetricsTracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases. WANDB_MODE=offline, WANDB_ENTITY and the others are those of W&B."""

    def __init__(self, info: RunInfo) -> None:
        info.directory.mkdir(parents=True, exist_ok=True)
        self._run: Any = importlib.import_module("wandb").init(
            project=info.project, name=info.name, id=info.name, resume="allow",
            config=dict(info.options), dir=str(info.directory),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsTracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `MetricsTracker`."""
        self._run.finish()


class Trackio:
    """Trackio: a local database, or a Space."""

    def __init__(self, info: RunInfo) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project=info.project, name=info.name, resume="allow", config=dict(info.options))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsTracker`."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """See `MetricsTracker`."""
        self._trackio.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, info: RunInfo) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(info.project)
        # MLflow chooses the id of a run itself.
        run_id_file = info.scratch / "mlflow-run"
        run = self._mlflow.start_run(
            run_name=info.name, run_id=run_id_file.read_text() if run_id_file.exists() else None
        )
        if not run_id_file.exists():
            self._mlflow.log_params(dict(info.options))
        run_id_file.write_text(run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `MetricsTracker`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See `MetricsTracker`."""
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

    def __init__(self, kinds: Sequence[Tracker] = (), info: RunInfo | None = None) -> None:
        check_installed(kinds)
        self.failed: list[str] = []
        """Messages about the trackers that were dropped."""
        self._trackers: dict[str, MetricsTracker] = {}
        assert info is not None or not kinds
        for kind in kinds:
            try:
                self._trackers[kind.name] = KINDS[kind](info)  # type: ignore[arg-type]
            except Exception as error:
                self.close()
                raise RecipeError(
                    f"the tracker {kind.name} does not start: {type(error).__name__}: {error}",
                    f"fix that, or remove {kind.name} from train.trackers",
                ) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Record a line of metrics, which has a `step`."""
        values: dict[str, float] = {}
        for name, value in line.items():
            if isinstance(value, Mapping):
                values |= {f"{name}/{inner}": float(its) for inner, its in value.items()}
            elif name != "step":
                values[f"train/{name}"] = float(value)
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.log(line["step"], values))

    def close(self) -> None:
        """End all trackers' runs."""
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close())
        self._trackers.clear()

    def _try(self, name: str, call: Callable[[MetricsTracker], None]) -> None:
        try:
            call(self._trackers[name])
        except Exception as error:
            del self._trackers[name]
            self.failed.append(f"the tracker {name} failed and was dropped: {error}")
            print(f"warning: {self.failed[-1]}", file=sys.stderr)


def check_installed(kinds: Sequence[Tracker]) -> None:
    """Check that every tracker's package, which has its name, is installed.

    Raises:
        RecipeError: some are not; names all of them.
    """
    missing = [kind.name for kind in kinds if not _importable(kind.name)]
    if missing:
        raise RecipeError(
            f"train.trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            f"{install_command(*missing)}, or remove it from train.trackers",
        )


def _importable(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
