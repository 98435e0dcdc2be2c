"""Tokens per second that training takes in, beside upstream's trainer on the same rows and states.

    python tests/benchmarks/training.py STORE UPSTREAM_PYTHON DRIVER [eagle3|dflash [KEY=VALUE ...]]

STORE holds what `speculators-run recipe=smollm2_eagle3 vocab.size=8000 until=vocab` and `until=extract` make, with the
same further KEY=VALUEs. UPSTREAM_PYTHON is the interpreter of an environment with the package speculators 0.9; DRIVER
is a script that runs that package's trainer on a machine without an accelerator, since it refuses to by itself.

Both train a number of steps (`train.max_steps`, 80 unless told) from noise, on the same rows with the same held out,
packed to 512 tokens, on the same draft vocabulary, with the same optimiser, schedule and rate: EAGLE-3 of one layer,
unrolled three times, or DFlash of two layers, blocks of eight, 64 anchors. They take turns, with nothing beside, since
the machine is not as fast in every minute; of the turns the median counts. Both checkpoints are then validated by the
same code on the rows that were held out.

Upstream computes products in bfloat16, and Muon always does. On a processor with instructions for it, both do: ours is
told `train.precision=bfloat16`. One without emulates them, up to a hundred times slower than float32, which would make
this a comparison of arithmetic. There a few steps of upstream as it is are measured, and the ratio is taken with
float32 everywhere, Muon's products too, which upstream has no option for: it is told that bfloat16 is float32. Which
of the two this machine is, its rates of products say.

The bound is the machine's rate of products, measured in the same run at the shapes of a step; what ours needs of them
is counted (`torch.utils.flop_counter`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import upstream_trainer
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from speculators.config import compose
from speculators.config.algorithms import DFlash
from speculators.config.schema import Config
from speculators.drafts import DRAFTS
from speculators.drafts.base import Draft, Vocabulary
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.shards import ShardReader
from speculators.ops.distillation import TargetHead
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.training.loop import Loop, TrainingSpec

BATCH_TOKENS = 512
RATE = 1e-3
SAME = [
    "vocab.size=8000", "train.epochs=1", "train.max_steps=80", f"train.batch_tokens={BATCH_TOKENS}",
    "max_seq_len=1024", f"train.lr={RATE}", "train.muon_block=0",
    "train.weight_decay=0.1", "train.train_on_prompts=false", "speculator.num_key_value_heads=null",
    "speculator.hidden_loss_weight=0", "speculator.target_layer_ids=[2,15,27]",
]  # fmt: skip
OURS = {
    "eagle3": ["speculator.init=random", "speculator.ttt_warmup_ratio=0.0"],
    "dflash": [
        "speculator.num_layers=2", "speculator.block_size=8", "speculator.max_anchors=64",
        "speculator.init=random", "prompts.max_turns=1", "regenerate.max_tokens=160",
    ],
}  # fmt: skip
THEIRS = {
    "eagle3": ["--ttt-steps", "3"],
    "dflash": ["--num-layers", "2", "--block-size", "8", "--max-anchors", "64", "--full-attention-indices", "0", "1"],
}
ROUNDS = 3
STEPS_AS_IT_IS = 2
"""A step may take a minute; the last one is counted."""
SHAPES = ((1152, 960), (576, 3072), (1536, 576), (576, 8000))


class World:
    """The artifacts of the store that both train on, and what is made of them."""

    def __init__(self, store: str, algorithm: str, dtype: torch.dtype, words: list[str]) -> None:
        precision = f"train.precision={str(dtype).removeprefix('torch.')}"
        self.words = [f"recipe=smollm2_{algorithm}", *SAME, precision, *OURS[algorithm], *words]
        self.dtype = dtype
        self.config: Config = compose.compose(self.words)
        planner = Planner(self.config, Store(Path(store)))
        steps = {step.node.name: step for step in planner.plan()}
        paths = {name: steps[name].path for name in ("target", "tokenize", "vocab", "extract")}
        missing = [name for name, path in paths.items() if path is None]
        assert not missing, f"the store has no {missing}: run until=vocab and until=extract first"
        target, tokens, vocab, features = (path for path in paths.values() if path is not None)
        self.target, self.tokens, self.features = TargetCheckpoint(target), tokens, ShardReader(features)
        tensors = load_file(vocab / "vocab.safetensors")
        self.vocabulary = Vocabulary(d2t=tensors["d2t"], t2d=tensors["t2d"])
        self.layer_ids: list[int] = planner.derived["layer_ids"]

    def loop(self, draft: Draft, scratch: Path) -> Loop:
        """Our training of a draft."""
        norm = self.target.final_norm()
        spec = TrainingSpec(
            draft=draft,
            target_head=TargetHead(norm_weight=norm.weight, norm_eps=norm.eps, head=draft.lm_head.weight),
            data_loader=DataLoader(self.tokens, ShardSource(self.features)),
            train=self.config.train,
            save_dtype=self.dtype,
            scratch=scratch,
            device=torch.device("cpu"),
        )
        return Loop(spec)

    def fresh(self) -> Draft:
        """A draft from noise."""
        options = self.config.speculator
        if isinstance(options, DFlash):
            options.mask_token_id = self.target.mask_token_id()
        parts = self.target.parts(self.vocabulary.tokens)
        draft_type = DRAFTS[options.algorithm]
        return draft_type.from_target(parts, options, self.vocabulary, self.layer_ids, self.config.train.seed)

    def validate(self, checkpoint: Path) -> dict[str, float]:
        """What a checkpoint, of either, gives on the rows that were held out."""
        head = self.target.head(self.vocabulary.tokens)
        options, embeddings = self.config.speculator, self.target.embeddings()
        draft = DRAFTS[options.algorithm].from_checkpoint(checkpoint, embeddings, head, options)
        with tempfile.TemporaryDirectory() as scratch:
            loop = self.loop(draft, Path(scratch))
            loop._distribute_weights()
            return loop.validate()

    def export(self, root: Path) -> float:
        """Write everything as upstream reads it; returns the share of the rows that is trained on."""
        corpus = DataLoader(self.tokens, ShardSource(self.features))
        rows, held = corpus.split(self.config.train.validation_ratio)
        return upstream_trainer.export(corpus, self.features, rows, held, self.vocabulary, root)


def upstream(
    python: str, driver: Path, world: World, root: Path, share: float, algorithm: str, steps: int, float32: bool
) -> tuple[float, Path]:
    """Run upstream's trainer; returns tokens/s in its steps, as it counts them, and its checkpoint."""
    output = Path(tempfile.mkdtemp(dir=root))
    flags: dict[str, object] = {
        "speculator-type": algorithm, "verifier-name-or-path": world.target.directory, "save-path": output,
        "draft-attn-impl": "sdpa", "loss-implementation": "eager", "total-seq-len": BATCH_TOKENS,
        "hidden-states-dtype": "float32" if float32 else "bfloat16", "train-data-ratio": share,
        "optimizer": "muon", "lr": RATE, "weight-decay": world.config.train.weight_decay,
        "muon-weight-decay": world.config.train.weight_decay, "max-steps": steps, "seed": world.config.train.seed,
    }  # fmt: skip
    words = ["--target-layer-ids", *world.layer_ids, *THEIRS[algorithm]]
    told = "import torch; torch.Tensor.bfloat16 = torch.Tensor.float" if float32 else ""
    return upstream_trainer.run(python, root, flags, words, driver, told)[0], output


