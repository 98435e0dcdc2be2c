"""Checks that data files have usable rows, while planning: `evaluate` would report its own only after training."""

from __future__ import annotations

from collections.abc import Iterable

from speculators.config.choices import DataFormat
from speculators.config.schema import Config
from speculators.data.conversations import RowCounts, usable
from speculators.data.files import data_files
from speculators.data.reading import needs_pyarrow
from speculators.errors import SourceError
from speculators.runner.planning.plan import State, Step

_RUNS = (State.run, State.waits)


def check_datasets(config: Config, steps: Iterable[Step]) -> None:
    """Read the first usable row of every dataset on this machine that a stage which will run reads.

    Raises:
        SourceError: a file has no row that its stages can use, or has another format than the recipe says.
    """
    by_name = {step.node.name: step for step in steps}
    readers = [(i, s.node) for s in by_name.values() if s.state in _RUNS for i in s.node.inputs.values()]
    for node in sorted({name for name, _ in readers if name.startswith("dataset.")}):
        name, path = node.removeprefix("dataset."), by_name[node].path
        option = f"data.{name}" if name in config.data else f"evaluate.datasets.{name}"
        spec = config.data.get(name) or config.evaluate.datasets[name]
        answering = [reader.name for slot, reader in readers if slot == node and not reader.keeps_answers]
        if spec.format is DataFormat.tokens and answering:
            raise SourceError(
                f"{option}.format=tokens: `{answering[0]}` needs prompts, and rows of token ids have none",
                "pipeline=off_policy, to train on them; to measure, a dataset of text",
            )
        if path is None or spec.format is DataFormat.upstream:
            continue
        counts = RowCounts()
        try:
            if any(needs_pyarrow(file) for _, file in data_files(path, spec.subset, spec.split)):
                continue  # which the runner does not import
            if next(usable(path, name, spec, counts, set(), answers=not answering), None) is None:
                raise counts.why_unusable(name, spec)
        except SourceError as error:
            raise SourceError(f"{option}.source={spec.source}: {error.message}", error.hint) from None
