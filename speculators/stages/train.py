"""train: tokens + hidden states + vocabulary -> speculator. Fit a draft to the target's next-token distributions.

Hidden states come from an artifact, or from a server while training runs (pipelines `online` and `hybrid`); those of a
server are cached in `scratch/states`.

The artifact: `best/` (a checkpoint in the speculators format, with a model card), `last/`, `epochs/N/` (checkpoints;
with `train.save_every_epochs`), `metrics.jsonl` (a line every `train.log_every_steps` steps and at each validation),
`summary.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from speculators import model_card
from speculators.config.choices import Device
from speculators.config.fields import iter_options, to_builtins
from speculators.drafts import DRAFTS
from speculators.drafts.base import Vocabulary
from speculators.errors import ContractError, RecipeError, closest
from speculators.features.contract import ANSWERS, EVERYWHERE, check_contract, feature_contract
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.disk_cache import HiddenStatesCache
from speculators.features.io import exceeds_page_cache
from speculators.features.shards import ShardReader
from speculators.job import Job, write_json
from speculators.ops import cpu
from speculators.ops.distillation import TargetHead
from speculators.targets.checkpoint import TargetCheckpoint
from speculators.targets.fidelity_check import check_features, check_server
from speculators.training.live_features import LiveFeatures, RowShape
from speculators.training.loop import BEST, EPOCHS, LAST, METRICS, Loop, TrainingSpec
from speculators.training.ranks import Ranks, check_devices, process_group
from speculators.training.tracking import RunInfo, Trackers, check_installed

GIB = 2**30


def main(job: Job) -> None:
    """Train in `train.num_processes` processes; the first rank writes the artifact."""
    check_installed(job.config.train.trackers)
    with process_group(job.config.train.num_processes or 1, fit, job) as ranks:
        loop = fit(ranks, job)
    if ranks.first:
        publish(job, loop)


def track(job: Job) -> Trackers:
    """Start the experiment trackers of `train.trackers` with the name and the options of this run."""
    train = job.config.train
    info = RunInfo(
        project=train.tracker_project,
        name=f"{job.node}-{job.key[:8]}",
        options={name: to_builtins(value) for name, value, *_ in iter_options(job.config)},
        directory=Path(train.tracker_dir).absolute(),
        scratch=job.scratch,
    )
    return Trackers(train.trackers, info)


def fit(ranks: Ranks, job: Job) -> Loop:
    """Train as one of the ranks; returns the finished training loop."""
    train, options = job.config.train, job.config.speculator
    if options.algorithm not in DRAFTS:
        raise RecipeError(f"no draft named `{options.algorithm}`", closest(options.algorithm, DRAFTS))
    target = TargetCheckpoint(job.inputs["target"])
    source = stored_features(job, target, ranks) if "features" in job.inputs else live_features(job, target, ranks)
    vocabulary = read_vocabulary(job, target)
    data_loader = DataLoader(job.inputs["tokens"], source)
    device = select_device(train.device)
    check_devices(train.num_processes or 1, device)
    if device.type == "cpu" and (why := cpu.missing()):
        job.record.setdefault("notes", []).append(f"trained without the C++ kernels, which takes longer: {why}")

    if options.needs_mask_token():
        options = replace(cast(Any, options), mask_token_id=target.mask_token_id())
    parts = target.parts(vocabulary.tokens, job.derived["verifier"]["name"])
    draft_class, layer_ids = DRAFTS[options.algorithm], job.derived["layer_ids"]
    draft = draft_class.from_target(parts, options, vocabulary, layer_ids, train.seed).to(device)
    norm = target.final_norm()
    target_head = TargetHead(
        norm_weight=norm.weight.to(device),
        norm_eps=norm.eps,
        head=parts.head.float().to(device) if options.train_lm_head else draft.lm_head.weight,
        scale=target.logit_scale,
        softcap=target.logit_softcap,
    )

    def report(done: int, total: int, note: dict[str, Any]) -> None:
        if ranks.first:
            job.progress(done, total, "steps", **note)

    with contextlib.ExitStack() as stack, deterministic_algorithms():
        stack.callback(data_loader.close)
        trackers = track(job) if ranks.first else Trackers()
        stack.callback(trackers.close)
        spec = TrainingSpec(
            draft=draft,
            target_head=target_head,
            data_loader=data_loader,
            train=train,
            # The target's own: servers cast both to one format, and a wider one only takes more space.
            save_dtype=parts.embeddings.dtype,
            scratch=job.scratch,
            device=device,
            report=report,
            ranks=ranks,
            trackers=trackers,
        )
        loop = Loop(spec)
        loop.run()
    if isinstance(source, LiveFeatures):
        job.record |= source.record()
    if trackers.failed:
        job.record.setdefault("notes", []).extend(trackers.failed)
    return loop


def stored_features(job: Job, target: TargetCheckpoint, ranks: Ranks) -> ShardSource:
    """Open the artifact of hidden states.

    Raises:
        ContractError: they are of another target, of other tokens or of other layers.
    """
    path = job.inputs["features"]
    features = ShardReader(path, direct_io=exceeds_page_cache(path))
    contract = {
        "target": job.digests["target"],
        "tokens": job.digests["tokens"],
        "layer_ids": job.derived["capture_layer_ids"],
        "hidden_size": target.hidden_size,
        "normed": False,
        **({"last_state": EVERYWHERE} if job.config.train.train_on_prompts else {}),
    }
    check_contract(features.contract, contract)
    if ranks.first:
        check_features(job, features)
    return ShardSource(features)


def live_features(job: Job, target: TargetCheckpoint, ranks: Ranks) -> LiveFeatures:
    """Hidden states from the server that the runner has started for this target and these layers.

    Each rank requests those of its rows, and may use an equal share of the memory and of the disk.
    """
    if ranks.first:
        check_server(job)
    options, layer_ids = job.config.train, job.derived["capture_layer_ids"]
    compute_dtype, stored_dtype = job.config.target.dtype.name, job.config.extract.dtype.name
    shape = RowShape(
        layers=len(layer_ids),
        hidden_size=target.hidden_size,
        compute=getattr(torch, compute_dtype),
        stored=stored_dtype,
        everywhere=options.train_on_prompts,
    )
    cache = None
    if options.states_disk_gib > 0:
        contract = feature_contract(
            target=job.digests["target"],
            tokens=job.digests["tokens"],
            dtype=stored_dtype,
            compute_dtype=compute_dtype,
            layer_ids=layer_ids,
            hidden_size=target.hidden_size,
            last_state=EVERYWHERE if shape.everywhere else ANSWERS,
        )
        directory = job.scratch / ("states" if ranks.first else f"states-{ranks.rank}")
        cache = HiddenStatesCache(directory, contract, int(options.states_disk_gib * GIB / ranks.size))
    return LiveFeatures(
        job.services["target"],
        job.inputs["tokens"],
        shape,
        job.config.extract,
        memory=int(options.states_memory_gib * GIB / ranks.size),
        prefetch_batches=options.prefetch_batches,
        cache=cache,
    )


def read_vocabulary(job: Job, target: TargetCheckpoint) -> Vocabulary:
    """Read the draft vocabulary and check it against the target's."""
    tensors = load_file(job.inputs["vocab"] / "vocab.safetensors")
    vocabulary = Vocabulary(d2t=tensors["d2t"], t2d=tensors["t2d"])
    if len(vocabulary.t2d) != target.vocab_size or not torch.equal(vocabulary.t2d.nonzero()[:, 0], vocabulary.tokens):
        raise ContractError(
            f"the draft vocabulary has {len(vocabulary.d2t)} of {len(vocabulary.t2d)} tokens, but the target has "
            f"{target.vocab_size} tokens, or d2t and t2d contradict each other",
            "build it again from this target's tokens: force=[vocab]",
        )
    return vocabulary


