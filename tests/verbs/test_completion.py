"""Tab completion: candidates, and the scripts in the shells themselves."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speculators import cli
from speculators.verbs.completion import candidates
from tests.runner.pasts import past

DEMO = "recipe=smollm2_eagle3"


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        ([""], {"plan", "recipe=", "train.", "max_seq_len=", "until="}, {"train.lr=", "--json"}),
        (["pl"], {"plan"}, {"explain"}),
        (["help", "pl"], {"plan"}, {"explain"}),
        ([DEMO, "train.lo"], {"train.loss_spike_factor=", "train.log_every_steps="}, {"train.lr="}),
        (["serve.m"], {"serve.mooncake.", "serve.max_num_seqs="}, {"serve.mooncake.master="}),
        (["serve.mooncake.m"], {"serve.mooncake.master="}, set()),
        (["recipe=smo"], {"recipe=smollm2_eagle3", "recipe=smollm2_dflash"}, {"recipe=gemma4_dflash"}),
        (["pipeline="], {"pipeline=fused", "pipeline=offline"}, set()),
        (["train.optimizer="], {"train.optimizer=adamw", "train.optimizer=muon"}, set()),
        (["train.train_on_prompts=t"], {"train.train_on_prompts=true"}, {"train.train_on_prompts=false"}),
        (["train.lr="], {"train.lr=0.001"}, set()),
        (["train.trackers=["], {"train.trackers=[wandb]"}, set()),
        (["until=r"], {"until=regenerate"}, {"until=train"}),
        (["plan", DEMO, "--"], {"--servers", "--json", "--help"}, {"--cfg"}),
        ([DEMO, "--cfg", ""], {"job", "hydra"}, {"plan", "train."}),
        ([DEMO, "--cfg", "job", ""], {"train."}, {"job"}),
        (["explain", "tr"], {"train", "train."}, {"vocab"}),
        (["explain", "train", "tr"], {"train."}, set()),
        (["ls", ""], {"train", "run.store="}, {"train."}),
        (["gc", "--d"], {"--delete"}, set()),
        (["options", "train.l"], {"train.lr"}, {"train.lr="}),
        (["options", "tra"], {"train"}, set()),
        (["completion", ""], {"bash", "zsh", "fish"}, set()),
        (["show", ""], {"last", "20260101-100000-tiny"}, {"train"}),
        (["show", "last", "tr"], {"train"}, {"last"}),
        (["run.store=./ru"], {"run.store=./runs/"}, set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_candidates(
    words: list[str], some: set[str], none: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    past(Path("runs"), "20260101-100000-tiny")
    got = [name for name, _ in candidates(words)]
    assert some <= set(got)
    assert not none & set(got)
    assert len(got) == len(set(got))
    assert all(name.startswith(words[-1]) for name in got)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A directory with the program as a shell finds it."""
    path = tmp_path / "bin/speculators-run"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m speculators.cli "$@"\n')
    path.chmod(0o755)
    return path


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli._guarded(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_completes_words_that_readline_splits(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COMP_WORDS as bash fills it: `=` is a word of its own."""
    ask = """
    ask() { COMP_LINE=$1; COMP_POINT=${#1}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            _speculators_run; printf '%s|' "${COMPREPLY[@]}"; echo; }
    ask "$P pl" "$P" pl
    ask "$P recipe=smollm2_e" "$P" recipe = smollm2_e
    ask "$P recipe=smollm2_eagle3 train.optimizer=" "$P" recipe = smollm2_eagle3 train.optimizer =
    complete -p speculators-run
    """
    command = ["bash", "--norc", "-c", f"P={shlex.quote(str(program))}\n{script('bash', capsys)}\n{ask}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=program.parent)
    assert done.stdout.splitlines() == [
        "plan|",
        "smollm2_eagle3|",
        "adamw|muon|",
        "complete -o default -F _speculators_run speculators-run",
    ]
    assert done.stderr == ""


def test_completion_and_help_load_what_they_need_and_no_more(tmp_path: Path) -> None:
    code = (
        "import sys; from speculators import cli\n"
        "assert cli._guarded(['completion', 'candidates', 'recipe=x', 'train.']) == 0\n"
        "assert cli._guarded(['plan', '--help']) == 0\n"
        "print(sorted({'hydra', 'omegaconf', 'yaml', 'rich', 'torch', 'speculators.runner.planning'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_parse(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert "completion candidates" in text
    if path := shutil.which(shell):
        subprocess.run([path, "-n", "/dev/stdin"], input=text, text=True, check=True)


def test_fish_completes(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (fish := shutil.which("fish")):
        pytest.skip("fish is not installed")
    ask = f"{script('fish', capsys)}\nset PATH {program.parent} $PATH\ncomplete -C 'speculators-run recipe=smollm2_e'"
    done = subprocess.run([fish, "-N", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split("\t")[0] == "recipe=smollm2_eagle3"
