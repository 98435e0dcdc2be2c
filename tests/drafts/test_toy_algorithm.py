"""An algorithm that is written here alone, and put into the two lists, is trained, saved and read again.

It has one matrix, one norm and one proposal: the embedding of a token and one of the target's states there give the
next one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor, nn

from speculators.config.algorithms import SPECULATORS, Speculator
from speculators.config.choices import Device, Dtype
from speculators.config.fields import positive, select, semantic
from speculators.config.schema import Config, Extract, Target, Train, Vocab, from_builtins
from speculators.drafts import DRAFTS
from speculators.drafts.base import (
    TARGET_MATRICES,
    Draft,
    Predictions,
    Supervision,
    TargetParts,
    TrainState,
)
from speculators.drafts.layers import Linear, RMSNorm
from speculators.features.batch import PackedBatch
from speculators.job import Job
from speculators.runner.planning.derive import Facts, derive
from speculators.runner.planning.graph import KINDS
from speculators.stages import train


@dataclass(kw_only=True, slots=True, repr=False)
class Toy(Speculator):
    """A matrix."""

    algorithm: str = "toy"
    scale: float = semantic(1.0, positive())
    """What the states are multiplied by."""

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Toy:
        return cls(scale=config["scale"])

    def default_target_layer_ids(self, depth: int) -> list[int]:
        return [1, 3, 4]


class ToyDraft(Draft):
    """See the module."""

    algorithm: ClassVar[str] = "toy"
    architecture: ClassVar[str] = "ToyDraftModel"

    def __init__(self, config: Mapping[str, Any], options: Speculator, embeddings: Tensor, *parts: Any) -> None:
        super().__init__(config, options, embeddings, *parts)
        self.scale = float(config["scale"])
        width = embeddings.shape[1]
        self.mix = Linear(2 * width, width)
        self.norm = RMSNorm(width, 1e-5)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, Toy)
        return {"scale": options.scale, "layer_ids": layer_ids}

    def omitted_tensors(self) -> set[str]:
        return TARGET_MATRICES - self.own_matrices

    def forward(self, batch: PackedBatch, state: TrainState | None = None) -> Predictions:
        places = batch.loss_mask.nonzero()[:, 0]
        embedded = nn.functional.embedding(batch.token_ids[places], self.embed_tokens.weight).float()
        hidden = self.norm(self.mix(torch.cat([embedded, self.scale * batch.hidden_states[places, -1].float()], -1)))
        valid = torch.ones(1, len(places), dtype=torch.bool)
        count = valid.sum(1).float().clamp(min=1.0)
        return Predictions(
            hidden_states=hidden[None],
            target_index=places[None],
            valid=valid,
            weight=valid / count[:, None],
            count=count,
        )

    def supervision(self, batch: PackedBatch, state: TrainState | None = None) -> Supervision:
        counts = batch.loss_mask.sum()[None].float().clamp(min=1.0)
        return Supervision(counts=counts, source_mask=torch.ones_like(batch.loss_mask))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A request to train the toy, as the runner would make it."""
    monkeypatch.setitem(SPECULATORS, "toy", Toy)
    monkeypatch.setitem(DRAFTS, "toy", ToyDraft)
    tiny.write_target(tmp_path / "target")
    tiny.write_corpus(tmp_path)
    tiny.write_vocabulary(tmp_path / "vocab")
    config = Config(
        target=Target(source="local", dtype=Dtype.bfloat16, max_reference_gib=0.0),
        data={},
        vocab=Vocab(size=40),
        extract=Extract(),
        train=Train(epochs=2, batch_tokens=64, lr=0.01, precision=Dtype.float32, device=Device.cpu, log_every_steps=1),
        speculator=Toy(scale=0.5),
        pipeline={},
    )
    derived = derive(config, Facts(num_hidden_layers=tiny.LAYERS, hidden_size=tiny.H, vocab_size=tiny.V))
    names = ("tokens", "vocab", "target", "features")
    job = Job(
        node="train",
        stage="train",
        key="0" * 64,
        config=from_builtins(Config, select(config, KINDS["train"].reads)),
        derived=derived | {"verifier": {"name": "org/target", "revision": "abc"}},
        inputs={name: tmp_path / name for name in names},
        digests={name: name[0] * 64 for name in ("target", "features", "vocab")} | {"tokens": "k" * 64},
        services={},
        work=tmp_path / "work",
    )
    for directory in (job.output, job.scratch):
        directory.mkdir(parents=True)
    return job


def test_it_is_trained_saved_and_read_again(job: Job) -> None:
    train.main(job)
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    target = tiny.TargetCheckpoint(job.inputs["target"])
    head = target.head(tiny.vocabulary().tokens)
    draft = ToyDraft.from_checkpoint(job.output / "last", target.embeddings(), head)
    assert draft.scale == 0.5
    draft.save(job.work / "again", torch.bfloat16)
    for name in ("model.safetensors", "config.json"):
        assert (job.work / "again" / name).read_bytes() == (job.output / "last" / name).read_bytes()
