"""What is wrong with a recipe, as far as its values tell: constraints of single options, and options that do not fit.

The constraints stand beside the fields (`schema`, `algorithms`). What also depends on the graph, on the target's files
or on this machine is in `runner.planning.checks`.
"""

from __future__ import annotations

from collections.abc import Iterator

from speculators.config.algorithms import SPECULATORS, Speculator, loss_weights
from speculators.config.fields import as_override, violations
from speculators.config.schema import Config
from speculators.errors import RecipeError


def check(config: Config) -> None:
    """Refuse a recipe that cannot run.

    Raises:
        RecipeError: names the option, its value, and what to give instead.
    """
    if type(config.speculator) is Speculator:
        raise RecipeError(
            f"speculator.algorithm={config.speculator.algorithm}: there is no such algorithm",
            f"one of {', '.join(SPECULATORS)}",
        )
    for name, value, text, default in violations(config):
        hint = f"{name}={as_override(default)}"
        raise RecipeError(f"{name}={as_override(value)}: {text}", f"for example {hint}, which is the default")
    loss_weights(config.speculator.loss_fn)
    for holds, wrong, hint in _combinations(config):
        if not holds:
            raise RecipeError(wrong, hint)
    _refuse_secrets(config)


def _combinations(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Options that have to fit each other: (they do, what is wrong, what to give instead)."""
    answer, longest = config.regenerate.max_tokens, config.max_seq_len
    yield (
        answer < longest,
        f"regenerate.max_tokens={answer}: leaves no room for a prompt in max_seq_len={longest}",
        f"regenerate.max_tokens={longest // 2}, or max_seq_len={2 * answer}",
    )
    if not config.prompts.eval_holdout_ratio:
        both = [name for name in config.evaluate.datasets if name in config.data]
        yield (
            not both,
            f"prompts.eval_holdout_ratio=0: `{both[0] if both else ''}` is trained on and is in evaluate.datasets, and "
            "nothing of it is held out",
            "prompts.eval_holdout_ratio=0.05, or take it out of evaluate.datasets",
        )
    options = {f"data.{name}": dataset for name, dataset in config.data.items()}
    options |= {f"evaluate.datasets.{name}": dataset for name, dataset in config.evaluate.datasets.items()}
    for name, dataset in options.items():
        yield (
            dataset.max_chars is None or dataset.min_chars <= dataset.max_chars,
            f"{name}.max_chars={dataset.max_chars}: is below {name}.min_chars={dataset.min_chars}",
            f"{name}.max_chars=null, or {name}.min_chars=1",
        )
    yield from config.speculator.check()


def _refuse_secrets(config: Config) -> None:
    """A recipe is written into run directories, so it names the variables that hold secrets and never holds one."""
    holds_one = {
        "serve.url": "@" in config.serve.url,
        "serve.extra_urls": any("@" in url for url in config.serve.extra_urls),
        "serve.extra_args": any(word.startswith(("--api-key", "--hf-token")) for word in config.serve.extra_args),
    }
    for name, holds in holds_one.items():
        if holds:
            hint = "export the key, and name the variable that holds it: serve.api_key_env=NAME; for a hub, HF_TOKEN"
            raise RecipeError(f"{name} holds a secret, and recipes are written down", hint)
