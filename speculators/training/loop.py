"""The loop: packs -> steps -> a trained draft, and everything that makes a killed run end in the same bytes.

What the next step depends on is sealed every so often (`checkpoint`): parameters, their averages, momenta, moments,
the generators' state, the number of steps done, and the sums that the next line of metrics is made of. Which rows come
next follows from that number, since the packs of every epoch follow from the seed. Nothing that is kept holds a time
of day.

The rows of a step follow from the recipe. They may be divided among ranks, and into several packs, whose gradients add
up to what one pack's would be: every prediction weighs what it would weigh there (`Draft.supervision`). Apart from
rounding, the weights do not depend on the number of ranks, and a run may go on with another one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from speculators.config.choices import Dtype
from speculators.config.schema import Train
from speculators.data.packing import RowSlice, divide, training_batches, validation_batches
from speculators.drafts.base import Draft, Predictions, Supervision
from speculators.drafts.layers import MLP
from speculators.errors import StageError
from speculators.evaluation.acceptance import AcceptanceCounts
from speculators.features.batch import PackedBatch
from speculators.features.dataloader import DataLoader
from speculators.ops.distillation import TargetHead
from speculators.training import checkpoint
from speculators.training.losses import MetricSums, Outcome, correct_so_far, distill, next_token_in_vocabulary
from speculators.training.optim import Average, Optimizers, rate
from speculators.training.ranks import Ranks
from speculators.training.sharding import Weights, weights
from speculators.training.tracking import Trackers
from speculators.training.watch import Watch

METRICS = "metrics.jsonl"
BEST, LAST = "best", "last"
"""Directories of the checkpoints of the best validation, and of the end."""
EPOCHS = "epochs"
"""Directory of the checkpoints that `train.save_every_epochs` keeps."""
SAMPLE_TOKENS = 32_768
"""Tokens that a draft may look at before it is trained."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every step of the run, decided before the first."""

    batches: list[list[RowSlice]]
    """What each step trains on, all epochs one after the other."""
    epoch_ends: list[int]
    """Number of steps done when each epoch is over."""
    validation: list[list[RowSlice]]
    """Each validation pack, whole rows, always the same."""


def schedule(corpus: DataLoader, train: Train) -> Schedule:
    """Split and pack.

    Raises:
        StageError: nothing is left to train on.
    """
    rows, held = corpus.split(train.validation_ratio)
    if not rows:
        raise StageError(
            "no conversation is left to train on", "lower train.validation_ratio, or take more conversations"
        )
    if train.train_on_prompts:
        corpus.supervise_all(rows)
    batches: list[list[RowSlice]] = []
    ends = []
    pieces = corpus.row_slices(rows, train.batch_tokens)
    for epoch in range(train.epochs):
        batches += training_batches(pieces, train.batch_tokens, train.seed, epoch, train.packing)
        if train.max_steps is not None:
            batches = batches[: train.max_steps]
        ends.append(len(batches))
        if len(batches) == train.max_steps:
            break
    whole = [RowSlice(row, 0, corpus.lengths[row]) for row in held]
    return Schedule(batches, ends, validation_batches(whole, train.batch_tokens))


@dataclass(slots=True)
class Progress:
    """Where the run is; with the tensors, all that it depends on."""

    step: int
    """Steps done."""
    sums: MetricSums
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
    watch: Watch = field(default_factory=Watch)
    """Over the losses."""