def ours(world: World, store: str, root: Path) -> tuple[float, Path]:
    """Run our trainer as a recipe does; returns tokens/s in its steps, and its checkpoint."""
    command = [str(Path(sys.executable).with_name("speculators-run")), *world.words, "until=train", "force=train"]
    # Into a store of its own: an artifact of the same bytes would stay, and with it the time that it once took.
    own = Path(tempfile.mkdtemp(dir=root))
    stores = [f"run.store={own}", f"run.stores_read=[{Path(store).expanduser().resolve()}]"]
    subprocess.run([*command, *stores], check=True, cwd=root, capture_output=True)
    (artifact,) = own.glob("artifacts/train/*/*/artifact.json")
    return json.loads(artifact.read_text())["record"]["tokens_per_second"], artifact.parent / "data" / "last"


def flops_per_token(world: World) -> float:
    """Operations in products, of a step of ours, counted while it is made."""
    with tempfile.TemporaryDirectory() as scratch:
        loop = world.loop(world.fresh(), Path(scratch))
        loop._initialise_or_resume()
        with FlopCounterMode(display=False) as counter:
            for index in range(upstream_trainer.WARM):
                loop._step(index)
        return counter.get_total_flops() / loop.progress.tokens


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of products at the shapes of a step, weighted by their size."""
    work, seconds = 0.0, 0.0
    for k, n in SHAPES:
        x, w = torch.randn(BATCH_TOKENS * 3 // 4, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        times = []
        for _ in range(30):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - began)
        work, seconds = work + 2.0 * len(x) * k * n, seconds + sorted(times)[len(times) // 2]
    return work / seconds


def main(store: str, python: str, driver: str, algorithm: str = "eagle3", *words: str) -> None:
    """Measure and print."""
    rates = {dtype: gemm_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    dtype = max(rates, key=lambda dtype: rates[dtype])
    float32 = dtype is torch.float32
    world = World(store, algorithm, dtype, list(words))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        run = partial(upstream, python, Path(driver), world, root, world.export(root), algorithm)
        steps = world.config.train.max_steps
        assert steps is not None
        theirs, mine, bounds = [], [], []
        for _ in range(ROUNDS):
            theirs.append(run(steps, float32=float32))
            mine.append(ours(world, store, root))
            bounds.append(gemm_rate(dtype))
        for name, turns, place in (("upstream", theirs, "0"), ("ours", mine, ".")):
            metrics = world.validate(turns[-1][1] / place)
            print(
                f"{name}, {dtype}: {', '.join(f'{rate:.0f}' for rate, _ in turns)} tokens/s; held out: loss "
                f"{metrics['loss']:.4f}, acceptance length {metrics['acceptance_length']:.3f}"
            )
        flops, bound = flops_per_token(world), median(bounds)
        ratio = median(own / their for (own, _), (their, _) in zip(mine, theirs, strict=True))
        share = median(flops * own / rate for (own, _), rate in zip(mine, bounds, strict=True))
        print(f"ratio {ratio:.2f}; {flops / 1e6:.0f} MFLOP a token, {share:.0%} of {bound / 1e9:.0f} GFLOP/s")
        if float32:
            print(f"upstream as it is, {STEPS_AS_IT_IS} steps: {run(STEPS_AS_IT_IS, float32=False)[0]:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
