"""show tokens: one row of a run's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators import cli
from speculators.data.token_table import TokenRow, save_table, write_table
from speculators.errors import RunError
from speculators.runner.history import Run, Stage
from speculators.verbs import tokens
from tests.data.chat import CHATML, char_tokenizer, save


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one row of tokens: a prompt and an answer."""
    tokenizer = char_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    target = save(tokenizer, tmp_path / "target")
    ids = tokenizer("<|im_start|>hi yo<|im_end|>", add_special_tokens=False)["input_ids"]
    row: TokenRow = {"input_ids": ids, "loss_mask": [0] * 4 + [1] * 3, "seq_len": 7, "id": "mine/a", "source": "mine"}
    write_table([row], tmp_path / "rows.arrow")
    save_table(tmp_path / "rows.arrow", tmp_path / "table")
    table = Stage(node="tokenize", kind="tokenize", path=str(tmp_path / "table"), inputs={"target": "target"})
    stages = {"tokenize": table, "target": Stage(node="target", kind="fetch", path=str(target))}
    return Run(name="past", path=tmp_path, recipe="", started="", status="done", seconds=1.0, argv=[], config={},
               stages=stages, metrics={})  # fmt: skip


def test_show_tokens_marks_what_is_supervised(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tokens.show_tokens(run, [], "0", as_data=False)
    head, _, text = capsys.readouterr().out.partition("\n\n")
    assert head == "row 0 of 1  mine/a  7 tokens, 3 supervised, between « and »"
    assert text.replace(" ", "") == "<|im_start|>hi«yo<|im_end|>»\n"
    tokens.show_tokens(run, ["tokenize"], "0", as_data=True)
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [span["supervised"] for span in values["spans"]] == [False, True]
    assert values["loss_mask"] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        ([], "1", "the table has 1 rows"),
        ([], "x", "must be the number of a row"),
        (["target"], "0", "`target` gives no tokens"),
    ],
)
def test_show_tokens_refuses_what_is_not_there(run: Run, names: list[str], row: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        tokens.show_tokens(run, names, row, as_data=False)


def test_show_tokens_of_a_run_whose_tokens_are_gone_has_a_hint(run: Run) -> None:
    run.stages["tokenize"].path = ""
    with pytest.raises(RunError, match="are not both in the store"):
        tokens.show_tokens(run, [], "0", as_data=False)


def test_a_row_without_tokens_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli._guarded(["show", "tokens"]) == 1
    assert "show needs the name of one run" in capsys.readouterr().err
