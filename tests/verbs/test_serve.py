"""serve: the command line that it becomes, and what it prints for another machine."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from speculators import cli
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from tests.runner.pasts import trained

A = "20260101-100000-tiny"
MODULE = ["-m", "vllm.entrypoints.openai.api_server"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that this process would have become."""
    commands: list[list[str]] = []

    def become(path: str, argv: list[str], env: dict[str, str]) -> None:
        assert path == argv[0] == sys.executable
        assert env["VLLM_NO_USAGE_STATS"] == "1"
        assert "VLLM_API_KEY" not in env
        commands.append(argv[1:])

    monkeypatch.setattr(os, "execve", become)
    return commands


def test_a_run_is_served_from_its_checkpoint_with_its_dtype_on_loopback(
    store: Store, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store)
    cli._guarded(["serve", "--", "--port", "8001"])
    (argv,) = started
    assert argv[:2] == MODULE
    options = dict(zip(argv[2::2], argv[3::2], strict=False))
    assert (Path(options["--model"]) / "config.json").is_file()
    assert options["--host"] == "127.0.0.1"
    assert options["--dtype"] == "float32"
    assert argv[-2:] == ["--port", "8001"], "what vLLM reads last counts"
    assert "--enforce-eager" in argv
    assert options["--speculative_config"] == '{"num_speculative_tokens": 3}', "evaluated, and not the checkpoint's"
    err = capsys.readouterr().err
    assert "target   org/target" in err
    assert shlex.join(argv) in err


def test_print_shows_the_command_for_another_machine_and_starts_nothing(
    store: Store, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(Path("runs"), A, store)
    assert cli._guarded(["serve", str(run / "draft"), "--print"]) == 1, "there is no such link yet"
    capsys.readouterr()
    (run / "draft").symlink_to(next((store.root / "artifacts/train").glob("*/*/data/best")))
    assert cli._guarded(["serve", f"runs/{A}/draft", "--print", "--", "--max-num-seqs", "4"]) == 0
    address = ["--host", "127.0.0.1", "--port", "8000"]
    assert shlex.split(capsys.readouterr().out) == [
        "python", *MODULE, "--model", str(Path(f"runs/{A}/draft").absolute()), *address, "--max-num-seqs", "4",
    ]  # fmt: skip
    assert started == []


def test_a_target_that_has_moved_is_one_error_with_the_command_that_helps(
    store: Store, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Path("runs"), A, store, verifier="/gone")
    assert cli._guarded(["serve", "last"]) == 1
    err = capsys.readouterr().err
    assert "error: the draft's target is not at `/gone`" in err
    assert "speculators-run publish 20260101-100000 DIRECTORY verifier=PATH" in err
    elsewhere = trained(Path("elsewhere"), A, store, verifier="/gone")
    assert cli._guarded(["serve", str(elsewhere)]) == 1
    assert f"speculators-run publish elsewhere/{A} DIRECTORY verifier=PATH" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "`serve` takes one draft"),
        (["--port", "1"], "`serve` has no flag `--port`"),
        ([], "no run in `runs` has a trained draft"),
        (["nothing"], "there is no run `nothing`"),
    ],
)
def test_what_names_no_draft_is_one_error(
    words: list[str], message: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._guarded(["serve", *words]) == 1
    err = capsys.readouterr().err
    assert f"error: {message}" in err
    assert "hint: " in err
    assert started == []


@pytest.mark.parametrize(
    "config",
    ["", "null", "[]", '{"speculators_config": null}', '{"speculators_config": {"verifier": {"name_or_path": null}}}'],
)
def test_a_directory_that_names_no_target_is_one_error(
    config: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("draft").mkdir()
    Path("draft/config.json").write_text(config)
    assert cli._guarded(["serve", "draft"]) == 1
    assert "error: the config.json in `draft` is none of a draft" in capsys.readouterr().err
    assert started == []
