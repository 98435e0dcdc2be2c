"""What a type cannot say of a recipe: which values an option takes, and which options fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from speculators.config.algorithms import SPECULATORS, DFlash, Eagle3, Loss, Speculator, Weighting, loss_weights
from speculators.config.schema import Config, Train
from speculators.errors import RecipeError


def check(config: Config) -> None:
    """Refuse a recipe that cannot run.

    Raises:
        RecipeError: names the option, and what to give instead.
    """
    _check_values(config)
    _refuse_secrets(config)


def _check_values(config: Config) -> None:
    """What a type cannot say. One check per line, each naming the field."""
    train, evaluate = config.train, config.evaluate
    loss_weights(config.speculator.loss_fn)
    checks = (
        (
            type(config.speculator) is not Speculator,
            "speculator.algorithm",
            "has no schema",
            f"one of {', '.join(SPECULATORS)}",
        ),
        (
            0 <= config.prompts.eval_holdout_ratio < 1,
            "prompts.eval_holdout_ratio",
            "is a share of the conversations, from 0 to 1",
            "for example 0.05",
        ),
        (
            config.regenerate.max_tokens < config.max_seq_len,
            "regenerate.max_tokens",
            "leaves no room for a prompt in max_seq_len",
            f"below {config.max_seq_len}",
        ),
        (
            config.speculator.num_speculative_tokens > 0,
            "speculator.num_speculative_tokens",
            "must be positive",
            "for example 3",
        ),
        (
            all(c > 0 for c in evaluate.concurrency) and bool(evaluate.concurrency),
            "evaluate.concurrency",
            "holds positive numbers",
            "for example [1]",
        ),
        (config.max_seq_len > 1, "max_seq_len", "must be at least 2", "for example 2048"),
        (evaluate.num_prompts > 0, "evaluate.num_prompts", "must be positive", "for example 32"),
        *_checks_of_train(train),
        *_checks_of_draft(config.speculator),
        *(_checks_of_dflash(config.speculator) if isinstance(config.speculator, DFlash) else ()),
        *(_checks_of_eagle3(config.speculator) if isinstance(config.speculator, Eagle3) else ()),
    )
    for holds, name, wrong, hint in checks:
        if not holds:
            raise RecipeError(f"{name} {wrong}", hint)


def _checks_of_train(train: Train) -> Iterator[tuple[bool, str, str, str]]:
    """(holds, field, what is wrong, how to mend it), as `_check_values` has them."""
    for name, example in (
        ("epochs", "6"),
        ("lr", "1e-3"),
        ("batch_tokens", "2048"),
        ("gradient_accumulation_steps", "1"),
    ):
        yield getattr(train, name) > 0, f"train.{name}", "must be positive", f"for example {example}"
    yield train.num_processes > 0, "train.num_processes", "must be positive", "1 takes the stage's own process"
    whole = "leave it out for all steps of the epochs"
    yield train.max_steps is None or train.max_steps > 0, "train.max_steps", "must be positive", whole
    for name in ("early_stopping_patience", "save_every_epochs"):
        yield getattr(train, name) >= 0, f"train.{name}", "must not be negative", "0 leaves it off"
    for name, example in (("warmup_ratio", "0.01"), ("ema", "0.999")):
        yield (
            0 <= getattr(train, name) < 1, f"train.{name}", "is a share, from 0 to below 1", f"for example {example}"
        )  # fmt: skip
    often = "is how many times the lowest loss is too much: above 1, or 0 for never"
    yield train.loss_spike_factor == 0 or train.loss_spike_factor > 1, "train.loss_spike_factor", often, "for example 5"
    yield 0 <= train.decay_ratio <= 1, "train.decay_ratio", "is a share of the steps, from 0 to 1", "for example 0.2"
    share = "is a share of the conversations, from 0 to below 1"
    yield 0 <= train.validation_ratio < 1, "train.validation_ratio", share, "for example 0.1"


def _checks_of_draft(options: Speculator) -> Iterator[tuple[bool, str, str, str]]:
    """(holds, field, what is wrong, how to mend it), as `_check_values` has them."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        given = getattr(options, name)
        yield given is None or given > 0, f"speculator.{name}", "must be positive", "leave it out for the target's"
    yield options.hidden_loss_weight >= 0, "speculator.hidden_loss_weight", "must not be negative", "0 leaves it off"


def _checks_of_eagle3(options: Eagle3) -> Iterator[tuple[bool, str, str, str]]:
    """(holds, field, what is wrong, how to mend it), as `_check_values` has them."""
    yield (
        not (options.fc_norm and options.norm_before_fc),
        "speculator.fc_norm",
        "and norm_before_fc exclude each other",
        "add speculator.norm_before_fc=false",
    )
    yield (options.ttt_steps > 0, "speculator.ttt_steps", "must be positive", "for example 3")


def _checks_of_dflash(options: DFlash) -> Iterator[tuple[bool, str, str, str]]:
    """(holds, field, what is wrong, how to mend it), as `_check_values` has them."""
    yield (
        options.weighting is not Weighting.dpace or loss_weights(options.loss_fn) in ({Loss.ce: 1.0}, {Loss.nla: 1.0}),
        "speculator.weighting",
        "dpace takes the cross-entropy for the draft's confidence, or the likelihood of acceptance",
        "set speculator.loss_fn=ce, speculator.loss_fn=nla or speculator.weighting=decay",
    )
    yield (options.max_anchors > 0, "speculator.max_anchors", "must be positive", "for example 512")
    yield (options.decay_gamma > 0, "speculator.decay_gamma", "must be positive", "for example 4")
    yield (0 <= options.dpace_alpha <= 1, "speculator.dpace_alpha", "is a share, from 0 to 1", "for example 0.5")
    yield (options.target_layers > 0, "speculator.target_layers", "must be positive", "for example 5")
    yield (
        options.sliding_window is None or options.sliding_window > 0,
        "speculator.sliding_window",
        "must be positive",
        "null for the whole document",
    )


def _refuse_secrets(config: Config) -> None:
    """A recipe is written into run directories, so it names the variables that hold secrets and never holds one."""
    told = {
        "serve.url": "@" in config.serve.url,
        "serve.extra_urls": any("@" in url for url in config.serve.extra_urls),
        "serve.extra_args": any(word.startswith(("--api-key", "--hf-token")) for word in config.serve.extra_args),
    }
    for name, holds in told.items():
        if holds:
            hint = "export the key, and name the variable that holds it: serve.api_key_env=NAME; for a hub, HF_TOKEN"
            raise RecipeError(f"{name} holds a secret, and recipes are written down", hint)
