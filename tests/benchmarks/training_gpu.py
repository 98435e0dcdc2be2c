"""Tokens per second and memory of training on a GPU, beside upstream's trainer, on made up states of Qwen3-8B's size.

    python tests/benchmarks/training_gpu.py UPSTREAM_PYTHON [eagle3|dflash [qwen3_8b|tiny [DRIVER]]]

Both train some steps from noise on the same packs of rows of random tokens, with random hidden states and a target
that is nothing but embeddings, norm and head: EAGLE-3 of one layer unrolled three times, or DFlash of five layers,
blocks of 16 and 512 anchors. Speed and memory do not depend on what the numbers are. Upstream goes first, in a process
of its own; memory is the most that torch allocated on the device. `UPSTREAM_PYTHON` is the interpreter of an
environment with the package speculators 0.9, or `-` for ours alone. `tiny` and DRIVER (as for `training.py`) are for a
machine without a GPU, to see that all of this runs.

The bound is the rate of bfloat16 products of a step's shapes, measured in the same run; what ours needs of them is
counted (`torch.utils.flop_counter`; attention by compiled masks is not in it).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import upstream_trainer
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from speculators.config.algorithms import DFlash, Eagle3, Speculator
from speculators.config.choices import Dtype
from speculators.config.schema import Train
from speculators.data.token_table import save_table, write_table
from speculators.drafts import DRAFTS
from speculators.drafts.base import Vocabulary
from speculators.features.contract import feature_contract
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.shards import ShardReader, ShardWriter
from speculators.ops.distillation import TargetHead
from speculators.stages.train import deterministic_algorithms
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.training.loop import Loop, TrainingSpec

STEPS = 13
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a target, and of a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    kept: int
    """Tokens of the draft's vocabulary."""
    row: int
    """Tokens of a row."""
    rows: int
    """Of a step."""
    layer_ids: dict[str, list[int]]
    speculators: dict[str, Speculator]

    @property
    def batch_tokens(self) -> int:
        return self.row * self.rows


SIZES = {
    "qwen3_8b": Size(
        hidden=4096, intermediate=12288, layers=36, heads=32, key_value_heads=8, head=128,
        vocabulary=151936, kept=32000, row=2048, rows=4,
        layer_ids={"eagle3": [2, 18, 33], "dflash": [1, 9, 17, 25, 33]},
        speculators={
            "eagle3": Eagle3(),
            "dflash": DFlash(num_layers=5, block_size=16, max_anchors=512, mask_token_id=151_000),
        },
    ),
    "tiny": Size(
        hidden=64, intermediate=128, layers=6, heads=4, key_value_heads=2, head=16,
        vocabulary=512, kept=256, row=64, rows=4,
        layer_ids={"eagle3": [1, 3, 4], "dflash": [1, 2, 3, 4, 5]},
        speculators={
            "eagle3": Eagle3(),
            "dflash": DFlash(num_layers=5, block_size=16, max_anchors=16, mask_token_id=500),
        },
    ),
}  # fmt: skip
THEIRS = {
    "eagle3": ["--ttt-steps", "3"],
    "dflash": ["--num-layers", "5", "--block-size", "16", "--full-attention-indices", *"01234"],
}


def write_target(size: Size, directory: Path) -> TargetCheckpoint:
    """Of a target, what training reads."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": size.hidden,
        "vocab_size": size.vocabulary, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.key_value_heads, "head_dim": size.head,
        "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False, "attention_bias": False, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    noise = {name: torch.empty(size.vocabulary, size.hidden, dtype=torch.bfloat16) for name in ("embed", "head")}
    for tensor in noise.values():
        tensor.normal_(std=0.02)
    tensors = {"model.embed_tokens.weight": noise["embed"], "lm_head.weight": noise["head"]}
    save_file({**tensors, "model.norm.weight": torch.ones(size.hidden).bfloat16()}, directory / "model.safetensors")
    return TargetCheckpoint(directory)


def write_rows(size: Size, layer_ids: list[int], root: Path) -> tuple[Path, ShardReader]:
    """Rows for the steps, and their states."""
    contract = feature_contract(
        target="t" * 64, tokens="k" * 64, dtype="bfloat16", compute_dtype="bfloat16",
        layer_ids=[*layer_ids, size.layers], hidden_size=size.hidden,
    )  # fmt: skip
    writer = ShardWriter(root / "features", contract, shard_tokens=size.batch_tokens)
    table = []
    for row in range(STEPS * size.rows):
        token_ids = torch.randint(size.kept, (size.row,))
        states = torch.empty(size.row, len(layer_ids) + 1, size.hidden, dtype=torch.bfloat16).normal_()
        writer.add(row, token_ids, states)
        said = [0] * (size.row // 4) + [1] * (size.row - size.row // 4)
        table.append({"input_ids": token_ids.tolist(), "loss_mask": said, "seq_len": size.row, "id": f"row-{row}"})
    writer.close()
    write_table(iter(table), root / "tokens.arrow")
    save_table(root / "tokens.arrow", root / "tokens")
    return root / "tokens", ShardReader(root / "features")


def theirs(
    python: str, driver: Path | None, algorithm: str, size: Size, target: TargetCheckpoint, root: Path, share: float
) -> tuple[float, int]:
    """Tokens/s and most memory of upstream's trainer."""
    flags: dict[str, object] = {
        "speculator-type": algorithm, "verifier-name-or-path": target.directory, "save-path": root / "upstream",
        "total-seq-len": size.batch_tokens, "train-data-ratio": share, "optimizer": "muon", "lr": RATE,
        "hidden-states-dtype": "bfloat16", "max-steps": STEPS - 1,
    }  # fmt: skip
    if driver:
        flags |= {"draft-attn-impl": "sdpa", "loss-implementation": "eager"}
    words: list[object] = ["--target-layer-ids", *size.layer_ids[algorithm], *THEIRS[algorithm]]
    options = size.speculators[algorithm]
    if isinstance(options, DFlash):
        words += ["--max-anchors", options.max_anchors, "--mask-token-id", options.mask_token_id]
    return upstream_trainer.run(python, root, flags, words, driver)


