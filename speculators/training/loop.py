"""The loop: packs -> steps -> a trained draft, and everything that makes a killed run end in the same bytes.

What the next step depends on is sealed every so often (`checkpoint`): parameters, momenta, moments, the generators'
state, the number of steps done, and the sums that the next line of metrics is made of. Which rows come next follows
from that number, since the packs of every epoch follow from the seed. Nothing that is kept holds a time of day.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speculators.config import Dtype, Train
from speculators.data.packing import Piece, training_batches, validation_batches
from speculators.decoding import Walk
from speculators.drafts.base import Draft, Pack, Predictions
from speculators.errors import StageError
from speculators.training import checkpoint
from speculators.training.corpus import Corpus
from speculators.training.losses import Outcome, Tally, Teacher, distill, run, sayable_next
from speculators.training.optim import Optimizers, rate

METRICS = "metrics.jsonl"
SAMPLE_TOKENS = 32_768
"""Tokens that a draft may look at before it is trained."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every step of the run, decided before the first."""

    batches: list[list[Piece]]
    """What each step trains on, all epochs one after the other."""
    epoch_ends: list[int]
    """Number of steps done when each epoch is over."""
    validation: list[list[Piece]]
    """Each validation pack, whole rows, always the same."""


def schedule(corpus: Corpus, train: Train) -> Schedule:
    """Split and pack.

    Raises:
        StageError: nothing is left to train on.
    """
    rows, held = corpus.split(train.validation)
    if not rows:
        raise StageError("no conversation is left to train on", "lower train.validation, or take more conversations")
    batches: list[list[Piece]] = []
    ends = []
    pieces = corpus.pieces(rows, train.batch_tokens)
    for epoch in range(train.epochs):
        batches += training_batches(pieces, train.batch_tokens, train.seed, epoch)
        ends.append(len(batches))
    whole = [Piece(row, 0, corpus.lengths[row]) for row in held]
    return Schedule(batches, ends, validation_batches(whole, train.batch_tokens))


@dataclass(slots=True)
class Progress:
    """Where the run is; with the tensors, all that it depends on."""

    step: int
    """Steps done."""
    sums: Tally
    """Over the steps since the last line of metrics."""
    gradient_norm: float
    """Sum over the same steps, before clipping."""
    tokens: int
    """Trained on since the beginning."""
    metrics_bytes: int
    """Length of the metrics file."""
    best_step: int
    """0 before the first validation."""
    best: dict[str, float]
    """Validation metrics of the best checkpoint."""


