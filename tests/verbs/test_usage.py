"""The table of verbs: help, flags, and what a mistake on the command line is answered with."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from speculators import cli
from speculators.config import foreign_names
from speculators.config.documentation import all_options
from speculators.packages import installed_version
from speculators.verbs import usage
from speculators.verbs.usage import VERBS

DEMO = "recipe=smollm2_eagle3"
OF_OTHER_TOOLS = [
    "learning_rate",
    "max_grad_norm",
    "bf16",
    "per_device_train_batch_size",
    "num_train_epochs",
    "gradient_checkpointing",
    "lr_scheduler_type",
    "draft_vocab_size",
    "total_seq_len",
    "ttt_steps",
]


def main(*argv: str) -> int:
    return cli._guarded(argv)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_function_and_a_help_of_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = VERBS[verb].function.partition(".")
    assert callable(getattr(importlib.import_module(f"speculators.verbs.{module}"), function))
    assert main(verb, "--help") == 0
    text = capsys.readouterr().out
    assert main("help", verb) == 0
    assert capsys.readouterr().out == text
    assert text.startswith(f"usage: speculators-run {verb}")
    assert all(f"\n  {row}" in text for row in VERBS[verb].takes)
    assert "\n  speculators-run " in text.partition("\nexample")[2] or "speculators-run" in VERBS[verb].examples[0]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_the_usage_line_names_only_what_the_table_explains(verb: str) -> None:
    explained = " ".join(VERBS[verb].takes)
    words = VERBS[verb].usage.replace("[", " ").replace("]", " ").replace("|", " ").replace("...", " ").split()
    assert [
        w for w in words if w not in explained and w not in ("FLAG", ":KEY") and w.strip("=") not in explained
    ] == []


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["paln", DEMO], "there is no verb `paln`", "did you mean `plan`?"),
        (["smollm2_eagle3"], "there is no verb `smollm2_eagle3`", "speculators-run recipe=smollm2_eagle3"),
        (["smollm2_eagl3"], "there is no verb `smollm2_eagl3`", "did you mean `recipe=smollm2_eagle3`?"),
        (["help", "paln"], "there is no verb `paln`", "did you mean `plan`?"),
        ([DEMO, "plan"], "`run` takes no argument `plan`", "the verb comes first: speculators-run plan ..."),
        (["mine.yaml"], "there is no verb `mine.yaml`", "recipe=mine.yaml"),
        (["plan", "smollm2_eagle3"], "`plan` takes no argument `smollm2_eagle3`", "recipe=smollm2_eagle3"),
        (["plan", DEMO, "--jsno"], "`plan` has no flag `--jsno`", "did you mean `--json`?"),
        (["plan", DEMO, "--cfg", "job"], "`plan` has no flag `--cfg`", "there is: --json, --multirun, --servers"),
        ([DEMO, "--cgf", "job"], "`run` has no flag `--cgf`", "did you mean `--cfg`?"),
        ([DEMO, "--cfg", "jbo"], "`--cfg jbo`: there is no such choice", "did you mean `job`?"),
        ([DEMO, "--cfg"], "`--cfg`: the flag takes a value", "write `--cfg job|hydra|all`"),
        ([DEMO, "--resolve"], "--resolve and --package need --cfg", "add --cfg job"),
        ([DEMO, "--cfg", "job", "--info"], "--cfg and --info exclude each other", "leave all but one out: --cfg"),
        ([DEMO, "--train.lr", "3e-4"], "`run` has no flag `--train.lr`", "options have no dashes: train.lr=3e-4"),
        ([DEMO, "--lr=3e-4"], "`run` has no flag `--lr`", "options have no dashes: train.lr=3e-4"),
        (["plan", DEMO, "--learning-rate", "1"], "`plan` has no flag `--learning-rate`", "the option is `train.lr`"),
        ([DEMO, "--bf16"], "`run` has no flag `--bf16`", "the option is `train.precision` (bfloat16, float16 or"),
        (["plan", DEMO, "--", "--help"], "`plan` has no flag `--`", "did you mean `--json`?"),
        (["verify", "--quarantin"], "`verify` has no flag `--quarantin`", "did you mean `--quarantine`?"),
        (["gc", "--delte"], "`gc` has no flag `--delte`", "`speculators-run gc --help` lists its arguments"),
        (["gc", "dyas=3"], "`gc` has no option `dyas`", "did you mean `days`?"),
        (["gc", "days=soon"], "days=soon is not a number of days", "for example days=30"),
        (["ls", "trian"], "there is no stage `trian`", "did you mean `train`?"),
        (["runs", "last"], "`runs` takes no argument `last`", "`speculators-run runs --help` lists its arguments"),
        (["explain", "train", "vocab", DEMO], "explain needs a stage", "speculators-run explain train recipe=NAME"),
        (["export", DEMO], "export needs artifacts and, last, a file", "speculators-run export train:0123abcd FILE"),
        (["import"], "import needs one file", "speculators-run import FILE"),
        (["doctor", "run.stroe=x"], "`doctor` has no option `run.stroe`", "did you mean `run.store`?"),
        (["recipes", "mine"], "`recipes` takes no argument `mine`", "`speculators-run recipes --help`"),
        (["-m", DEMO], "-m: no option has several values", "as in train.lr=1e-4,3e-4; without -m this is one run"),
        (["plan", "-m", DEMO, "train.lr=1e-4"], "-m: no option has several values", "without -m this is one run"),
        (["plan", DEMO, "train.lr=1e-4,2e-4"], "`train.lr` has several values", "`plan -m` plans them"),
        (["plan", DEMO, "seed=1"], "there is no option `seed`", "did you mean `prompts.seed` or `regenerate.seed` or"),
        (["completion"], "completion needs the name of a shell: bash, zsh or fish", "speculators-run completion bash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_error_and_one_hint(
    argv: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*argv) == 1
    captured = capsys.readouterr()
    first, blank, last = captured.err.strip().split("\n")
    assert (first, blank, captured.out) == (f"error: {error}", "", "")
    assert last.startswith("hint: ")
    assert hint in last


def test_an_error_is_wrapped_on_a_terminal_and_not_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("plan", DEMO, "train.lr=1e-4,2e-4")
    monkeypatch.setenv("COLUMNS", "60")
    assert main(*argv) == 1
    piped = capsys.readouterr().err.split("\n\n")
    assert [text.count("\n") for text in piped] == [0, 1]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(*argv) == 1
    shown = capsys.readouterr().err
    assert max(map(len, shown.splitlines())) <= 60
    assert [text.replace("\n", " ") for text in shown.split("\n\n")] == [text.replace("\n", " ") for text in piped]


@pytest.mark.parametrize("verb", VERBS)
def test_no_hint_suggests_a_destructive_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--delet", "--deleet", "--remove", "--force", "-d", "--hlep"):
        assert main(verb, flag) == 1
        assert not {"--delete"} & set(capsys.readouterr().err.split("hint:")[1].replace("`", " ").split())
    assert main(verb, "delete=1") == 1
    assert "--delete" not in capsys.readouterr().err


@pytest.mark.parametrize("name", OF_OTHER_TOOLS)
def test_names_of_other_tools_lead_to_an_option_that_exists(name: str) -> None:
    for written in (name, f"training.{name}", name.replace("_", "-")):
        assert any(f"`{option}`" in str(foreign_names.hint(written)) for option in all_options())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--version") == 0
    assert capsys.readouterr().out == f"{installed_version('speculators-run')}\n"


def test_flags_of_hydra_print_and_run_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from speculators import cli\n"
        "for argv in [sys.argv[1], '--info', 'defaults'], ['--hydra-help'], [sys.argv[1], '-c', 'job']:\n"
        "    try: assert cli._guarded(argv) == 0\n"
        "    except SystemExit as end: assert end.code == 0\n"
    )
    command = [sys.executable, "-c", code, DEMO]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Defaults List" in done.stdout
    assert "| speculator/eagle3 " in done.stdout
    assert "Hydra (" in done.stdout
    assert "max_steps: 2000" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_long_flags_of_short_ones_are_in_the_table() -> None:
    assert {usage.long_flag(flag) for flag in ("-m", "-c", "-i", "-p")} <= VERBS["run"].flags.keys()