def build(
    algorithm: str, size: Size, target: TargetCheckpoint, vocabulary: Vocabulary, corpus: DataLoader, scratch: Path
) -> Loop:
    """Our training, as the stage builds it."""
    options = size.speculators[algorithm]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = target.parts(vocabulary.tokens)
    draft = DRAFTS[algorithm].from_target(parts, options, vocabulary, size.layer_ids[algorithm], seed=0).to(device)
    norm = target.final_norm()
    target_head = TargetHead(norm_weight=norm.weight.to(device), norm_eps=norm.eps, head=draft.lm_head.weight)
    train = Train(
        batch_tokens=size.batch_tokens,
        epochs=1,
        max_steps=STEPS - 1,
        validation_ratio=0.0,
        lr=RATE,
        precision=Dtype.bfloat16,
    )
    spec = TrainingSpec(
        draft=draft,
        target_head=target_head,
        data_loader=corpus,
        train=train,
        save_dtype=torch.bfloat16,
        scratch=scratch,
        device=device,
    )
    return Loop(spec)


def ours(loop: Loop) -> tuple[float, int, int]:
    """Tokens/s, most memory, and operations a token."""
    loop._initialise_or_resume()
    loop.spec.data_loader.expect(loop._remaining_batches())
    for index in range(upstream_trainer.WARM):
        loop._step(index)
    with FlopCounterMode(display=False) as counter:
        loop._step(upstream_trainer.WARM)
    flops = counter.get_total_flops() // size_of(loop, upstream_trainer.WARM)
    began, tokens = time.perf_counter(), 0
    for index in range(upstream_trainer.WARM + 1, len(loop.plan.steps)):
        loop._step(index)
        tokens += size_of(loop, index)
    if loop.spec.device.type == "cuda":
        torch.cuda.synchronize()
    rate = tokens / (time.perf_counter() - began)
    loop.spec.data_loader.close()
    return rate, torch.cuda.max_memory_allocated() if loop.spec.device.type == "cuda" else 0, flops


def size_of(loop: Loop, index: int) -> int:
    """Tokens of a step."""
    return sum(piece.tokens for piece in loop.plan.steps[index])


def gemm_rate(size: Size, device: torch.device) -> float:
    """Operations per second of bfloat16 products at the shape of an MLP in a step."""
    x = torch.randn(size.batch_tokens, size.hidden, device=device).bfloat16()
    w = torch.randn(size.intermediate, size.hidden, device=device).bfloat16()
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 10)
    return 2.0 * size.batch_tokens * size.hidden * size.intermediate / sorted(times)[10]


def main(python: str, algorithm: str = "eagle3", of: str = "qwen3_8b", driver: str | None = None) -> None:
    """Measure and print."""
    size = SIZES[of]
    torch.manual_seed(0)
    kept = torch.arange(size.vocabulary) < size.kept
    vocabulary = Vocabulary(d2t=torch.zeros(size.kept, dtype=torch.int64), t2d=kept)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        target = write_target(size, root / "target")
        tokens, features = write_rows(size, size.layer_ids[algorithm], root)
        corpus = DataLoader(tokens, ShardSource(features))
        rows = list(range(STEPS * size.rows))
        found: dict[str, tuple[float, int]] = {}
        if python != "-":
            # It wants something to validate on: the last step's rows.
            share = upstream_trainer.export(corpus, features, rows[: -size.rows], rows[-size.rows :], vocabulary, root)
            found["upstream"] = theirs(python, Path(driver) if driver else None, algorithm, size, target, root, share)
        loop = build(algorithm, size, target, vocabulary, corpus, root)
        with deterministic_algorithms():
            rate, peak, flops = ours(loop)
        found["ours"] = rate, peak
        name = torch.cuda.get_device_name() if loop.spec.device.type == "cuda" else "no GPU"
        print(f"{algorithm}, {of}, {size.batch_tokens} tokens a step, torch {torch.__version__}, {name}")
        for who, (speed, most) in found.items():
            print(f"{who}: {speed:.0f} tokens/s, at most {most / 2**30:.2f} GiB")
        bound = gemm_rate(size, loop.spec.device)
        print(f"{flops / 1e6:.0f} MFLOP a token, {flops * rate / bound:.0%} of {bound / 1e12:.2f} TFLOP/s")
        if "upstream" in found:
            print(f"ratio {rate / found['upstream'][0]:.2f}, memory {peak / max(1, found['upstream'][1]):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
