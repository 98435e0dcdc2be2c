"""The command line: verbs, exit codes, and what a person reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from speculators import cli, ui
from speculators.config.schema import Config
from speculators.packages import installed_version
from speculators.runner.planning import estimate
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store
from speculators.verbs import query
from tests.conftest import EVALUATION, OF_CHECKPOINT, ROW, publish_all
from tests.runner.fake_server import distribution

DEMO = "recipe=smollm2_eagle3"


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "speculators.cli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on whether this environment has an engine."""
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def main(*words: str) -> int:
    return cli._guarded(words)


def test_help_lists_verbs_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--help") == 0
    out = capsys.readouterr().out
    assert "  plan        print what would run, and why" in out
    assert "  smollm2_eagle3  The demo: EAGLE-3" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_no_words_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "Recipes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["paln", DEMO], "there is no verb `paln`", "did you mean `plan`?"),
        ([DEMO, "train.lrr=1"], "there is no option `train.lrr`", "did you mean `train.lr`?"),
        (
            ["plan", DEMO, "target.source=/no/such/model"],
            "target.source: `/no/such/model` does not exist",
            "on the hub",
        ),
        (["plan", "recipe=nope"], "no recipe named `nope`", "smollm2_eagle3"),
    ],
)
def test_a_mistake_is_one_error_one_hint_and_exit_code_1(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*words) == 1
    said = capsys.readouterr()
    first, blank, last = said.err.strip().split("\n")
    assert first == f"error: {message}"
    assert blank == ""
    assert last.startswith("hint: ")
    assert hint in last
    assert said.out == ""


def test_upstreams_package_beside_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distribution(tmp_path, "speculators", "0.9.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert main("plan", DEMO) == 1
    assert "pip uninstall speculators" in capsys.readouterr().err


def test_an_unexpected_error_is_exit_code_2_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(query, "plan", lambda words: 1 // 0)
    assert main("plan", DEMO) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_first_plan_of_the_demo_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan", DEMO) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert rows[0][:2] == ["state", "stage"]
    assert rows[10] == ["waits", "evaluate", "upstream:", "train"]
    assert lines[12].startswith("4 to run, 6 waiting")
    assert "derived: layer_ids=[0,2,15,27] " in lines[13]
    assert lines[15].startswith("servers: regenerate (extract), evaluate (baseline, speculative); --servers")
    assert any(line.startswith("hidden states: at most 393,216 tokens, 2.1 GiB") for line in lines[16:])


def test_a_plan_for_gpus_has_their_number_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan", DEMO, "hardware=h100x8") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[1]: line for line in lines[1:11]}
    column = lines[0].index("GPUs")
    assert {name: row[column : column + 4].strip() for name, row in rows.items() if name in ("train", "vocab")} == {
        "train": "1",
        "vocab": "",
    }
    assert "machine: 8 x NVIDIA H100" in "".join(lines)


def test_plan_prints_command_lines_of_servers_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan", DEMO, "--servers") == 0
    out = capsys.readouterr().out
    assert "server for regenerate (extract):\n  " in out
    assert "eagle_aux_hidden_state_layer_ids" in out


def test_a_stage_of_a_plan_is_a_line_with_time_and_size_and_long_reasons_wrap() -> None:
    rows = [
        ("cached", "dataset", "", "", "made by 20261130-160935-smollm2_eagle3_and_more"),
        ("cached", "prompts", "", "", "made by 20261130-160935-smollm2_eagle3"),
        ("run", "regenerate", "3m22s", "1.1 GiB", "16 of 400 rows new"),
        ("run", "train", "12m40s", "", "changed: train.epochs 2 -> 7, train.lr 0.0005 -> 3.0, train.seed 0 -> 4"),
    ]
    text = ui.stage_table(("state", "stage", "time", "size", "why"), rows, right=[2, 3])
    assert text.splitlines() == [
        "state   stage         time     size  why",
        "cached  dataset                      made by 20261130-160935",
        "cached  prompts                      made by 20261130-160935-smollm2_eagle3",
        "run     regenerate   3m22s  1.1 GiB  16 of 400 rows new",
        "run     train       12m40s           changed: train.epochs 2 -> 7, train.lr",
        "                                     0.0005 -> 3.0, train.seed 0 -> 4",
    ]


def test_a_long_command_is_wrapped_so_that_a_shell_reads_it_as_one() -> None:
    words = ["speculators-run", "recipe=tiny", *(f"train.option_{i}=it's {i}" for i in range(9))]
    text = ui.labelled([("again", shlex.join(words))], 80)
    assert max(map(len, text.splitlines())) <= 80
    said = subprocess.run(["bash", "-c", f"echo {text[9:]}"], capture_output=True, text=True, check=True).stdout
    assert said.split() == " ".join(words).split()
    assert ui.labelled([("draft", "a/" * 50)], 80) == f"draft    {'a/' * 50}"


def test_a_name_of_a_run_is_its_time_where_it_does_not_fit_and_whole_in_a_path() -> None:
    name = "20261130-160935-smollm2_eagle3"
    assert ui.fit_runs(f"made by {name}", 38) == f"made by {name}"
    assert ui.fit_runs(f"made by {name}", 37) == "made by 20261130-160935"
    assert ui.fit_runs(f"runs/{name} {name}/logs", 20) == f"runs/{name} {name}/logs"


def test_a_plan_has_colours_on_a_terminal_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [("run", "train", "new"), ("waits", "evaluate", "upstream: train")]
    colored = ui.stage_table(("state", "stage", "why"), rows)
    assert "\x1b[33mrun\x1b[0m    train     new" in colored
    monkeypatch.setenv("NO_COLOR", "1")
    plain = ui.stage_table(("state", "stage", "why"), rows)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain


def test_plan_as_json_is_data_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan", DEMO, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"]["train"]["state"] == "waits"
    assert plan["derived"]["layer_ids"] == [0, 2, 15, 27]


def test_plan_of_a_sweep_has_a_line_for_each_job_and_counts_shared_stages_once(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "-m", DEMO, "train.lr=1e-4,2e-4", "prompts.seed=0,1"]
    assert main(*argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job  cached  to run  shared  options",
        "  0       0      10       0  train.lr=0.0001 prompts.seed=0",
        "  1       0       7       3  train.lr=0.0001 prompts.seed=1",
        "  2       0       2       8  train.lr=0.0002 prompts.seed=0",
        "  3       0       2       8  train.lr=0.0002 prompts.seed=1",
        "",
        "shared: stages that an earlier job of the sweep makes",
        "once: dataset.sharegpt, target, dataset.human_eval",
        "2 times: prompts, regenerate, tokenize, vocab, extract",
        "4 times: train, evaluate",
    ]
    publish_all(store, Planner(config, store))
    assert main("plan", "-m", DEMO, "train.lr=1e-4,2e-4") == 0
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines()[1:3]] == [["0", "8", "2", "0"], ["1", "8", "2", "0"]]
    assert main(*argv, "--json") == 0
    jobs = json.loads(capsys.readouterr().out)
    assert jobs[3]["overrides"] == [DEMO, "train.lr=0.0002", "prompts.seed=1"]
    assert jobs[3]["steps"]["train"]["state"] == "waits"


