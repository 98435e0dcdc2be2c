"""runs, show, compare: what a person and a program read of earlier runs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from speculators import cli
from speculators.config.schema import Config
from speculators.job import write_json
from speculators.runner.execution.events import Events
from speculators.runner.execution.execute import Execution
from speculators.runner.execution.signals import Interrupted
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import guard, vllm
from speculators.runner.store.artifacts import Store
from speculators.verbs import run
from speculators.verbs.history import comparison
from tests.conftest import publish_all
from tests.runner.pasts import KEY, past

A, B = "20260101-100000-tiny", "20260101-110000-tiny"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def main(*words: str) -> int:
    return cli._guarded(words)


def test_runs_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("runs") == 0
    assert capsys.readouterr().out == ""
    past(Path("runs"), A)
    past(Path("runs"), B, status="failed")
    assert main("runs") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["run", "status", "time", "ran", "length", "speed-up"]
    assert rows[1] == [A, "done", "1m05s", "2", "2.50", "1.25"]
    assert rows[2] == [B, "failed", "1m05s", "1", "-", "-"]
    assert max(map(len, out.splitlines())) <= 80
    assert main("runs", "--json") == 0
    assert [run["status"] for run in json.loads(capsys.readouterr().out)] == ["done", "failed"]


def test_show_tells_each_stage_its_log_and_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    past(Path("runs"), A, status="failed")
    assert main("show", "last") == 0
    out = capsys.readouterr().out
    assert "done    train     1m01s  abababab  changed: train.lr 1 -> 2  (attempt 2)" in out
    assert "evaluate failed: evaluate was killed by SIGKILL" in out
    assert "  evaluate  logs/evaluate.log" in out
    assert "arguments: recipe=tiny train.lr=1e-3" in out
    assert "train.validation.loss" in out
    assert main("show", A[:12], "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stages"]["evaluate"]["message"].startswith("evaluate was killed")
    assert told["config"]["recipe"] == "tiny"


def test_compare_sets_metrics_against_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    past(Path("runs"), A, config={"train": {"lr": 1e-3, "seed": 1}})
    past(Path("runs"), B, config={"train": {"lr": 3e-3, "seed": 1}}, speed_up=1.75)
    assert main("compare", A, B) == 0
    out = capsys.readouterr().out
    assert "seed" not in out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert table["train.lr"] == ["0.001", "0.003"]
    assert table["evaluate.speed_up.human_eval"] == ["1.5", "1.75"]
    assert max(map(len, out.splitlines())) <= 80
    assert main("compare", "runs", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["options"]) for row in rows] == [(A, {"train.lr": 1e-3}), (B, {"train.lr": 3e-3})]


def test_runs_of_one_recipe_are_rows_named_by_their_time_where_that_fits() -> None:
    cells = {"train.lr": ["1e-4", "3e-4"], "evaluate.speed_up.sharegpt": ["1.2", "1.3"]}
    assert comparison([A, B], ["done", "done"], cells, 80).splitlines() == [
        "run              train.  evaluate.",
        "                     lr  speed_up.",
        "                          sharegpt",
        "20260101-100000    1e-4        1.2",
        "20260101-110000    3e-4        1.3",
    ]


def test_a_comparison_never_gets_wider_than_it_may() -> None:
    names = [f"20260101-1000{i:02d}-tiny" for i in range(16)]
    cells = {"metric_with_a_long_name": ["0.123456"] * 16, "train.lr": [f"{i}e-4" for i in range(16)]}
    text = comparison(names, ["done"] * 16, cells, 46)
    assert max(map(len, text.splitlines())) <= 46
    assert text.count("train.lr") == 8  # two runs at a time
    assert "15e-4" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "show needs the name of one run"),
        (["compare", A], f"compare needs two runs or more, and `{A}` is one\n\nhint: name another one too"),
        (["compare", "runs"], "compare needs two runs or more, and `runs` is one"),
        (["show", "runs"], "`runs` holds no runs\n\nhint: runs are below the directory in which"),
        (["runs", "last"], "`runs` takes no argument `last`"),
        (["show", "last", "--verbose"], "`show` has no flag `--verbose`"),
        (["show", "last"], "there is no run in `runs`"),
    ],
)
def test_a_word_too_many_or_too_few_is_one_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "compare" in words:
        past(Path("runs"), A)
    assert main(*words) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_show_knows_a_stage_by_name_and_kind_and_tells_what_it_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    path = past(Path("runs"), A)
    record = {"rows": 7, "notes": ["the file is cut"], "dropped": {"too long": 2, "empty": 0},
              "datasets": {"chat": {"dropped": {"not ASCII": 3}}}, "dropped rows: no answer": 4}  # fmt: skip
    data = Path("store/artifacts/collect/ab/abcd/data").resolve()
    data.mkdir(parents=True)
    write_json(data.parent / "artifact.json", {"record": record})
    report = json.loads((path / "run.json").read_text())
    report["steps"]["extract"] = {"stage": "collect", "state": "cached", "key": KEY, "path": str(data)}
    write_json(path / "run.json", report)
    assert main("show", A, "extract") == 0
    by_name = capsys.readouterr().out
    assert main("show", A, "collect") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == by_name.splitlines()
    assert lines[0] == "extract (collect)  cached  abababab"
    assert f"  artifact  {data}" in lines
    dropped = lines.index("dropped")
    assert lines[dropped + 1 : dropped + 4] == ["  4  rows: no answer", "  3  chat: not ASCII", "  2  too long"]
    assert lines[lines.index("notes") + 1] == "  the file is cut"
    assert [line.split() for line in lines[lines.index("record") + 1 :]] == [["rows", "7"]]
    assert main("show", A) == 0
    out = capsys.readouterr().out
    assert "  3  extract  chat: not ASCII" in out
    assert f"artifacts\n  extract  {data}" in out
    assert main("show", A, "train", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "train"
    assert main("show", A, "trian") == 1
    assert "hint: did you mean `train`?" in capsys.readouterr().err


def test_a_run_that_finds_everything_leaves_no_entry(
    store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    publish_all(store, Planner(config, store))
    assert main("recipe=smollm2_eagle3") == 0
    captured = capsys.readouterr().err
    assert "all stages were cached, nothing ran" in captured
    assert f"artifacts: {store.root}" in captured
    assert list(Path("runs").iterdir()) == []


def test_what_a_run_writes_down_is_what_is_read(
    store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    publish_all(store, Planner(config, store))
    finish = Execution.run

    def stopped(self: Execution) -> None:
        finish(self)
        raise Interrupted(2)

    monkeypatch.setattr(Execution, "run", stopped)
    assert main("recipe=smollm2_eagle3") == 130
    events = next(Path("runs").glob("*/events.jsonl")).read_text().splitlines()
    process = json.loads(events[0])["process"]
    assert process == {"pid": os.getpid(), "start": guard.start_time(os.getpid()), "machine": guard.machine()}
    capsys.readouterr()
    assert main("show", "last", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "interrupted"
    assert {stage["state"] for stage in shown["stages"].values()} == {"cached"}
    assert main("show", "last") == 0
    assert "  interrupted  " in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("full", ["config.json", "events.jsonl", "run.json", "the run directory"])
def test_a_full_disk_of_the_run_directory_is_an_error_as_that_of_the_store(
    full: str, store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")
    publish_all(store, Planner(config, store))

    def write(path: Path, value: object) -> None:
        if path.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    def mkdir(path: Path, **options: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run, "write_json", write)
    if full == "events.jsonl":
        monkeypatch.setattr(run, "Events", lambda path, listeners: Events(Path("/dev/full"), listeners))
    if full == "the run directory":
        monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main("recipe=smollm2_eagle3") == 1
    first, _, hint = capsys.readouterr().err.strip().splitlines()[-3:]
    assert first.startswith(f"error: no space is left for {'/dev/full' if full == 'events.jsonl' else Path.cwd()}")
    assert hint.startswith("hint: free space")