def select_device(option: Device) -> torch.device:
    """The torch device of `train.device`; `auto` is the GPU if there is one.

    Raises:
        RecipeError: the option is `cuda`, and torch finds no CUDA device.
    """
    if option is Device.cuda and not torch.cuda.is_available():
        raise RecipeError("train.device is cuda, but torch finds no CUDA device", "set train.device=auto")
    cuda = option is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Make torch use only deterministic operations, and raise an error at any other, inside the context."""
    # cuBLAS reads the variable at its first use; without it torch refuses matrix products in deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, deterministic = torch.are_deterministic_algorithms_enabled(), cast(Any, torch.utils.deterministic)
    # The default fills every new tensor with NaN to expose reads of uninitialized memory: one more pass over memory.
    fill, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        deterministic.fill_uninitialized_memory = fill


def write_card(job: Job, summary: dict[str, Any]) -> None:
    """Write the best checkpoint's model card."""
    best = job.output / BEST
    card = model_card.model_card(
        json.loads((best / "config.json").read_text()),
        model="DIRECTORY",
        revision=job.derived["verifier"]["revision"],
        license=model_card.stated_license(job.inputs["target"]),
        training=summary,
    )
    (best / model_card.FILE).write_text(card, encoding="utf-8")


def publish(job: Job, loop: Loop) -> None:
    """Copy checkpoints and metrics to the artifact. Times go to the record, so that no file depends on them."""
    for name in (BEST, LAST):
        shutil.rmtree(job.output / name, ignore_errors=True)
        shutil.copytree(job.scratch / name, job.output / name)
    shutil.rmtree(job.output / EPOCHS, ignore_errors=True)
    if (job.scratch / EPOCHS).exists():
        shutil.copytree(job.scratch / EPOCHS, job.output / EPOCHS)
    shutil.copyfile(job.scratch / METRICS, job.output / METRICS)
    rows, validation_rows = loop.spec.data_loader.split(loop.train.validation_ratio)
    summary = {
        "steps": loop.progress.step,
        "tokens": loop.progress.tokens,
        "rows": len(rows),
        "validation_rows": len(validation_rows),
        "best_step": loop.progress.best_step,
        "validation": loop.progress.best,
        "parameters": sum(shape.numel() for shape in loop.optimizers.shapes.values()),
    }
    write_json(job.output / "summary.json", summary)
    write_card(job, summary)
    tokens_per_second = loop.attempt_tokens / loop.seconds if loop.seconds else 0.0
    job.record |= summary | {
        "seconds_in_steps": round(loop.seconds, 1),
        "seconds_waited": round(loop.wait_seconds, 2),
        "tokens_per_second": round(tokens_per_second, 1),
    }
