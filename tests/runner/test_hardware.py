"""The machine is what nvidia-smi and CUDA_VISIBLE_DEVICES say, or what the recipe describes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.execution import Hardware
from speculators.runner import hardware
from speculators.runner.hardware import GIB, Gpu, visible_gpus
from tests.runner.machines import machine, pretend

LISTING = """0, GPU-11aa, 81559, NVIDIA H100 80GB HBM3
1, GPU-22bb, 81559, NVIDIA H100 80GB HBM3
2, GPU-22cc, [N/A], NVIDIA GB10
"""
CHOICES = {"h100x8": (8, 80), "h200x8": (8, 140), "b200x8": (8, 179), "a100x8": (8, 80), "l40s": (1, 45)}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that prints what the file `listing` beside it has."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexec cat {tmp_path}/listing\n")
    program.chmod(0o755)
    (tmp_path / "listing").write_text(LISTING)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_gpus_are_those_that_nvidia_smi_lists(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hardware.find_machine()
    assert [(gpu.id, gpu.name, gpu.memory) for gpu in found.gpus] == [
        ("0", "NVIDIA H100 80GB HBM3", 81559 * 2**20), ("1", "NVIDIA H100 80GB HBM3", 81559 * 2**20),
        ("2", "NVIDIA GB10", 0),
    ]  # fmt: skip
    assert found.gpu_memory == 0, "that of one is unknown"
    assert found.cores == len(hardware.usable_cores())
    assert found.memory > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-11,1")
    assert [gpu.id for gpu in hardware.find_machine().gpus] == ["0", "1"]
    assert str(hardware.find_machine()) == "2 x NVIDIA H100 80GB HBM3 (80 GiB)"
    assert hardware.find_machine(look_for_gpus=False).gpus == ()
    nvidia_smi.write_text("#!/bin/sh\necho 'no devices were found'\nexit 9\n")
    assert [gpu.memory for gpu in hardware.find_machine().gpus] == [0] * len(hardware.find_machine().gpus)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("2, 0", ["2", "0"]),
        ("1,7,0", ["1"]),  # as in CUDA, nothing after an entry that fits no GPU
        ("GPU-22", []),  # fits two
        ("GPU-22cc,GPU-11aa", ["2", "0"]),
        ("MIG-5,1", ["MIG-5", "1"]),
    ],
)
def test_cuda_visible_devices_chooses_by_index_or_uuid(visible: str | None, ids: list[str]) -> None:
    rows = (line.split(", ") for line in LISTING.splitlines())
    gpus = [Gpu(id=row[0], uuid=row[1], memory=0, name=row[3]) for row in rows]
    assert [gpu.id for gpu in visible_gpus(gpus, visible)] == ids


def test_a_recipe_may_use_fewer_gpus_or_describe_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, machine(4, 80))
    assert len(hardware.machine_of(Hardware()).gpus) == 4
    assert [gpu.id for gpu in hardware.machine_of(Hardware(gpus=2)).gpus] == ["0", "1"]
    here = hardware.machine_of(Hardware(gpus=4, gpu_memory_gib=82.0))
    assert (here.described, here.gpu_memory) == (False, 80 * GIB), "it has them, more or less"
    elsewhere = hardware.machine_of(Hardware(gpus=8, gpu_memory_gib=80.0, gpu_name="NVIDIA A100"))
    assert (elsewhere.described, str(elsewhere)) == (True, "8 x NVIDIA A100 (80 GiB)")
    assert hardware.machine_of(Hardware(gpus=4, gpu_memory_gib=141.0)).described


@pytest.mark.parametrize(("choice", "expected"), CHOICES.items(), ids=CHOICES)
def test_choices_describe_gpus(choice: str, expected: tuple[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, machine(0))
    described = hardware.machine_of(compose.compose(["recipe=gemma4_dflash", f"hardware={choice}"]).hardware)
    assert (len(described.gpus), round(described.gpu_memory / GIB)) == expected
    assert described.described