class Loop:
    """One run. `scratch` outlives a killed attempt; `report(progress, note)` is called after every step."""

    def __init__(
        self, draft: Draft, teacher: Teacher, corpus: Corpus, train: Train, step_decay: float, save_dtype: torch.dtype,
        scratch: Path, device: torch.device, report: Callable[[int, int, dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.draft, self.teacher, self.corpus, self.train = draft, teacher, corpus, train
        self.step_decay, self.save_dtype = step_decay, save_dtype
        self.scratch, self.device, self.report = scratch, device, report
        self.plan = schedule(corpus, train)
        self.optimizers = Optimizers(draft, train)
        self.at = Progress(0, Tally.empty(0), 0.0, 0, 0, 0, {})
        self.seconds = 0.0
        """Spent in steps by this attempt."""
        self.waited = 0.0
        """Of them, until a step's tokens and hidden states were there."""
        self.attempt_tokens = 0
        """Trained on by this attempt."""

    def run(self) -> None:
        """Train to the end, from wherever an earlier attempt left off."""
        self._resume()
        self.corpus.expect(self._to_come())
        sealed = time.monotonic()
        for index in range(self.at.step, len(self.plan.batches)):
            self._step(index)
            if self.at.step in self.plan.epoch_ends:
                self._validate()
            if self.at.step in self.plan.epoch_ends or time.monotonic() - sealed > self.train.checkpoint_seconds:
                self._seal()
                sealed = time.monotonic()

    def _to_come(self) -> list[list[Piece]]:
        """Every pack from here to the end, in order."""
        packs = []
        for index in range(self.at.step, len(self.plan.batches)):
            packs.append(self.plan.batches[index])
            if index + 1 in self.plan.epoch_ends:
                packs += self.plan.validation
        return packs

    def _sample(self) -> Iterator[Pack]:
        """Some of the rows that are trained on."""
        wanted, tokens = [], 0
        for row in self.corpus.split(self.train.validation)[0]:
            wanted.append([Piece(row, 0, self.corpus.lengths[row])])
            tokens += self.corpus.lengths[row]
            if tokens > SAMPLE_TOKENS:
                break
        self.corpus.expect([*wanted, *self._to_come()])
        for pieces in wanted:
            yield self.corpus.pack(pieces, self.device)

    def _step(self, index: int) -> None:
        began = time.monotonic()
        total = len(self.plan.batches)
        factor = rate(index, total, self.train.warmup, self.train.schedule)
        pieces = self.plan.batches[index]
        pack, tokens = self.corpus.pack(pieces, self.device), sum(piece.tokens for piece in pieces)
        self.waited += time.monotonic() - began
        self.draft.advance(index, total)
        predictions, outcome = self._forward(pack)
        tally = Tally.of(predictions.valid, outcome)
        outcome.loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.optimizers.parameters(), self.train.clip))
        loss = outcome.loss.item()
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise StageError(
                f"step {index}: loss {loss}, norm of the gradient {norm}, on rows {self.corpus.name(pack.rows)}",
                "look at these rows' hidden states; if they are finite, lower train.lr or train.clip",
            )
        self.optimizers.step(factor)
        self.at.step += 1
        self.at.tokens += tokens
        self.at.gradient_norm += norm
        self.at.sums = tally if not self.at.sums.count else self.at.sums
        if self.at.sums is not tally:
            self.at.sums.add(tally)
        self.seconds += time.monotonic() - began
        self.attempt_tokens += tokens
        note: dict[str, Any] = {
            # Of the steps since the last line of metrics: a single one may have trained on a few dozen tokens.
            "loss": round(self.at.sums.metrics(self.step_decay)["loss"], 2),
            "tokens_per_second": round(self.attempt_tokens / self.seconds),
            "waiting": f"{self.waited / self.seconds:.1%}",
        }
        if self.at.best:
            note["held_out"] = round(self.at.best["acceptance_length"], 3)
        if self.at.step % self.train.log_every == 0 or self.at.step == total:
            self._log(factor)
        self.report(self.at.step, total, note)

    def _forward(self, pack: Pack) -> tuple[Predictions, Outcome]:
        with self._autocast():
            predictions = self.draft(pack)
            last, head = pack.states[:, -1], self.draft.lm_head.weight
            return predictions, distill(predictions, last, head, self.teacher, self.draft.loss)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.train.precision is Dtype.float32:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.train.precision.name))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics over all validation packs: losses, and what a server would accept. Empty if nothing is held out."""
        tally, walk = None, None
        self.draft.advance(len(self.plan.batches), len(self.plan.batches))
        for pieces in self.plan.validation:
            pack = self.corpus.pack(pieces, self.device)
            predictions, outcome = self._forward(pack)
            counted = Tally.of(predictions.valid, outcome)
            tally = counted if tally is None else tally
            if tally is not counted:
                tally.add(counted)
            walk = walk or Walk.empty(len(predictions.valid))
            # A token that the draft cannot say is a miss there, whatever its own vocabulary says is most likely.
            sayable = sayable_next(pack, self.draft.vocabulary)[predictions.target]
            walk.add(predictions.target[0].tolist(), run(predictions.valid & outcome.correct & sayable))
        return {} if tally is None or walk is None else tally.metrics(self.step_decay) | walk.metrics()

    def _validate(self) -> None:
        metrics = self.validate()
        epoch = self.plan.epoch_ends.index(self.at.step) + 1
        if metrics:
            self._write({"step": self.at.step, "epoch": epoch, "validation": metrics})
        if not metrics or not self.at.best or metrics["acceptance_length"] > self.at.best["acceptance_length"]:
            self.at.best, self.at.best_step = metrics, self.at.step
            beside = self.scratch / "best.new"
            shutil.rmtree(beside, ignore_errors=True)
            self.draft.save(beside, self.save_dtype)
            shutil.rmtree(self.scratch / "best", ignore_errors=True)
            beside.rename(self.scratch / "best")

    def _log(self, factor: float) -> None:
        lines = (self.at.step - 1) % self.train.log_every + 1
        facts = {"step": self.at.step, "tokens": self.at.tokens, "lr": self.train.lr * factor}
        self._write(facts | {"gradient_norm": self.at.gradient_norm / lines} | self.at.sums.metrics(self.step_decay))
        self.at.sums, self.at.gradient_norm = Tally.empty(0), 0.0

    def _write(self, line: dict[str, Any]) -> None:
        with (self.scratch / METRICS).open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            self.at.metrics_bytes = file.tell()

    def _seal(self) -> None:
        tensors: dict[str, torch.Tensor] = {f"draft.{name}": p for name, p in self.draft.named_parameters()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizers.state().items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.seal(self.scratch, self.at.step, tensors, asdict(self.at))

    def _resume(self) -> None:
        """Go on from the newest sealed state, or begin."""
        found = checkpoint.newest(self.scratch)
        if found is None:
            (self.scratch / METRICS).write_bytes(b"")
            torch.manual_seed(self.train.seed)
            self.draft.prepare(self._sample(), self.train.seed)
            return
        tensors, facts = found
        self.at = Progress(**{**facts, "sums": Tally(**facts["sums"])})
        os.truncate(self.scratch / METRICS, self.at.metrics_bytes)
        with torch.no_grad():
            for name, p in self.draft.named_parameters():
                p.copy_(tensors[f"draft.{name}"])
        prefix = "optimizer."
        self.optimizers.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
