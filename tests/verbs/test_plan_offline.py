"""`plan` where the hub does not answer: the whole plan, and exit code 0; only `run` refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators import cli
from tests.runner.machines import machine, pretend


@pytest.mark.parametrize("gpus", [0, 8])
def test_plan_needs_no_hub_and_no_gpu_and_a_run_is_refused(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pretend(monkeypatch, machine(gpus, memory_gib=24))
    assert cli._guarded(["plan", "recipe=gemma4_dflash"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for stage in ("prompts", "target", "regenerate", "tokenize", "vocab", "train", "evaluate"):
        assert f" {stage} " in out
    assert "note: target.source: revision not resolved (offline)" in out
    assert cli._guarded(["recipe=gemma4_dflash"]) == 1
    assert "error: target.source: revision not resolved (offline)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


HUB_PRESETS = sorted(path.stem for path in Path("conf/data").glob("*.yaml") if "hub:" in path.read_text())


def test_every_shipped_dataset_of_the_hub_is_planned_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert len(HUB_PRESETS) >= 10
    assert cli._guarded(["plan", "recipe=smollm2_eagle3", f"data=[{','.join(HUB_PRESETS)}]"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert [name for name in HUB_PRESETS if f"data.{name}.source: revision not resolved (offline)" not in out] == []
