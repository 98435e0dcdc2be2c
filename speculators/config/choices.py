"""Enumerations: the values that options of `schema` choose from. Those of draft options are in `algorithms`."""

from __future__ import annotations

import enum


class Dtype(enum.Enum):
    """Floating-point formats by the names that torch and vLLM use."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class HiddenStatesDtype(enum.Enum):
    """Formats in which hidden states are stored."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8_e4m3fn = "float8_e4m3fn"
    """Half the size of bfloat16: e4m3 with one scale per token and layer; see `features.encoding`."""


class LastLayerPositions(enum.Enum):
    """Positions whose last-layer hidden state is stored. The target's logits, the training signal, follow from it."""

    auto = "auto"
    """`everywhere` with `train.train_on_prompts`, else `answers`."""
    answers = "answers"
    """Positions that predict a token of an answer."""
    everywhere = "everywhere"
    """All positions."""


class DataFormat(enum.Enum):
    """Forms of a dataset's rows. Lists of messages may be in any column that `messages_field` names, or in one of the
    usual ones, with either pair of names; the file may be JSON (a list or lines), CSV, Parquet or Arrow."""

    sharegpt = "sharegpt"
    """`{"conversations": [{"from", "value"}]}`."""
    messages = "messages"
    """`{"messages": [{"role", "content"}]}`, as OpenAI's API has them: with `tool_calls`, `reasoning_content`."""
    prompts = "prompts"
    """A prompt in `prompt_field`: a text, or a list of messages. Answers are not read."""
    question_answer = "question_answer"
    """A prompt in `prompt_field`, and its answer in `answer_field`."""
    alpaca = "alpaca"
    """`{"instruction", "input", "output"}`; `input` follows the instruction after an empty line."""
    tokens = "tokens"
    """`{"input_ids", "loss_mask"}`: rows of this target's token ids, for `pipeline=off_policy`."""
    upstream = "upstream"
    """A directory that the PyPI package speculators 0.9 wrote: rows and hidden states, for `pipeline=upstream`."""


class Connector(enum.Enum):
    """KV connectors that export hidden states from vLLM."""

    native = "native"
    """`engine.connector`: on CPUs and accelerators, only for requests that ask for it, and written atomically."""
    example = "example"
    """vLLM's ExampleHiddenStatesConnector, upstream's `file` backend. Needs an accelerator; exports the hidden states
    of every request."""
    fp8 = "fp8"
    """FP8HiddenStatesConnector of the package hs-connectors, like `example`, in float8 with one scale per token, read
    as bfloat16. Coarser than `extract.dtype=float8_e4m3fn`, which has one scale per token and layer."""
    mooncake = "mooncake"
    """MooncakeHiddenStatesConnector of hs-connectors, like `example`, but over the network into the Mooncake store of
    `serve.mooncake` instead of a shared directory. Needs the extra `mooncake`."""


class Device(enum.Enum):
    """Devices that tensors are on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExecutorName(enum.Enum):
    """Executors: what starts the workers of stages."""

    local = "local"
    """Subprocesses on this machine."""
    submitit = "submitit"
    """submitit jobs on this machine, which use the same code as Slurm jobs."""
    slurm = "slurm"
    """Jobs of a Slurm cluster, through submitit."""
    ray = "ray"
    """Tasks of the Ray cluster at `executor.address`."""


class Optimizer(enum.Enum):
    """Optimizers. `muon` orthogonalizes the updates of matrices, and uses AdamW for all other parameters."""

    adamw = "adamw"
    muon = "muon"


class LrSchedule(enum.Enum):
    """Course of the learning rate after the warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"
    """Warm-up, stable, decay: constant, then falling to 0 over the last `decay_ratio` of the steps."""


class Packing(enum.Enum):
    """Algorithms that pack training rows into batches."""

    best_fit = "best_fit"
    """Best fit: each row, in random order, goes into the fullest batch that has space. Few batches, some short."""
    lpt = "lpt"
    """Longest processing time first: each row, longest first, goes into the emptiest batch. Similar batch lengths."""


class Tracker(enum.Enum):
    """Experiment trackers. Each needs the extra of its name: `pip install -e '.[wandb]'` in a checkout."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"


class LeadingAnswer(enum.Enum):
    """Handling of a conversation that opens with the assistant."""

    trim = "trim"
    """Begin with the first message of the user; system messages stay."""
    keep = "keep"
    """Keep the answer as context, which is not supervised. Many chat templates refuse such a conversation."""
    drop = "drop"


class OnDamage(enum.Enum):
    """Handling of a data file of which more is lost than single rows, since the next row cannot be found."""

    auto = "auto"
    """`report` for a file that only lacks the end of its last row, else `error`."""
    report = "report"
    """Use the rows that can be read, and report how many bytes were not."""
    error = "error"


class OnBadRow(enum.Enum):
    """Handling of a row whose hidden states are not finite, incomplete, or of other tokens."""

    error = "error"
    skip = "skip"
    """Leave the row out and record the reason. Too many of them are still an error."""


class Sampling(enum.Enum):
    """Where the sampling options of a stage's requests come from."""

    recipe = "recipe"
    """The stage's options."""
    model = "model"
    """The target's generation_config.json, as vLLM serves it by default: what it lacks has vLLM's defaults, a
    temperature of 1 among them. Its limit of new tokens is not used."""


class OnFault(enum.Enum):
    """Handling of an answer that is cut, loops or is empty; see `data.answer_faults`."""

    keep = "keep"
    """Train on it, and continue the conversation."""
    mask = "mask"
    """Train on none of it, of a looping answer on what precedes the repetition, and continue the conversation."""
    end = "end"
    """End the conversation: with this answer, of which the repetition is not trained on; before it, if it is empty."""
    drop = "drop"
    """Leave the conversation out."""
