"""The training loop: packed batches -> optimizer steps -> a trained draft.

A run that is killed continues and ends in the same bytes, if it has as many ranks. Everything that the next step
depends on is written to a checkpoint at intervals (`checkpoint`): parameters, their averages, optimizer state, random
generators' state, the number of steps done and the sums of the next metrics line. The rows of all steps follow from the
recipe and the seed. Nothing in the outputs depends on the time.

The rows of a step can be divided among ranks, and into several packed batches (gradient accumulation). Their gradients
add up to those of one large batch, because every prediction has the loss weight that it would have there
(`Draft.supervision`). Apart from rounding, the trained parameters do not depend on the number of ranks, and a run can
continue with another number.
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

from speculators.config.algorithms import Init, loss_weights
from speculators.config.choices import Dtype
from speculators.config.schema import Train
from speculators.data.packing import RowSlice, divide, training_batches, validation_batches
from speculators.drafts import induction
from speculators.drafts.base import Draft, Predictions, Supervision, TrainState
from speculators.errors import StageError
from speculators.evaluation.acceptance import AcceptanceCounts
from speculators.features.batch import PackedBatch
from speculators.features.dataloader import DataLoader
from speculators.ops.distillation import TargetHead
from speculators.training import checkpoint
from speculators.training.losses import MetricSums, Outcome, correct_so_far, distill, next_token_in_vocabulary
from speculators.training.optim import Average, Optimizers, rate
from speculators.training.ranks import Ranks
from speculators.training.sharding import ReplicatedWeights, trained_weights
from speculators.training.tracking import Trackers
from speculators.training.watch import LossWatch

METRICS = "metrics.jsonl"
BEST, LAST = "best", "last"
"""Directories of the checkpoints with the best validation, and after the last step."""
EPOCHS = "epochs"
"""Directory of the checkpoints that `train.save_every_epochs` keeps."""
INIT_SAMPLE_TOKENS = 32_768
"""Training tokens, at least, that an initialiser (`drafts.induction`) is fitted to; whole rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """Everything that a training needs."""

    draft: Draft
    """On `device`; its weights are trained in place."""
    target_head: TargetHead
    """Computes the target's logits, in the draft vocabulary."""
    data_loader: DataLoader
    train: Train
    """The recipe's section."""
    save_dtype: torch.dtype
    """Format of the weights in the saved checkpoints."""
    scratch: Path
    """Directory that survives when the run is killed."""
    device: torch.device
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, total_steps, note: None
    """Called after every step with the number of steps done and figures to show."""
    ranks: Ranks = field(default_factory=Ranks)
    trackers: Trackers = field(default_factory=Trackers)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The rows of every step, decided before the first."""

    steps: list[list[RowSlice]]
    """What each optimizer step trains on, over all epochs."""
    epoch_ends: list[int]
    """Number of steps done at the end of each epoch."""
    validation: list[list[RowSlice]]
    """The validation batches, of whole rows, the same every time."""


def plan_training(data_loader: DataLoader, train: Train) -> TrainingPlan:
    """Split off the validation rows, and pack the others into steps.

    Raises:
        StageError: no row is left to train on.
    """
    rows, validation_rows = data_loader.split(train.validation_ratio)
    if not rows:
        raise StageError(
            "no conversation is left to train on", "lower train.validation_ratio, or take more conversations"
        )
    if train.train_on_prompts:
        data_loader.supervise_all(rows)
    steps: list[list[RowSlice]] = []
    epoch_ends = []
    row_slices = data_loader.row_slices(rows, train.batch_tokens)
    for epoch in range(train.epochs):
        steps += training_batches(row_slices, train.batch_tokens, train.seed, epoch, train.packing)
        if train.max_steps is not None:
            steps = steps[: train.max_steps]
        epoch_ends.append(len(steps))
        if len(steps) == train.max_steps:
            break
    whole_rows = [RowSlice(row, 0, data_loader.lengths[row]) for row in validation_rows]
    return TrainingPlan(steps, epoch_ends, validation_batches(whole_rows, train.batch_tokens))


@dataclass(slots=True)
class Progress:
    """The counters and sums of a run, which are part of its checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    metric_sums: MetricSums = field(default_factory=lambda: MetricSums.empty(0))
    """Over the steps since the last metrics line."""
    grad_norm_sum: float = 0.0
    """Over the same steps, before clipping."""
    tokens: int = 0
    """Tokens trained on."""
    metrics_bytes: int = 0
    """Length of the metrics file."""
    best_step: int = 0
    """Step of the best validation; 0 before the first."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best validation."""
    watch: LossWatch = field(default_factory=LossWatch)