class Loop:
    """One run. `scratch` outlives a killed attempt; `report(progress, note)` is called after every step."""

    def __init__(
        self, draft: Draft, teacher: TargetHead, corpus: DataLoader, train: Train, step_decay: float,
        save_dtype: torch.dtype, scratch: Path, device: torch.device,
        report: Callable[[int, int, dict[str, Any]], None], ranks: Ranks | None = None,
        trackers: Trackers | None = None,
    ) -> None:  # fmt: skip
        self.draft, self.corpus, self.train = draft, corpus, train
        self.step_decay, self.save_dtype = step_decay, save_dtype
        self.scratch, self.device, self.report = scratch, device, report
        self.plan = schedule(corpus, train)
        self.ranks, self.trackers = ranks or Ranks(), trackers or Trackers()
        # What a rank holds of the weights, and of what goes with them, is decided once they are all there (`run`).
        self.weights: Weights
        self.optimizers: Optimizers
        self.average: Average | None = None
        for part in draft.modules():
            if isinstance(part, MLP):
                part.recompute = train.activation_checkpointing
        # Heads that are not trained are brought into the format of their products once.
        own, wanted = draft.lm_head.weight, getattr(torch, train.precision.name)
        self.head = None if own.requires_grad else own.to(wanted)
        shared = self.head if teacher.head is own else None
        self.teacher = replace(teacher, head=teacher.head.to(wanted) if shared is None else shared)
        self.at = Progress(0, MetricSums.empty(0), 0.0, 0, 0, 0, {})
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
            if self._gains_nothing():
                break
            self._step(index)
            if self.at.step in self.plan.epoch_ends:
                self._validate()
            late = self.ranks.agree(time.monotonic() - sealed > self.train.checkpoint_seconds)
            if late or self.at.step in self.plan.epoch_ends:
                self._seal()
                sealed = time.monotonic()
        self._keep(self.scratch / LAST)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _gains_nothing(self) -> bool:
        """Whether as many validations as `patience` says have come since the best one."""
        validated = [end for end in self.plan.epoch_ends if self.at.best_step < end <= self.at.step]
        return 0 < self.train.early_stopping_patience <= len(validated)

    def _packs(self, index: int) -> list[list[RowSlice]]:
        """The packs that this rank makes of its share of a step, which may be none. Shares go round."""
        shares = divide(self.plan.batches[index], self.ranks.size)
        share = shares[(self.ranks.rank + index) % self.ranks.size]
        return [part for part in divide(share, self.train.gradient_accumulation_steps) if part]

    def _own_validation(self) -> list[int]:
        """The validation packs that this rank takes."""
        return list(range(self.ranks.rank, len(self.plan.validation), self.ranks.size))

    def _to_come(self) -> list[list[RowSlice]]:
        """Every pack from here to the end, in order."""
        packs = []
        for index in range(self.at.step, len(self.plan.batches)):
            packs += self._packs(index)
            if index + 1 in self.plan.epoch_ends:
                packs += [self.plan.validation[which] for which in self._own_validation()]
        return packs

    def _sample(self) -> Iterator[PackedBatch]:
        """Some of the rows that are trained on."""
        wanted, tokens = [], 0
        for row in self.corpus.split(self.train.validation_ratio)[0]:
            wanted.append([RowSlice(row, 0, self.corpus.lengths[row])])
            tokens += self.corpus.lengths[row]
            if tokens > SAMPLE_TOKENS:
                break
        self.corpus.expect([*wanted, *self._to_come()])
        for pieces in wanted:
            yield self.corpus.pack(pieces, self.device)

    def _step(self, index: int) -> None:
        began = time.monotonic()
        total = len(self.plan.batches)
        factor = rate(index, total, self.train.warmup_ratio, self.train.schedule, self.train.decay_ratio)
        self.draft.advance(index, total)
        loss, tally, wrong = self._backward(index)
        self.weights.add_up()
        norm = self.weights.norm()
        if wrong or not math.isfinite(norm):
            rows = wrong or [piece.row for piece in self.plan.batches[index]]
            raise StageError(
                f"step {index}: loss {loss}, norm of the gradient {norm}, on rows {self.corpus.name(rows)}",
                "look at these rows' hidden states; if they are finite, lower train.lr or train.max_grad_norm",
            )
        self._stop_if_exploded(index, tally)
        largest = self.train.max_grad_norm
        self.optimizers.step(factor, 1.0 if largest is None else min(1.0, largest / (norm + 1e-6)))
        self.at.step += 1
        if self.average is not None:
            self.average.update(self.at.step)
        tokens = sum(piece.tokens for piece in self.plan.batches[index])
        self.at.tokens += tokens
        self.at.gradient_norm += norm
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
        if self.at.step % self.train.log_every_steps == 0 or self.at.step == total:
            self._log(factor)
        self.report(self.at.step, total, note)

    def _stop_if_exploded(self, index: int, tally: MetricSums) -> None:
        watch, times, predictions = self.at.watch, self.train.loss_spike_factor, sum(tally.count)
        if not times or not watch.exploded(sum(tally.loss) / predictions if predictions else None, times):
            return
        began = index - watch.ago(times)
        # What made that step high is its own rows, or what the step before has learnt from its rows.
        rows = [piece.row for step in range(max(0, began - 1), began + 1) for piece in self.plan.batches[step]]
        raise StageError(
            f"step {index}: loss {watch.now:.4g} a prediction, {watch.lowest:.4g} at its lowest; "
            f"it rose in step {began}, on rows {self.corpus.name(rows)}",
            "lower train.lr; if such rows are to be trained on, raise train.loss_spike_factor, or set it to 0",
        )

    def _backward(self, index: int) -> tuple[float, MetricSums, list[int]]:
        """Make the gradients of this rank's packs; of all packs the loss, what was counted, and rows without a loss."""
        loss, tally, wrong = 0.0, MetricSums.empty(0), []
        packs = self._packs(index)
        whole = None if packs == [self.plan.batches[index]] else self._whole(index)
        for pieces in packs:
            began = time.monotonic()
            pack = self.corpus.pack(pieces, self.device)
            self.waited += time.monotonic() - began
            if whole is not None:
                pack = replace(pack, anchor_mask=self._own(index, pieces, whole))
            predictions, outcome = self.weights.backward(partial(self._forward, pack, whole), pieces is packs[-1])
            tally.add(MetricSums.of(predictions.valid, outcome))
            own = outcome.loss.item()
            loss += own
            if not math.isfinite(own):
                wrong += pack.rows
        if not packs:
            self.weights.sit_out()
        losses, tallies, wrongs = zip(*self.ranks.gather((loss, tally, wrong)), strict=True)
        every = MetricSums.empty(0)
        for part in tallies:
            every.add(part)
        return sum(losses), every, list(itertools.chain(*wrongs))

    def _whole(self, index: int) -> Supervision:
        """What the packs of a step have in common; it follows from where its tokens are supervised."""
        every = self.plan.batches[index]
        mask = torch.cat([self.corpus.mask(piece) for piece in every]).to(self.device)
        return self.draft.supervision(
            PackedBatch(
                rows=[piece.row for piece in every],
                lengths=[piece.end for piece in every],
                token_ids=torch.zeros_like(mask, dtype=torch.int64),
                loss_mask=mask,
                hidden_states=torch.empty(len(mask), 0, 0, device=self.device),
                last_hidden_states=torch.empty(0, 0, device=self.device),
                last_index=torch.zeros_like(mask, dtype=torch.int64),
            )
        )

    def _own(self, index: int, pieces: list[RowSlice], whole: Supervision) -> torch.Tensor:
        """Of the places that a step trains from, those of some of its pieces, bool [T]."""
        own = set(pieces)
        parts = whole.chosen.split([piece.end for piece in self.plan.batches[index]])
        return torch.cat([part for part, piece in zip(parts, self.plan.batches[index], strict=True) if piece in own])

    def _forward(self, pack: PackedBatch, whole: Supervision | None = None) -> tuple[Predictions, Outcome]:
        """`whole`: of all packs of a step that is divided."""
        with self._autocast():
            predictions = self.draft(pack)
            head = self.draft.lm_head.weight if self.head is None else self.head
            asked = replace(predictions, target=pack.last_index[predictions.target])
            outcome = distill(
                asked, pack.last_hidden_states, head, self.teacher, self.draft.loss,
                counts=None if whole is None else whole.counts, regression=self.draft.regression,
            )  # fmt: skip
            return predictions, outcome

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.train.precision is Dtype.float32:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.train.precision.name))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics over all validation packs: losses, and what a server would accept. Empty if nothing is held out."""
        self.draft.advance(len(self.plan.batches), len(self.plan.batches))
        with self.weights.gathered():
            found = [self._validated(which) for which in self._own_validation()]
        # In the order of the packs, whoever took them: sums are the same to the last bit.
        counted = sorted(itertools.chain(*self.ranks.gather(found)), key=lambda one: one[0])
        if not counted:
            return {}
        _, tally, walk = counted[0]
        for _, more, further in counted[1:]:
            tally.add(more)
            walk.join(further)
        return tally.metrics(self.step_decay) | walk.metrics()

    def _validated(self, which: int) -> tuple[int, MetricSums, AcceptanceCounts]:
        """What one of the validation packs gives."""
        pack = self.corpus.pack(self.plan.validation[which], self.device)
        predictions, outcome = self._forward(pack)
        walk = AcceptanceCounts.empty(len(predictions.valid))
        # A token that the draft cannot say is a miss there, whatever its own vocabulary says is most likely.
        sayable = next_token_in_vocabulary(pack, self.draft.vocabulary)[predictions.target]
        walk.add(predictions.target[0].tolist(), correct_so_far(predictions.valid & outcome.correct & sayable))
        return which, MetricSums.of(predictions.valid, outcome), walk

    def _validate(self) -> None:
        with self._averaged():
            metrics = self.validate()
        epoch = self.plan.epoch_ends.index(self.at.step) + 1
        if metrics:
            self._write({"step": self.at.step, "epoch": epoch, "validation": metrics})
        if not metrics or not self.at.best or metrics["acceptance_length"] > self.at.best["acceptance_length"]:
            self.at.best, self.at.best_step = metrics, self.at.step
            if metrics or self.at.step == len(self.plan.batches):  # where nothing is held out, only the last can be it
                self._keep(self.scratch / BEST)
        if self.train.save_every_epochs and epoch % self.train.save_every_epochs == 0:
            self._keep(self.scratch / EPOCHS / str(epoch))

    def _keep(self, place: Path) -> None:
        """Write the checkpoint to `place`, of the averaged weights if there are any, whole or not at all."""
        with self._averaged():
            whole = self.weights.whole()
            if not self.ranks.first:
                return
            beside = self.scratch / "kept.new"
            shutil.rmtree(beside, ignore_errors=True)
            self.draft.save(beside, self.save_dtype, whole)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        beside.rename(place)

    def _log(self, factor: float) -> None:
        lines = (self.at.step - 1) % self.train.log_every_steps + 1
        facts = {"step": self.at.step, "tokens": self.at.tokens, "lr": self.train.lr * factor}
        self._write(facts | {"gradient_norm": self.at.gradient_norm / lines} | self.at.sums.metrics(self.step_decay))
        self.at.sums, self.at.gradient_norm = MetricSums.empty(0), 0.0

    def _write(self, line: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        with (self.scratch / METRICS).open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            self.at.metrics_bytes = file.tell()
        self.trackers.log(line)

    def _seal(self) -> None:
        generators = self.ranks.gather(self._generators())
        tensors: dict[str, torch.Tensor] = {f"draft.{name}": p for name, p in self.weights.held.items()}
        tensors |= {f"measured.{name}": t for name, t in self.draft.measured.items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizers.state().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.averages.items()}
        for rank, states in enumerate(generators):
            tensors |= {f"random.{rank}.{name}": state for name, state in states.items()}
        checkpoint.seal(self.scratch, self.at.step, self.weights.sealed(tensors), asdict(self.at), self.ranks)

    def _generators(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _resume(self) -> None:
        """Go on from the newest sealed state, or begin. What all ranks read, rank 0 has looked through."""
        found = self.ranks.agree(checkpoint.newest(self.scratch) if self.ranks.first else None)
        torch.manual_seed(self.train.seed)
        if found is None:
            if self.ranks.first:
                (self.scratch / METRICS).write_bytes(b"")
                self.draft.prepare(self._sample(), self.train.seed)
            drawn = [p.data for p in self.draft.parameters()]
            self.ranks.spread(drawn, [0] * len(drawn))
            self._measured(self.ranks.agree({name: t.cpu() for name, t in self.draft.measured.items()}))
            self._hold()
            return
        self._hold()
        tensors, facts = checkpoint.read(found, *self.weights.part)
        watch = Watch(**facts.get("watch", {}))  # states that were sealed before there was one may be gone on from
        self.at = Progress(**{**facts, "sums": MetricSums(**facts["sums"]), "watch": watch})
        if self.ranks.first:
            os.truncate(self.scratch / METRICS, self.at.metrics_bytes)
        with torch.no_grad():
            for name, p in self.weights.held.items():
                p.copy_(tensors[f"draft.{name}"])
        self._measured(_under("measured.", tensors))
        self.optimizers.load(_under("optimizer.", tensors))
        if self.average is not None:
            self.average.load(_under("average.", tensors))
        states = _under(f"random.{self.ranks.rank}.", tensors)  # none on a rank that was not there before
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def _measured(self, found: dict[str, torch.Tensor]) -> None:
        self.draft.measured = {name: t.to(self.device) for name, t in found.items()}

    def _hold(self) -> None:
        """Give each rank what it holds of the weights, and the optimisers' state and the average with it."""
        self.weights = weights(self.draft, self.train, self.ranks, self.device)
        self.optimizers = self.weights.optimizers(self.train)
        if self.train.ema > 0:
            self.average = Average(self.weights.held, self.train.ema)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