def test_plan_works_where_nothing_can_be_written_and_leaves_no_file(tmp_path: Path) -> None:
    place = tmp_path / "readonly"
    place.mkdir()
    place.chmod(0o500)
    done = run("plan", DEMO, f"run.store={place}/store", cwd=place)
    assert done.returncode == 0, done.stderr
    assert list(place.iterdir()) == []


def test_a_run_that_finds_everything_says_so_and_loads_nothing_heavy(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    monkeypatch.undo()
    planner = Planner(config, store)
    publish_all(store, planner)
    code = (
        "import sys; from speculators import cli; from speculators.errors import RunError\n"
        f"code = cli._guarded(['{DEMO}'])\n"
        "print('code', code, sorted({'torch', 'transformers', 'vllm', 'datasets', 'ray', 'wandb'} & set(sys.modules)))"
    )
    env = {**os.environ, "SPECULATORS_STORE": str(store.root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "code 0 []"
    assert "human_eval" in done.stdout
    assert [line.split()[0] for line in done.stderr.splitlines() if " " in line][:7] == ["cached"] * 7


def test_explain_names_the_option_that_moved_within_80_columns(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_all(store, Planner(config, store))
    assert main("explain", "train", DEMO, "train.lr=3e-4") == 0
    out = capsys.readouterr().out
    assert f"differs\n  train.lr  {config.train.lr} -> 0.0003" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert main("explain", "train", DEMO, "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "cached"
    assert main("explain", DEMO) == 1
    assert "explain needs a stage" in capsys.readouterr().err


def test_only_refuses_when_what_the_stage_needs_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(DEMO, "only=train") == 1
    err = capsys.readouterr().err
    assert "only=train: needs `prompts`, which has no artifact" in err
    assert "hint: until=train instead" in err


def test_ls_lists_what_the_store_holds(store: Store, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ls") == 0
    assert capsys.readouterr().out == ""
    publish_all(store, Planner(config, store))
    assert main("ls", "train", "vocab") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["vocab", "train"]
    assert lines[-1].startswith("2 artifacts, ")
    assert main("ls", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == len(Planner(config, store).graph)
    assert main("ls", "trian") == 1


def test_verbs_know_a_stage_by_its_name_and_by_its_kind(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_all(store, Planner(config, store))
    rows = {}
    for name in ("extract", "collect"):
        assert main("ls", name, "--json") == 0
        (rows[name],) = json.loads(capsys.readouterr().out)
        assert main("verify", name) == 0
        assert capsys.readouterr().err.split()[:2] == ["intact", "collect"]
        assert main("explain", name, DEMO) == 0
        assert capsys.readouterr().out.startswith("extract  cached  ")
    assert rows["extract"] == rows["collect"]
    assert main("ls", f"extract:{rows['extract']['key'][:6]}") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("extract (collect)  ")
    assert main("gc", "extract", "days=0", "--delete") == 0
    assert "deleted  artifact collect" in capsys.readouterr().err
    assert list(store.artifacts("collect")) == []
    assert list(store.artifacts("train")) != []


def test_verify_finds_bytes_that_changed_in_place(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = publish_all(store, Planner(config, store))
    assert main("verify") == 0
    artifact = Planner(config, store).step("vocab", digests).artifact
    assert artifact is not None
    file = artifact.data / "content"
    file.chmod(0o644)
    file.write_text("vocaB")  # as long as before: no look at sizes finds it
    capsys.readouterr()
    assert main("verify", "--json") == 1
    told = capsys.readouterr()
    assert json.loads(told.out) == {artifact.key: {"stage": "vocab", "trouble": "content does not match its sha256"}}
    assert "error: 1 artifacts are damaged" in told.err


def test_a_disk_without_room_is_refused_before_any_worker_starts(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    texts = [f"Tell me all that you know about the number {number}." for number in range(400)]
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "It is a number."}] for text in texts]
    rows.write_text(json.dumps([{"id": str(i), "conversations": both} for i, both in enumerate(turns)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "free_bytes", lambda root: 1 << 16)
    sources = [f"target.source={checkpoint}", f"data.sharegpt.source={rows}", "evaluate.datasets=[sharegpt]"]
    assert main(DEMO, *OF_CHECKPOINT, *sources) == 1
    assert "the hidden states need about" in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("work/*/*"))


def test_hydras_own_flags_work(tmp_path: Path) -> None:
    done = run(DEMO, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "num_hidden_layers: 30" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_each_value(tmp_path: Path) -> None:
    done = run("-m", DEMO, "train.epochs=0,-1", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: train.epochs=0: must be positive" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (8, "8.0s"), (59, "59s"), (192, "3m12s"), (7500, "2h05m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert ui.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes_are_binary(count: float, text: str) -> None:
    assert ui.size(count) == text


def test_the_table_of_an_evaluation_fits_80_columns() -> None:
    text = ui.evaluation(EVALUATION)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.splitlines()[2].split() == ["human_eval", "1.500", "0.300", "0.150", "0.050", "31.2", "31.2", "1.00x"]
    assert "64 of 64 outputs identical" in text


def test_plan_and_explain_tell_what_differs_outside_of_the_key(
    store: Store, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_all(store, Planner(config, store))
    for artifact in [*store.artifacts("train"), *store.artifacts("vocab")]:
        path = artifact.path / "artifact.json"
        described = json.loads(path.read_text())
        described["provenance"] |= {"python": "3.9.1", "versions": {"torch": "1.0+cu118"}}
        path.write_text(json.dumps(described))
    assert main("plan", DEMO) == 0
    out = capsys.readouterr().out
    torch = (installed_version("torch") or "").partition("+")[0]
    assert f"not in any key: torch 1.0+cu118 -> {torch}" in out
    assert out.count("(vocab, train)") == 2
    assert "\x1b" not in out
    assert main("plan", DEMO, "--json") == 0
    outside = json.loads(capsys.readouterr().out)["outside_the_key"]
    assert {change["name"] for change in outside["train"]} == {"python", "torch"}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main("explain", "train", DEMO) == 0
    assert "\x1b[2mdiffers, not in the key\n  python  3.9.1 -> " in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main("explain", "train", DEMO) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_measurements_are_grouped_by_tokens_and_have_their_requests_in_flight_where_there_are_several() -> None:
    rows = [
        ROW | {"num_speculative_tokens": tokens, "per_position": [0.5] * tokens, "concurrency": concurrency}
        for tokens in (1, 2)
        for concurrency in (1, 8)
    ]
    table = ui.evaluation({"num_speculative_tokens": 1, "datasets": {"quiz": {"measurements": rows}}})
    assert table.splitlines()[:8] == [
        "              in  acceptance                baseline  speculative",
        "dataset   flight      length  pos 1  pos 2     tok/s        tok/s  speed-up",
        "1 tokens",
        "quiz           1       1.500  0.500             31.2         31.2     1.00x",
        "quiz           8       1.500  0.500             31.2         31.2     1.00x",
        "2 tokens",
        "quiz           1       1.500  0.500  0.500      31.2         31.2     1.00x",
        "quiz           8       1.500  0.500  0.500      31.2         31.2     1.00x",
    ]
