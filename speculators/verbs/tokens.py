"""show tokens: one row of a run's token table, with the supervised tokens marked."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from speculators import ui
from speculators.errors import RecipeError, StoreError
from speculators.runner import history
from speculators.runner.history import Run, Stage

_KINDS = ("tokenize", "adopt_tokens")


def show_tokens(run: Run, names: Sequence[str], row: str, as_data: bool) -> None:
    """Show row `row` of the token table of a run, or of the stage in `names`."""
    if not row.isdecimal():
        raise RecipeError(f"--row {row}: must be the number of a row", "rows are counted from 0: --row 7")
    stage = _stage(run, names)
    target = run.stages.get(stage.inputs.get("target", "target"))
    if not (stage.path and target and target.path):
        raise StoreError(
            f"the tokens of {run.name} and the tokenizer of its target are not both in the store",
            "run the recipe again, until=tokenize",
        )
    command = [sys.executable, "-m", "speculators.data.token_view", stage.path, target.path, row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise StoreError(f"cannot read the tokens in {stage.path}: {last[0]}", f"speculators-run verify {stage.kind}")
    values = json.loads(done.stdout)
    if "row" not in values:
        raise RecipeError(f"--row {row}: the table has {values['rows']} rows", f"--row {max(values['rows'] - 1, 0)}")
    if as_data:
        print(json.dumps(values, indent=1))
    else:
        _page(_text(values))


def _stage(run: Run, names: Sequence[str]) -> Stage:
    stages = [stage for stage in run.stages.values() if stage.kind in _KINDS]
    stage = stages[0] if len(stages) == 1 and not names else history.find_stage(run, names[0] if names else _KINDS[0])
    if stage.kind not in _KINDS:
        raise RecipeError(f"`{stage.node}` gives no tokens", f"speculators-run show tokens {run.name} {_KINDS[0]}")
    return stage


def _text(values: dict[str, Any]) -> str:
    """What a person reads of a row: supervised text in colour on a terminal, and between marks everywhere."""
    head = f"row {values['row']} of {values['rows']}  {values['id']}  {values['tokens']} tokens"
    marked = (
        ui.styled(f"«{span['text']}»", "green") if span["supervised"] else span["text"] for span in values["spans"]
    )
    return f"{head}, {values['supervised']} supervised, between « and »\n\n{''.join(marked)}"


def _page(text: str) -> None:
    """Print a text, on a terminal through $PAGER, or `less`."""
    pager = shlex.split(os.environ.get("PAGER", "less"))
    if not sys.stdout.isatty() or not pager or not shutil.which(pager[0]):
        print(text)
        return
    subprocess.run(pager, input=text, text=True, check=False, env={"LESS": "FRX", **os.environ})
