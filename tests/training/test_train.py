"""The stage: what it writes, what it refuses, and that a killed run ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run_train import make_job, write_world
from safetensors.torch import load_file, save_file
from trainings import losses, metrics, stop_at

from speculators.config.algorithms import Init
from speculators.config.choices import Device, Dtype, LrSchedule, Optimizer
from speculators.data.token_table import TokenTable, prediction_mask
from speculators.drafts.dflash import DFlashDraft
from speculators.drafts.eagle3 import Eagle3Draft
from speculators.errors import ContractError, StageError
from speculators.features.contract import ANSWERS
from speculators.features.shards import ShardReader, ShardWriter
from speculators.ops import cpu
from speculators.runner.history import METRICS
from speculators.stages import train
from speculators.training import checkpoint

ALGORITHMS = pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])


def start(world: Path, work: Path, seconds: float, algorithm: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parent.parent / "drafts"), os.environ.get("PYTHONPATH", ""), *sys.path])
    command = [sys.executable, str(Path(__file__).parent / "run_train.py"), str(world), str(work), str(seconds)]
    command += [algorithm]
    work.mkdir(exist_ok=True)
    with (work / "log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=log)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@ALGORITHMS
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(world: Path, tmp_path: Path, algorithm: str) -> None:
    straight = start(world, tmp_path / "straight", 1e9, algorithm)
    assert straight.wait(200) == 0, (tmp_path / "straight" / "log").read_text()
    attempt = start(world, tmp_path / "killed", 0.0, algorithm)
    while not any((tmp_path / "killed" / "scratch").glob("step-*/sealed.json")):
        assert attempt.poll() is None
        time.sleep(0.005)
    os.kill(attempt.pid, signal.SIGKILL)
    assert attempt.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "data" / "summary.json").exists()
    last = start(world, tmp_path / "killed", 0.0, algorithm)
    assert last.wait(200) == 0, (tmp_path / "killed" / "log").read_text()
    found, expected = files(tmp_path / "killed" / "data"), files(tmp_path / "straight" / "data")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@ALGORITHMS
def test_stopping_anywhere_and_going_on_gives_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    train.main(make_job(world, tmp_path / "straight", algorithm=algorithm))
    expected = files(tmp_path / "straight" / "data")
    for stop in (1, 6, 13):
        work = tmp_path / f"stopped-{stop}"
        stop_at(monkeypatch, stop, make_job(world, work, algorithm=algorithm, checkpoint_seconds=0.0))
        train.main(make_job(world, work, algorithm=algorithm, checkpoint_seconds=0.0))
        assert files(work / "data") == expected


@ALGORITHMS
@pytest.mark.parametrize("options", [{}, {"optimizer": Optimizer.adamw}], ids=["muon", "adamw"])
def test_a_step_in_several_packs_is_the_step_in_one(
    world: Path, tmp_path: Path, algorithm: str, options: dict[str, object]
) -> None:
    one, several = (
        make_job(
            world,
            tmp_path / str(packs),
            algorithm=algorithm,
            gradient_accumulation_steps=packs,
            batch_tokens=96,
            log_every_steps=1,
            **options,
        )
        for packs in (1, 3)
    )
    train.main(one)
    train.main(several)
    assert losses(one) == pytest.approx(losses(several), abs=1e-5)
    assert [line.get("tokens") for line in metrics(one)] == [line.get("tokens") for line in metrics(several)]


@ALGORITHMS
def test_activations_that_are_computed_again_give_the_same_bytes(world: Path, tmp_path: Path, algorithm: str) -> None:
    for name, again in (("kept", False), ("again", True)):
        train.main(make_job(world, tmp_path / name, algorithm=algorithm, epochs=1, activation_checkpointing=again))
    assert files(tmp_path / "kept" / "data") == files(tmp_path / "again" / "data")


@ALGORITHMS
def test_without_loops_in_c_the_same_is_learnt_and_that_is_said(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    jobs = [make_job(world, tmp_path / name, algorithm=algorithm, log_every_steps=1) for name in ("with", "without")]
    train.main(jobs[0])
    monkeypatch.setattr(cpu, "kernels", lambda *_: None)
    monkeypatch.setattr(cpu, "missing", lambda: "there is no compiler")
    train.main(jobs[1])
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), rel=1e-4)
    said = [[note for note in job.record.get("notes", []) if "C++" in note] for job in jobs]
    assert said == [[], ["trained without the C++ kernels, which takes longer: there is no compiler"]]


def test_a_run_of_so_many_steps_ends_there_and_its_schedule_too(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, max_steps=10, log_every_steps=1, schedule=LrSchedule.linear, warmup_ratio=0.0)
    train.main(job)
    steps = [line for line in metrics(job) if "lr" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["lr"] for line in steps] == pytest.approx([1e-3 * left / 9 for left in (9, *range(9, 0, -1))])
    assert [line["step"] for line in metrics(job) if "validation" in line][-1] == 10


def test_training_ends_when_validations_gain_nothing(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, epochs=30, early_stopping_patience=2, lr=0.0)
    train.main(job)
    assert [line["epoch"] for line in metrics(job) if "validation" in line] == [1, 2, 3]
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["steps"] == 3 * summary["best_step"]
    files_then = files(job.output)
    train.main(job)  # as after a kill between the last validation and the artifact
    assert files(job.output) == files_then


def test_every_so_many_epochs_a_checkpoint_is_kept(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, epochs=5, save_every_epochs=2)
    train.main(job)
    assert sorted(p.name for p in (job.output / "epochs").iterdir()) == ["2", "4"]
    kept = [Eagle3Draft.from_checkpoint(job.output / name).fc.weight for name in ("epochs/2", "epochs/4", "last")]
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_the_averaged_weights_are_what_is_validated_and_written(world: Path, tmp_path: Path) -> None:
    plain, averaged = make_job(world, tmp_path / "plain"), make_job(world, tmp_path / "averaged", ema=0.9)
    for job in (plain, averaged):
        train.main(job)
    assert [line for line in metrics(plain) if "lr" in line] == [line for line in metrics(averaged) if "lr" in line]
    validated = [[line for line in metrics(job) if "validation" in line] for job in (plain, averaged)]
    assert validated[0] != validated[1]
    last = [Eagle3Draft.from_checkpoint(job.output / "last").fc.weight for job in (plain, averaged)]
    assert 0.0 < (last[0] - last[1]).abs().max() < 0.1


def test_a_run_with_an_average_and_several_packs_goes_on_in_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "ema": 0.9,
        "gradient_accumulation_steps": 2,
        "save_every_epochs": 1,
        "checkpoint_seconds": 0.0,
    }
    train.main(make_job(world, tmp_path / "straight", **options))
    stop_at(monkeypatch, 9, make_job(world, tmp_path / "stopped", **options))
    train.main(make_job(world, tmp_path / "stopped", **options))
    assert files(tmp_path / "stopped" / "data") == files(tmp_path / "straight" / "data")


def test_only_operations_with_the_same_bits_every_time_are_let_through_and_a_gpu_can_multiply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with train.deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        # without it torch refuses every product on a GPU
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@ALGORITHMS
def test_on_a_gpu_too_a_run_that_was_stopped_ends_in_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "device": Device.cuda, "precision": Dtype.bfloat16}
    train.main(make_job(world, tmp_path / "straight", **options))
    stop_at(monkeypatch, 9, make_job(world, tmp_path / "stopped", checkpoint_seconds=0.0, **options))
    train.main(make_job(world, tmp_path / "stopped", **options))
    assert files(tmp_path / "stopped" / "data") == files(tmp_path / "straight" / "data")


def test_training_learns_and_says_what_it_did(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, epochs=12)
    train.main(job)
    lines = metrics(job)
    steps = [line for line in lines if "lr" in line]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert len([line for line in lines if "validation" in line]) == 12
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["rows"] + summary["validation_rows"] == 24
    assert summary["validation_rows"] > 0
    assert summary["steps"] == steps[-1]["step"]
    assert summary["validation"]["acceptance_length"] == max(
        line["validation"]["acceptance_length"] for line in lines if "validation" in line
    )
    assert job.record["tokens_per_second"] > 0
    assert all(name.removeprefix("validation.") in job.record["validation"] for name in METRICS["train"])
    config = json.loads((job.output / "best/config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert load_file(job.output / "best/model.safetensors")["fc.weight"].dtype is torch.bfloat16, "as the target's"
    card = (job.output / "best/README.md").read_text()
    assert "vllm serve DIRECTORY" in card
    assert f"{summary['validation']['acceptance_length']:.3f}" in card
    best, last = (Eagle3Draft.from_checkpoint(job.output / name) for name in ("best", "last"))
    assert best.fc.weight.isfinite().all()
    assert last.fc.weight.isfinite().all()
    assert torch.equal(
        best.embed_tokens.weight, load_file(world / "target/model.safetensors")["model.embed_tokens.weight"]
    )


def test_a_block_draft_learns_and_is_walked_as_a_server_would(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, algorithm="dflash", epochs=12, lr=5e-3)
    job.config.speculator.init = Init.random  # from noise, there is more to learn
    train.main(job)
    lines = metrics(job)
    steps = [line for line in lines if "lr" in line]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    validated = [line["validation"] for line in lines if "validation" in line]
    assert len(validated) == 12
    assert set(validated[0]) >= {
        "acceptance_length",
        "acceptance_pos_1",
        "acceptance_pos_2",
        "acceptance_pos_3",
        "full_acc_0",
        "loss_2",
    }
    parts, _ = tiny.make_parts(world / "target")
    best = DFlashDraft.from_checkpoint(job.output / "best", parts.embeddings)
    assert all(p.isfinite().all() for p in best.parameters())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", "other", "target is"),
        ("tokens", "other", "tokens is"),
        ("layer_ids", [1, 2, 4, 6], "layer_ids is"),
    ],
)
def test_features_of_something_else_are_refused_by_name(
    world: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    job = make_job(world, tmp_path)
    if field == "layer_ids":
        job.derived["capture_layer_ids"] = value
    else:
        job.digests[field] = str(value)
    with pytest.raises(ContractError, match=message):
        train.main(job)


@ALGORITHMS
def test_a_last_layer_that_is_kept_where_answers_are_predicted_trains_the_same_draft_and_none_on_prompts(
    world: Path, tmp_path: Path, algorithm: str
) -> None:
    for name in ("tokens", "vocab", "target"):
        (tmp_path / name).symlink_to(world / name)
    table, whole = TokenTable(world / "tokens"), ShardReader(world / "features")
    writer = ShardWriter(tmp_path / "features", {**whole.contract, "last_state": ANSWERS}, shard_tokens=200)
    for row in whole.rows:
        last = torch.from_numpy(prediction_mask(table.loss_mask(row)))
        writer.add(row, whole.token_ids(row), whole.hidden_states(row), last)
    writer.close()
    trained = []
    for place in (world, tmp_path):
        job = make_job(place, tmp_path / f"work-{place.name}", algorithm=algorithm, epochs=1)
        train.main(job)
        trained.append(files(job.output))
    assert trained[0] == trained[1]
    with pytest.raises(ContractError, match='last_state is "answers", expected "everywhere"'):
        train.main(make_job(tmp_path, tmp_path / "prompts", algorithm=algorithm, train_on_prompts=True))
    train.main(make_job(world, tmp_path / "whole", algorithm=algorithm, train_on_prompts=True, epochs=1))


def test_states_that_do_not_give_what_the_server_picks_are_not_trained_on(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    job = make_job(world, tmp_path / "work")
    (world / "features" / "picks.json").write_text(json.dumps([[row, 3, row, None] for row in range(8)]))
    with pytest.raises(ContractError, match=r"reproduce \d of 8 greedy tokens of the server"):
        train.main(job)
    assert list(job.output.iterdir()) == []


def test_states_without_picks_are_trained_on_and_that_is_said(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path, epochs=1)
    train.main(job)
    assert job.record["fidelity"] == {"picks": 0, "states_off": None}
    assert "came without picks.json" in job.record["notes"][0]


def test_a_vocabulary_of_another_target_is_refused(world: Path, tmp_path: Path) -> None:
    job = make_job(world, tmp_path)
    job.inputs["vocab"] = tmp_path
    save_file({"d2t": torch.zeros(3, dtype=torch.int64), "t2d": torch.ones(7).bool()}, tmp_path / "vocab.safetensors")
    with pytest.raises(ContractError, match="has 3 of 7 tokens"):
        train.main(job)


def test_a_loss_that_is_no_number_stops_with_its_rows(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    shard = world / "features" / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-400:] = b"\xff" * 400  # bfloat16 NaN in the states of the shard's last row
    shard.write_bytes(bytes(raw))
    with pytest.raises(StageError, match=r"loss nan.* on rows \d+ \(conversation"):
        train.main(make_job(world, tmp_path / "work", validation_ratio=0.0))


def test_a_loss_that_explodes_stops_with_its_rows_and_a_resumed_run_at_the_same_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 9, "lr": 100.0, "weight_decay": 0.0, "optimizer": Optimizer.adamw}
    said = (
        r"^step 31: median loss .* per prediction, 12\.\d+ at its lowest; it rose in step 1, on rows \d+ \(conversation"
    )
    with pytest.raises(StageError, match=said) as straight:
        train.main(make_job(world, tmp_path / "straight", **options))
    assert "lower train.lr" in straight.value.hint
    stop_at(monkeypatch, 20, make_job(world, tmp_path / "stopped", checkpoint_seconds=0.0, **options))
    with pytest.raises(StageError) as resumed:
        train.main(make_job(world, tmp_path / "stopped", checkpoint_seconds=0.0, **options))
    assert resumed.value.message == straight.value.message


def test_a_state_without_its_seal_is_not_gone_on_from(tmp_path: Path) -> None:
    checkpoint.seal(tmp_path, 3, {"a": torch.ones(2)}, {"step": 3})
    whole = {p.name: p.read_bytes() for p in (tmp_path / "step-00000003").iterdir()}
    torn = tmp_path / "step-00000007"
    torn.mkdir()
    for name, data in whole.items():
        (torn / name).write_bytes(data if name != "state.safetensors" else data[:-1])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert checkpoint.read_checkpoint(found)[1] == {"step": 3}
    assert not torn.exists()
