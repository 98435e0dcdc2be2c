"""Check the values of a recipe: constraints of single options, and combinations of options.

Constraints are defined with the fields (`schema`, `algorithms`). Checks that also depend on the graph, on the target's
files or on this machine are in `runner.planning.checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from speculators.config.algorithms import SPECULATORS, Speculator, loss_weights
from speculators.config.choices import Sampling
from speculators.config.fields import MISSING, as_override, server_address, violations
from speculators.config.schema import Config, Regenerate, Serve
from speculators.errors import RecipeError, closest
from speculators.job import file_name
from speculators.packages import install_command, installed_version

MAX_NAME = 200
"""Most bytes of a dataset's name in the name of a file; file systems allow 255 with what is added to it."""

SET_BY_RECIPE = {
    "model": "target.source",
    "dtype": "target.dtype",
    "trust-remote-code": "target.trust_remote_code",
    "max-model-len": "max_seq_len",
    "port": "serve.port",
    "max-num-seqs": "serve.max_num_seqs",
    "enforce-eager": "serve.enforce_eager",
    "kv-cache-memory-bytes": "serve.kv_cache_gib",
    "gpu-memory-utilization": "serve.gpu_memory_utilization",
    "tensor-parallel-size": "serve.tensor_parallel",
    "pipeline-parallel-size": "serve.pipeline_parallel",
    "data-parallel-size": "serve.data_parallel",
    "kv-transfer-config": "extract.connector",
    "speculative-config": "speculator.num_speculative_tokens",
    "tool-call-parser": "serve.tool_call_parser",
    "enable-auto-tool-choice": "serve.tool_call_parser",
    "reasoning-parser": "serve.reasoning_parser",
    "config": "serve.extra_args",
    **dict.fromkeys(("host", "served-model-name", "generation-config", "enable-log-requests", "uvicorn-log-level",
                     "enable-prefix-caching", "enable-chunked-prefill", "distributed-executor-backend",
                     "scheduler-cls"), ""),
}  # fmt: skip
"""Arguments of vLLM that the recipe determines, each with its option, empty if none has it alone. As a further argument
it would replace the recipe's, which keys hold."""
SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size",
         "-sc": "speculative-config"}  # fmt: skip
"""Short names of arguments in SET_BY_RECIPE."""
LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "joblib"),
    "submitit_local": ("hydra-submitit-launcher", "sweep-slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "sweep-slurm"),
    "ray": ("hydra-ray-launcher", "sweep-ray"),
}
"""Launchers of sweeps: the distribution that contains each, and the extra that installs it."""