class Loop:
    """One training run, from its beginning or from the newest checkpoint in `spec.scratch`."""

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec, self.draft, self.train, self.ranks = spec, spec.draft, spec.train, spec.ranks
        self.plan = plan_training(spec.data_loader, spec.train)
        options = spec.draft.options
        self.losses, self.hidden_loss_weight = loss_weights(options.loss_fn), options.hidden_loss_weight
        self.step_decay = options.step_decay()
        # What this rank stores of the weights is decided once all are initialised or loaded (`run`).
        self.weights: ReplicatedWeights
        self.optimizers: Optimizers
        self.average: Average | None = None
        if spec.train.activation_checkpointing:
            spec.draft.enable_activation_checkpointing()
        # Frozen heads are cast once to the dtype of the matrix multiplications.
        head, dtype = spec.draft.lm_head.weight, getattr(torch, spec.train.precision.name)
        self.head = None if head.requires_grad else head.to(dtype)
        shared = self.head if spec.target_head.head is head else None
        target_head = spec.target_head.head.to(dtype) if shared is None else shared
        self.target_head = replace(spec.target_head, head=target_head)
        self.progress = Progress()
        self.seconds = 0.0
        """Seconds in steps since this process began or resumed."""
        self.wait_seconds = 0.0
        """Seconds of them spent waiting for tokens and hidden states."""
        self.attempt_tokens = 0
        """Tokens trained on in the same time."""

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one."""
        self._initialise_or_resume()
        self.spec.data_loader.expect(self._remaining_batches())
        checkpoint_time = time.monotonic()
        for step in range(self.progress.step, len(self.plan.steps)):
            if self._stops_early():
                break
            self._step(step)
            epoch_ended = self.progress.step in self.plan.epoch_ends
            if epoch_ended:
                self._validate()
            is_due = time.monotonic() - checkpoint_time > self.train.checkpoint_seconds
            if self.ranks.broadcast_object(is_due) or epoch_ended:
                self._write_checkpoint()
                checkpoint_time = time.monotonic()
        self._save_draft(self.spec.scratch / LAST)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Metrics over all validation batches; an empty dict without validation rows."""
        with self.weights.unsharded():
            own_results = [self._validate_batch(index) for index in self._own_validation()]
        # Summed in the order of the batches, so that the last bit does not depend on which rank computed them.
        results = sorted(itertools.chain(*self.ranks.all_gather_object(own_results)), key=lambda result: result[0])
        if not results:
            return {}
        _, metric_sums, acceptance = results[0]
        for _, other_sums, other_acceptance in results[1:]:
            metric_sums.add(other_sums)
            acceptance.join(other_acceptance)
        return metric_sums.metrics(self.step_decay) | acceptance.metrics()

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _stops_early(self) -> bool:
        """Whether the last `train.early_stopping_patience` validations have not improved on the best."""
        since_best = [end for end in self.plan.epoch_ends if self.progress.best_step < end <= self.progress.step]
        return 0 < self.train.early_stopping_patience <= len(since_best)

    def _own_batches(self, step: int) -> list[list[RowSlice]]:
        """The batches of a step that this rank computes, which can be none. The shares rotate among the ranks."""
        shares = divide(self.plan.steps[step], self.ranks.size)
        share = shares[(self.ranks.rank + step) % self.ranks.size]
        return [batch for batch in divide(share, self.train.gradient_accumulation_steps) if batch]

    def _own_validation(self) -> list[int]:
        """Indices of the validation batches that this rank computes."""
        return list(range(self.ranks.rank, len(self.plan.validation), self.ranks.size))

    def _remaining_batches(self) -> list[list[RowSlice]]:
        """Every batch that this rank will load, in order."""
        batches = []
        for step in range(self.progress.step, len(self.plan.steps)):
            batches += self._own_batches(step)
            if step + 1 in self.plan.epoch_ends:
                batches += [self.plan.validation[index] for index in self._own_validation()]
        return batches

    def _init_sample(self) -> Iterator[PackedBatch]:
        """Training rows for an initialiser, one a batch."""
        loader = self.spec.data_loader
        sample, tokens = [], 0
        for row in loader.split(self.train.validation_ratio)[0]:
            sample.append([RowSlice(row, 0, loader.lengths[row])])
            tokens += loader.lengths[row]
            if tokens > INIT_SAMPLE_TOKENS:
                break
        loader.expect([*sample, *self._remaining_batches()])
        for row_slices in sample:
            yield loader.pack(row_slices, self.spec.device)

    def _step(self, step: int) -> None:
        """Train one optimizer step, from its batches to the updated weights and the metrics."""
        start_time = time.monotonic()
        train, progress, total_steps = self.train, self.progress, len(self.plan.steps)
        lr_factor = rate(step, total_steps, train.warmup_ratio, train.schedule, train.decay_ratio)
        loss, metric_sums, non_finite_rows = self._backward(
            TrainState(step=step, total_steps=total_steps, seed=train.seed)
        )
        self.weights.all_reduce_gradients()
        grad_norm = self.weights.grad_norm()
        if non_finite_rows or not math.isfinite(grad_norm):
            rows = non_finite_rows or [row_slice.row for row_slice in self.plan.steps[step]]
            raise StageError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}, on rows {self.spec.data_loader.name(rows)}",
                "look at these rows' hidden states; if they are finite, lower train.lr or train.max_grad_norm",
            )
        self._stop_if_diverged(step, metric_sums)
        max_norm = train.max_grad_norm
        self.optimizers.step(lr_factor, 1.0 if max_norm is None else min(1.0, max_norm / (grad_norm + 1e-6)))
        progress.step += 1
        if self.average is not None:
            self.average.update(progress.step)
        tokens = sum(row_slice.tokens for row_slice in self.plan.steps[step])
        progress.tokens += tokens
        progress.grad_norm_sum += grad_norm
        progress.metric_sums.add(metric_sums)
        self.seconds += time.monotonic() - start_time
        self.attempt_tokens += tokens
        # Of a prediction of the first position, so that it does not jump with the number of unrolled steps. Over the
        # steps since the last metrics line: a single one may have trained on a few dozen tokens.
        note: dict[str, Any] = {"loss": round(progress.metric_sums.metrics().get("loss_0", 0.0), 2)}
        if progress.best:
            note["acceptance_length"] = round(progress.best["acceptance_length"], 3)
        note["tokens_per_second"] = round(self.attempt_tokens / self.seconds)
        if (waited := self.wait_seconds / self.seconds) >= 0.01:
            note["waiting"] = f"{waited:.0%}"
        if progress.step % train.log_every_steps == 0 or progress.step == total_steps:
            self._log(lr_factor)
        self.spec.report(progress.step, total_steps, note)

    def _stop_if_diverged(self, step: int, metric_sums: MetricSums) -> None:
        watch, factor, predictions = self.progress.watch, self.train.loss_spike_factor, sum(metric_sums.count)
        if not factor or not watch.has_diverged(sum(metric_sums.loss) / predictions if predictions else None, factor):
            return
        rise = step - watch.steps_since_rise(factor)
        # The cause is in that step's rows, or in what the step before learnt from its rows.
        rows = [row_slice.row for each in range(max(0, rise - 1), rise + 1) for row_slice in self.plan.steps[each]]
        raise StageError(
            f"step {step}: median loss {watch.median:.4g} per prediction, {watch.lowest:.4g} at its lowest; "
            f"it rose in step {rise}, on rows {self.spec.data_loader.name(rows)}",
            "lower train.lr; if such rows are to be trained on, raise train.loss_spike_factor, or set it to 0",
        )

    def _backward(self, state: TrainState) -> tuple[float, MetricSums, list[int]]:
        """Compute the gradients of this rank's batches.

        Returns: of all ranks' batches together, the loss, the metric sums, and the rows of batches whose loss is not
        finite.
        """
        loss, metric_sums, non_finite_rows = 0.0, MetricSums.empty(0), []
        batches = self._own_batches(state.step)
        # A batch that is the whole step computes its own supervision.
        supervision = None if batches == [self.plan.steps[state.step]] else self._supervision(state)
        for row_slices in batches:
            start_time = time.monotonic()
            batch = self.spec.data_loader.pack(row_slices, self.spec.device)
            self.wait_seconds += time.monotonic() - start_time
            if supervision is not None:
                batch = replace(batch, anchor_mask=self._source_mask(state.step, row_slices, supervision))
            forward = partial(self._forward, batch, state, supervision)
            predictions, outcome = self.weights.backward(forward, last=row_slices is batches[-1])
            metric_sums.add(MetricSums.of(predictions.valid, outcome))
            batch_loss = outcome.loss.item()
            loss += batch_loss
            if not math.isfinite(batch_loss):
                non_finite_rows += batch.rows
        if not batches:
            self.weights.backward_without_batch()
        results = self.ranks.all_gather_object((loss, metric_sums, non_finite_rows))
        losses, sums_by_rank, rows_by_rank = zip(*results, strict=True)
        total_sums = MetricSums.empty(0)
        for rank_sums in sums_by_rank:
            total_sums.add(rank_sums)
        return sum(losses), total_sums, list(itertools.chain(*rows_by_rank))

    def _supervision(self, state: TrainState) -> Supervision:
        """The supervision of a whole step, which follows from its loss masks; no hidden states are loaded."""
        row_slices, device = self.plan.steps[state.step], self.spec.device
        loss_mask = torch.cat([self.spec.data_loader.mask(row_slice) for row_slice in row_slices]).to(device)
        batch = PackedBatch(
            rows=[row_slice.row for row_slice in row_slices],
            lengths=[row_slice.end for row_slice in row_slices],  # from 0: tokens before `begin` are context
            token_ids=torch.zeros_like(loss_mask, dtype=torch.int64),
            loss_mask=loss_mask,
            hidden_states=torch.empty(len(loss_mask), 0, 0, device=device),
            last_hidden_states=torch.empty(0, 0, device=device),
            last_index=torch.zeros_like(loss_mask, dtype=torch.int64),
        )
        return self.draft.supervision(batch, state)

    def _source_mask(self, step: int, row_slices: list[RowSlice], supervision: Supervision) -> torch.Tensor:
        """The positions of some row slices, context included, that the step's predictions may start from, bool [T]."""
        own_slices, all_slices = set(row_slices), self.plan.steps[step]
        masks = supervision.source_mask.split([row_slice.end for row_slice in all_slices])
        return torch.cat([mask for mask, row_slice in zip(masks, all_slices, strict=True) if row_slice in own_slices])

    def _forward(
        self, batch: PackedBatch, state: TrainState | None = None, supervision: Supervision | None = None
    ) -> tuple[Predictions, Outcome]:
        """Predictions and loss of a batch; `supervision` of the whole step, if the batch is a part of it."""
        with self._autocast():
            predictions = self.draft(batch, state)
            head = self.draft.lm_head.weight if self.head is None else self.head
            # The last layer's hidden states are kept where they are needed: from positions to rows of them.
            outcome = distill(
                replace(predictions, target_index=batch.last_index[predictions.target_index]),
                batch.last_hidden_states, head, self.target_head, self.losses,
                counts=None if supervision is None else supervision.counts, hidden_loss_weight=self.hidden_loss_weight,
            )  # fmt: skip
            return predictions, outcome

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.train.precision is Dtype.float32:
            return nullcontext()
        return torch.autocast(self.spec.device.type, getattr(torch, self.train.precision.name))

    def _validate_batch(self, index: int) -> tuple[int, MetricSums, AcceptanceCounts]:
        """Metric sums and acceptance counts of a validation batch, after its index."""
        batch = self.spec.data_loader.pack(self.plan.validation[index], self.spec.device)
        predictions, outcome = self._forward(batch)
        acceptance = AcceptanceCounts.empty(len(predictions.valid))
        # A token outside the draft vocabulary is rejected, whatever is most likely within it.
        in_vocabulary = next_token_in_vocabulary(batch, self.draft.vocabulary)[predictions.target_index]
        accepted = correct_so_far(predictions.valid & outcome.correct & in_vocabulary)
        acceptance.add(predictions.target_index[0].tolist(), accepted)
        return index, MetricSums.of(predictions.valid, outcome), acceptance

    def _validate(self) -> None:
        """Validate after an epoch, log the metrics, and save the best draft and each `save_every_epochs`-th."""
        progress, save_every = self.progress, self.train.save_every_epochs
        with self._averaged_weights():
            metrics = self.validate()
        epoch = self.plan.epoch_ends.index(progress.step) + 1
        if metrics:
            self._write_metrics({"step": progress.step, "epoch": epoch, "validation": metrics})
        if not metrics or not progress.best or metrics["acceptance_length"] > progress.best["acceptance_length"]:
            progress.best, progress.best_step = metrics, progress.step
            if metrics or progress.step == len(self.plan.steps):  # without validation, the last draft is the best
                self._save_draft(self.spec.scratch / BEST)
        if save_every and epoch % save_every == 0:
            self._save_draft(self.spec.scratch / EPOCHS / str(epoch))

    def _save_draft(self, directory: Path) -> None:
        """Write the draft's checkpoint, of averaged weights if there are any, completely or not at all."""
        with self._averaged_weights():
            state_dict = self.weights.full_state_dict()
            if not self.ranks.first:
                return
            temporary = self.spec.scratch / "draft.new"
            shutil.rmtree(temporary, ignore_errors=True)
            self.draft.save(temporary, self.spec.save_dtype, state_dict)
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(exist_ok=True)
        temporary.rename(directory)

    def _log(self, lr_factor: float) -> None:
        """Write a metrics line of the steps since the last one."""
        progress = self.progress
        steps = (progress.step - 1) % self.train.log_every_steps + 1
        line = {"step": progress.step, "tokens": progress.tokens, "lr": self.train.lr * lr_factor}
        line |= {"grad_norm": progress.grad_norm_sum / steps} | progress.metric_sums.metrics(self.step_decay)
        self._write_metrics(line)
        progress.metric_sums, progress.grad_norm_sum = MetricSums.empty(0), 0.0

    def _write_metrics(self, line: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        with (self.spec.scratch / METRICS).open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            self.progress.metrics_bytes = file.tell()
        self.spec.trackers.log(line)

    def _write_checkpoint(self) -> None:
        generators = self.ranks.all_gather_object(self._generator_states())
        tensors: dict[str, torch.Tensor] = {f"draft.{name}": p for name, p in self.weights.local.items()}
        tensors |= {f"fitted.{name}": t for name, t in self.draft.fitted_tensors().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizers.state().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.averages.items()}
        for rank, generator_states in enumerate(generators):
            tensors |= {f"random.{rank}.{name}": state for name, state in generator_states.items()}
        tensors = self.weights.checkpoint_tensors(tensors)
        checkpoint.seal(self.spec.scratch, self.progress.step, tensors, asdict(self.progress), self.ranks)

    def _generator_states(self) -> dict[str, torch.Tensor]:
        generator_states = {"cpu": torch.get_rng_state()}
        if self.spec.device.type == "cuda":
            generator_states["cuda"] = torch.cuda.get_rng_state(self.spec.device)
        return generator_states

    def _initialise_or_resume(self) -> None:
        """Continue from the newest checkpoint, or initialise. Rank 0 alone verifies checkpoints, for all ranks."""
        scratch = self.spec.scratch
        directory = self.ranks.broadcast_object(checkpoint.newest(scratch) if self.ranks.first else None)
        torch.manual_seed(self.train.seed)
        if directory is None:
            if self.ranks.first:
                (scratch / METRICS).write_bytes(b"")
                if self.draft.options.init is Init.induction:
                    induction.initialise(self.draft, self._init_sample(), self.train.seed)
            tensors = [p.data for p in self.draft.parameters()] + list(self.draft.fitted_tensors().values())
            self.ranks.broadcast(tensors, [0] * len(tensors))
            self._distribute_weights()
            return
        self._distribute_weights()
        tensors_by_name, state = checkpoint.read_checkpoint(directory, *self.weights.shard)
        state |= {"metric_sums": MetricSums(**state["metric_sums"]), "watch": LossWatch(**state["watch"])}
        self.progress = Progress(**state)
        if self.ranks.first:
            os.truncate(scratch / METRICS, self.progress.metrics_bytes)
        with torch.no_grad():
            for name, p in self.weights.local.items():
                p.copy_(tensors_by_name[f"draft.{name}"])
            for name, t in self.draft.fitted_tensors().items():
                t.copy_(tensors_by_name[f"fitted.{name}"])
        self.optimizers.load(_with_prefix("optimizer.", tensors_by_name))
        if self.average is not None:
            self.average.load(_with_prefix("average.", tensors_by_name))
        generators = _with_prefix(f"random.{self.ranks.rank}.", tensors_by_name)  # none on a rank that is new
        if "cpu" in generators:
            torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and self.spec.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], self.spec.device)

    def _distribute_weights(self) -> None:
        """Shard or replicate the weights, with the optimizers' state and the average."""
        self.weights = trained_weights(self.draft, self.train, self.ranks, self.spec.device)
        self.optimizers = self.weights.optimizers(self.train)
        if self.train.ema > 0:
            self.average = Average(self.weights.local, self.train.ema)


def _with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
