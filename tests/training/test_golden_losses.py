"""Twenty losses of every algorithm under every optimiser, to seven digits: a change of any number shows here.

The world is made of numbers that bfloat16 holds exactly, drawn by Python's generator, so that it is the same on every
machine. What is left is rounding: the number of threads, the processor's vectors, and whether the loops are C++ or
torch's move a loss by some 1e-7 of itself. `python -m tests.goldens.update losses` writes the goldens.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from safetensors.torch import save_file
from trainings import job_of, metrics

from speculators.config.algorithms import Init
from speculators.config.choices import Optimizer
from speculators.features.contract import feature_contract
from speculators.features.shards import ShardWriter
from speculators.ops import cpu
from speculators.stages import train

GOLDEN = Path(__file__).parent.parent / "goldens" / "losses"
STEPS = 20
RELATIVE = 1e-6
ALGORITHMS = ("eagle3", "dflash")
CASES = [(algorithm, optimizer) for algorithm in ALGORITHMS for optimizer in Optimizer]
IDS = [f"{algorithm}_{optimizer.name}" for algorithm, optimizer in CASES]


def exact(*shape: int, seed: int, scale: float = 1 / 64, offset: float = 0.0) -> torch.Tensor:
    """Numbers that bfloat16 holds exactly, [*shape]: multiples of `scale` from -127 to 127, and `offset`."""
    draw = random.Random(seed)
    count = int(torch.Size(shape).numel())
    return torch.tensor([offset + scale * int(255 * draw.random() - 127) for _ in range(count)]).view(shape).bfloat16()


def write_world(directory: Path) -> Path:
    """Target, vocabulary, 24 rows of tokens and their hidden states, as the stages leave them."""
    width, vocab = tiny.H, tiny.V
    (directory / "target").mkdir()
    tensors = {
        "model.embed_tokens.weight": exact(vocab, width, seed=1),
        "lm_head.weight": exact(vocab, width, seed=2, scale=1 / 256),
        "model.norm.weight": exact(width, seed=3, scale=1 / 1024, offset=1.0),
    }
    save_file(tensors, directory / "target" / "model.safetensors")
    (directory / "target" / "config.json").write_text(json.dumps(tiny.CONFIG))
    (directory / "vocab").mkdir()
    kept = torch.arange(0, vocab, 2)[:40]
    t2d = torch.zeros(vocab, dtype=torch.bool)
    t2d[kept] = True
    save_file({"d2t": kept - torch.arange(len(kept)), "t2d": t2d}, directory / "vocab" / "vocab.safetensors")
    contract = feature_contract(
        target="t" * 64, tokens="k" * 64, dtype="bfloat16", compute_dtype="float32", layer_ids=[1, 3, 4, 6],
        hidden_size=width,
    )  # fmt: skip
    writer = ShardWriter(directory / "features", contract, shard_tokens=200)
    table: dict[str, list[object]] = {name: [] for name in ("input_ids", "loss_mask", "seq_len", "id", "source")}
    draw = random.Random(4)
    for row in range(24):
        length = 8 + int(32 * draw.random())
        ids = [int(vocab * draw.random()) for _ in range(length)]
        table["input_ids"].append(ids)
        table["loss_mask"].append([int(index >= length // 3) for index in range(length)])
        table["seq_len"].append(length)
        table["id"].append(f"conversation-{row}")
        table["source"].append("random")
        writer.add(row, torch.tensor(ids), exact(length, 4, width, seed=100 + row))
    writer.close()
    datasets.Dataset.from_dict(table).save_to_disk(str(directory / "tokens"))
    return directory


def losses(world: Path, work: Path, algorithm: str, optimizer: Optimizer) -> list[float]:
    """The loss of each of `STEPS` steps, and of every validation among them."""
    job = job_of(world, work, algorithm=algorithm, optimizer=optimizer, max_steps=STEPS, epochs=STEPS)
    job.config.speculator.init = Init.random
    train.main(job)
    return [line.get("validation", line)["loss"] for line in metrics(job)]


def recorded() -> dict[str, list[float]]:
    """All losses, by the name of their file."""
    by_name = {}
    with tempfile.TemporaryDirectory() as directory:
        world = write_world(Path(directory))
        for name, (algorithm, optimizer) in zip(IDS, CASES, strict=True):
            by_name[name] = losses(world, Path(directory) / name, algorithm, optimizer)
    return by_name


def update() -> None:
    """Write the goldens, a number a line."""
    GOLDEN.mkdir(exist_ok=True)
    for name, values in recorded().items():
        (GOLDEN / f"{name}.txt").write_text("".join(f"{value!r}\n" for value in values))


@pytest.fixture(scope="module")
def golden_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("native", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize(("algorithm", "optimizer"), CASES, ids=IDS)
def test_losses_are_the_golden_ones(
    algorithm: str,
    optimizer: Optimizer,
    native: bool,
    golden_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if native and cpu.kernels() is None:
        pytest.skip(cpu.missing())
    if not native:
        monkeypatch.setattr(cpu, "kernels", lambda *_: None)
    actual = losses(golden_world, tmp_path, algorithm, optimizer)
    golden = [float(line) for line in (GOLDEN / f"{algorithm}_{optimizer.name}.txt").read_text().split()]
    assert actual == pytest.approx(golden, rel=RELATIVE), (
        "training computes other numbers; if it is meant to, run `python -m tests.goldens.update losses`"
    )
