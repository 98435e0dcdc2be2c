"""What options choose from; the options themselves are in `config`, those of drafts in `algorithms`."""

from __future__ import annotations

import enum


class Dtype(enum.Enum):
    """Floating-point formats by the names that torch and vLLM use."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class StatesDtype(enum.Enum):
    """What hidden states are stored in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8_e4m3fn = "float8_e4m3fn"
    """Half the bytes of bfloat16: e4m3 with a scale for every token and layer; see `features.encoding`."""


class LastState(enum.Enum):
    """Where the state that leaves the target's last layer is kept, by which a draft learns what the target says."""

    auto = "auto"
    """`everywhere` with `train.train_on_prompts`, else `answers`."""
    answers = "answers"
    """Where a token of an answer is predicted."""
    everywhere = "everywhere"


class DataFormat(enum.Enum):
    """How one file of a data set is written."""

    sharegpt = "sharegpt"
    """A JSON list of `{"id", "conversations": [{"from", "value"}]}`; may be cut off."""
    messages = "messages"
    """JSON lines of `{"id", "messages": [{"role", "content"}]}`."""
    prompts = "prompts"
    """JSON lines, plain or gzip, with the prompt in `prompt_field` and an id in `id_field`."""
    upstream = "upstream"
    """A directory of the PyPI package speculators 0.9, with rows and hidden states; for `pipeline=upstream`."""


class Connector(enum.Enum):
    """What hands hidden states out of vLLM."""

    native = "native"
    """`engine.connector`: on CPUs and accelerators, for the requests that ask, whole or not at all."""
    example = "example"
    """vLLM's ExampleHiddenStatesConnector, which is upstream's `file` backend. Needs an accelerator; it writes the
    states of every request."""
    fp8 = "fp8"
    """The package hs-connectors' FP8HiddenStatesConnector, as `example`; float8 with one scale a token over all
    layers, read as bfloat16. Coarser than `extract.dtype=float8_e4m3fn`, which has a scale for every layer."""
    mooncake = "mooncake"
    """hs-connectors' MooncakeHiddenStatesConnector: as `example`, but into the Mooncake store of `serve.mooncake`, by
    way of a network instead of a shared directory. Wants the extra `mooncake`."""


class Device(enum.Enum):
    """Where tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExecutorName(enum.Enum):
    """What starts the workers."""

    local = "local"
    """Subprocesses of this machine."""
    submitit = "submitit"
    """Jobs of submitit on this machine, through the same code as a cluster's."""
    slurm = "slurm"
    """Jobs of a Slurm cluster, through submitit."""
    ray = "ray"
    """Tasks of the Ray cluster at `executor.address`."""


class Optimizer(enum.Enum):
    """`muon` orthogonalises the updates of the matrices and leaves the rest to AdamW."""

    adamw = "adamw"
    muon = "muon"


class Schedule(enum.Enum):
    """What the learning rate does after the warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"
    """Warm-up, stable, decay: constant, and falling to 0 over the last `decay_ratio` of the steps."""


class Packing(enum.Enum):
    """How training rows become batches."""

    best_fit = "best_fit"
    """Each row, as drawn, into the fullest batch that has room: few batches, some of them short."""
    lpt = "lpt"
    """The longest row first, each where there is least: about as many batches, of about equal length."""


class Tracker(enum.Enum):
    """Programs that show metrics. Each wants the extra of its name: `pip install 'speculators-run[wandb]'`."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"


class OnDamage(enum.Enum):
    """What to do with a data file that ends in the middle of a row."""

    report = "report"
    error = "error"


class OnBadRow(enum.Enum):
    """What to do with a row whose hidden states cannot be used: they are not finite, not whole, or of other tokens."""

    error = "error"
    skip = "skip"
    """Leave it out, with its reason. Too many of them are an error still."""