OF_THE_MODEL = ("temperature", "temperatures", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
"""Options that `sampling: model` takes from the target."""


def check_config(config: Config) -> None:
    """Refuse a recipe that cannot run.

    Raises:
        RecipeError: an option has a wrong value; the hint has a right one.
    """
    if type(config.speculator) is Speculator:
        raise RecipeError(
            f"speculator.algorithm={config.speculator.algorithm}: there is no such algorithm",
            f"one of {', '.join(SPECULATORS)}",
        )
    chosen = config.speculator
    if not all(hasattr(chosen, f.name) for f in dataclasses.fields(chosen)):
        raise RecipeError(
            f"speculator.algorithm={chosen.algorithm}: the section has the options of another algorithm",
            f"choose the algorithm by speculator={chosen.algorithm}, or `override /speculator: {chosen.algorithm}`",
        )
    _refuse_secrets(config)  # first, since the other errors repeat values
    for name, value, text, default in violations(config):
        hint = f"for example {name}={as_override(default)}, which is the default"
        if default == MISSING:
            hint = f"{name}=PATH, or a source on the hub"
        raise RecipeError(f"{name}={as_override(value)}: {text}", hint)
    loss_weights(config.speculator.loss_fn)
    for valid, error, hint in _combinations(config):
        if not valid:
            raise RecipeError(error, hint)
    _check_extra_args(config)


def pipeline_nodes(nodes: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Check the types of the pipeline's nodes; leaves out nodes and inputs that are null.

    Raises:
        RecipeError: a node is not a mapping of inputs to names of nodes.
    """
    kept: dict[str, dict[str, str]] = {}
    for name, inputs in nodes.items():
        wiring = {} if inputs is None else inputs
        if not isinstance(wiring, dict) or not all(isinstance(node, str | None) for node in wiring.values()):
            raise RecipeError(
                f"pipeline.{name} is {inputs!r}: must be a mapping of its inputs to the names of nodes",
                f"pipeline.{name}={{INPUT: NODE}}; null removes a node or an input",
            )
        if inputs is not None:
            kept[name] = {slot: node for slot, node in wiring.items() if node is not None}
    return kept


def _combinations(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Check combinations of options; yields (whether they are valid, error, hint)."""
    answer, longest = config.answer_limit(), config.max_seq_len
    yield (
        answer < longest,
        f"regenerate.max_tokens={answer}: leaves no room for a prompt in max_seq_len={longest}",
        f"regenerate.max_tokens={longest // 2}, or max_seq_len={2 * answer}",
    )
    yield from _sampling(config)
    supervised = config.tokenize.min_supervised
    yield (
        supervised <= longest,
        f"tokenize.min_supervised={supervised}: no row has more tokens than max_seq_len={longest}",
        "tokenize.min_supervised=1",
    )
    for name, dataset in config.evaluate.datasets.items():
        yield (
            dataset == config.data.get(name, dataset),
            f"evaluate.datasets.{name}: differs from data.{name}, and stages know a dataset by its name",
            f"give it another name; or evaluate.datasets=[{name}], for the evaluation hold-out of data.{name}",
        )
    if not config.prompts.eval_holdout_ratio:
        both = [name for name in config.evaluate.datasets if name in config.data]
        yield (
            not both,
            f"prompts.eval_holdout_ratio=0: `{both[0] if both else ''}` is trained on and is in evaluate.datasets, and "
            "has no evaluation hold-out",
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
    tokens, max_tokens = config.evaluate.num_speculative_tokens, config.speculator.max_tokens()
    yield (
        bool(config.evaluate.draft) or max_tokens is None or max(tokens, default=0) <= max_tokens,
        f"evaluate.num_speculative_tokens={tokens}: must be at most {max_tokens}, what a step of "
        f"speculator={config.speculator.algorithm} proposes",
        f"evaluate.num_speculative_tokens=[{max_tokens}]",
    )
    for name in {**config.data, **config.evaluate.datasets}:
        yield (
            0 < len(file_name(name)) <= MAX_NAME,
            f"dataset `{name[:40]}`: its name, which names files, must have 1 to {MAX_NAME} bytes",
            "give the dataset a short name",
        )
    yield from config.speculator.check()
    yield from _sharing_servers(config.serve)
    yield from _external_pair(config.serve, config.evaluate.num_speculative_tokens)


def _sharing_servers(serve: Serve) -> Iterator[tuple[bool, str, str]]:
    """Check the running servers that share the work; yields as `_combinations`."""
    others = serve.extra_urls
    yield (
        bool(serve.url) or not others,
        f"serve.extra_urls={as_override(others)}: there is no serve.url that they share the work with",
        f"serve.url={next(iter(others), '')} serve.extra_urls=[]",
    )
    first = {server_address(url): url for url in reversed([serve.url, *others])}
    different = [url for url in reversed(first.values()) if url != serve.url]
    yield (
        len(different) == len(others),
        f"serve.extra_urls={as_override(others)}: names a server twice, or that of serve.url",
        f"serve.extra_urls={as_override(different)}",
    )


def _external_pair(serve: Serve, counts: list[int]) -> Iterator[tuple[bool, str, str]]:
    """Check the running servers of `evaluate`; yields as `_combinations`."""
    baseline, speculative = serve.baseline_url.rstrip("/"), serve.speculative_url.rstrip("/")
    one, other = ("baseline", "speculative") if baseline else ("speculative", "baseline")
    yield (
        bool(baseline) == bool(speculative),
        f"serve.{one}_url={baseline or speculative}: `evaluate` compares two servers, and serve.{other}_url is empty",
        f"serve.{one}_url='', for servers that `evaluate` starts; or name the server of the other side",
    )
    yield (
        not baseline or server_address(baseline) != server_address(speculative),
        f"serve.speculative_url={speculative}: is the server of serve.baseline_url, which would be compared to itself",
        "name two servers, with and without the draft; or serve.baseline_url='' serve.speculative_url='', for servers "
        "that `evaluate` starts",
    )
    yield (
        not speculative or len(counts) < 2,
        f"evaluate.num_speculative_tokens={counts}: the server of serve.speculative_url proposes one number of tokens",
        "evaluate.num_speculative_tokens=[]; or serve.baseline_url='' serve.speculative_url='', for servers that "
        "`evaluate` starts",
    )


def _refuse_secrets(config: Config) -> None:
    """Refuse a secret in a recipe, which is written into run directories; a recipe names the variable that holds it."""
    contains_secret = {
        "serve.url": "@" in config.serve.url,
        "serve.baseline_url": "@" in config.serve.baseline_url,
        "serve.speculative_url": "@" in config.serve.speculative_url,
        "serve.extra_urls": any("@" in url for url in config.serve.extra_urls),
        "serve.extra_args": any(_long_name(a) in ("api-key", "hf-token") for a in config.serve.extra_args),
    }
    for name, contains in contains_secret.items():
        if contains:
            hint = "export the key, and name its variable: serve.api_key_env=NAME; for the Hugging Face hub, HF_TOKEN"
            raise RecipeError(f"{name} contains a secret, and recipes are written into run directories", hint)


def _sampling(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Check options of sampling against each other, as `_combinations`."""
    options = config.regenerate
    temperatures, weights = options.temperatures, options.temperature_weights
    yield (
        not weights or len(weights) == len(temperatures),
        f"regenerate.temperature_weights={as_override(weights)}: there are {len(temperatures)} temperatures",
        "one weight for each of regenerate.temperatures, or regenerate.temperature_weights=[]",
    )
    yield (
        not temperatures or options.temperature == Regenerate().temperature,
        f"regenerate.temperature={options.temperature}: regenerate.temperatures takes its place",
        f"regenerate.temperature={Regenerate().temperature}, or regenerate.temperatures=[]",
    )
    for section in (options, config.evaluate):
        if section.sampling is Sampling.model:
            prefix = type(section).__name__.lower()
            for name in OF_THE_MODEL:
                default, value = getattr(type(section)(), name, None), getattr(section, name, None)
                yield (
                    value == default,
                    f"{prefix}.{name}={as_override(value)}: {prefix}.sampling=model takes it from the target",
                    f"{prefix}.sampling=recipe, or {prefix}.{name}={as_override(default)}",
                )


def _check_extra_args(config: Config) -> None:
    """Refuse arguments of vLLM that the recipe determines."""
    for argument in config.serve.extra_args:
        name = _long_name(argument)
        if argument.startswith("-") and name in SET_BY_RECIPE:
            option = SET_BY_RECIPE[name]
            raise RecipeError(
                f"serve.extra_args={as_override(config.serve.extra_args)}: {argument} is set by the recipe",
                f"remove it; set the option {option}" if option else "remove it",
            )


def _long_name(argument: str) -> str:
    """The name of an argument of vLLM, which takes `_` for `-`, as SET_BY_RECIPE has it."""
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    return SHORT.get(name, name.removeprefix("--").removeprefix("no-"))


def check_launcher(name: str) -> None:
    """Refuse a launcher of sweeps that does not exist, or is not installed."""
    distribution, extra = LAUNCHERS.get(name, ("", ""))
    if not distribution:
        if name != "basic":
            raise RecipeError(f"hydra/launcher: there is no launcher `{name}`", closest(name, ["basic", *LAUNCHERS]))
        return
    if installed_version(distribution) is None:
        raise RecipeError(
            f"hydra/launcher={name} needs `{distribution}`, which is not installed",
            install_command(extra),
        )
