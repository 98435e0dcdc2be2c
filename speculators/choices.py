"""What options choose from, apart from what formats and devices there are; the options are in `config`."""

from __future__ import annotations

import enum


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
    """Warm-up, stable, decay: constant, and falling to 0 over the last `cooldown` of the steps."""


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
