"""options, recipes: what can be set, and what can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators import cli
from speculators.config.algorithms import SPECULATORS
from speculators.config.choices import DataFormat
from speculators.config.documentation import all_options
from speculators.config.fields import iter_options
from speculators.config.schema import Config


def main(*argv: str) -> int:
    return cli._guarded(argv)


def test_every_option_of_the_schema_is_there_with_its_meaning() -> None:
    names = {name.rstrip("_") for name, *_ in iter_options(Config())} - {"data", "evaluate.datasets", "run.stages"}
    names |= {f"speculator.{name}" for schema in SPECULATORS.values() for name, *_ in iter_options(schema())}
    options = all_options()
    assert names - options.keys() == set()
    assert [name for name, option in options.items() if not option.meaning] == []
    assert options["data.NAME.format"].choices["sharegpt"].startswith('`{"conversations": ')


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.lr", {"type": "float", "default": 0.001, "unit": "", "policy": "semantic"}),
        ("max_seq_len", {"type": "int", "unit": "tokens", "constraints": ["must be at least 2"]}),
        ("run.quota_gib", {"unit": "GiB", "policy": "operational", "default": 0.0}),
        ("regenerate.timeout", {"unit": "seconds"}),
        ("executor.time_limit", {"unit": "minutes"}),
        ("train.warmup_ratio", {"unit": "share, 0 to 1"}),
        ("train.max_steps", {"type": "int or null", "policy": "if_set", "unit": "steps"}),
        ("serve.api_key_env", {"type": "text", "policy": "secret"}),
        ("train.trackers", {"type": "list of one of tensorboard, wandb, trackio, mlflow", "default": []}),
        ("speculator.ttt_steps", {"algorithms": ["eagle3"]}),
        ("from", {"type": "text", "default": ""}),
    ],
)
def test_facts_of_an_option(name: str, expected: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("options", name, "--json") == 0
    (option,) = json.loads(capsys.readouterr().out)
    assert {key: option[key] for key in expected} == expected


def test_an_option_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("options", "train.lr") == 0
    assert capsys.readouterr().out.splitlines() == [
        "train.lr",
        "",
        "  Peak learning rate of all parameters; of all but Muon's matrices if `muon_lr`",
        "  is set.",
        "",
        "  type     float",
        "  default  0.001",
        "  value    must be positive",
        "  in keys  yes: another value makes another artifact",
    ]
    assert main("options", "weighting") == 0
    assert "only with  speculator=dflash" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["train"], ["speculator"], ["data"], ["serve.mooncake"]])
def test_lists_fit_80_columns(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("options", *argv) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert ("train.lr=0.001" in out) == (argv in ([], ["train"]))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.lrr", "did you mean `train.lr`"),
        ("trian", "did you mean `train`"),
        ("learning_rate", "the option is `train.lr`"),
        ("seed", "`prompts.seed` or `regenerate.seed` or `train.seed`"),
        ("zzz", "sections: recipe, max_seq_len, target"),
    ],
)
def test_an_unknown_name_gets_the_closest(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("options", name) == 1
    assert hint in capsys.readouterr().err


def test_recipes_lists_shipped_and_local_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("# @package _global_\n# Mine, at last.\ntrain: {lr: 1}\n")
    assert main("recipes") == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["mine"] == ["./recipes", "Mine, at last."]
    assert rows["smollm2_eagle3"][0] == "shipped"
    assert main("recipes", "--json") == 0
    assert {"name": "mine", "summary": "Mine, at last.", "path": str(tmp_path / "recipes/mine.yaml")} in json.loads(
        capsys.readouterr().out
    )


def test_choices_of_the_working_directory_are_listed_and_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf/target").mkdir(parents=True)
    (tmp_path / "conf/target/mine.yaml").write_text("# My model.\nsource: hub:me/mine@1\n")
    monkeypatch.chdir(tmp_path)
    assert main("options", "target") == 0
    assert "mine" in capsys.readouterr().out.splitlines()[1]
    assert main("completion", "candidates", "target=mi") == 0
    assert capsys.readouterr().out == "target=mine\tMy model.\n"


def test_a_section_lists_the_choices_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("options", "data") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("      ") and line[6] != " "]
    assert set(DataFormat.__members__) <= set(names)
    assert any(line.startswith('      messages  `{"messages": [') for line in lines)
    assert max(map(len, lines)) <= 80


def test_recipes_wrap_their_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(f"# {'A long comment. ' * 9}\n")
    monkeypatch.chdir(tmp_path)
    for argv in (["recipes"], ["--help"]):
        assert main(*argv) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
