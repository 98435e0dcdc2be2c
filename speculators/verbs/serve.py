"""serve: start vLLM with a draft."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from speculators import model_card, ui
from speculators.config.execution import RunOptions
from speculators.config.fields import to_builtins
from speculators.config.schema import Config, Target, from_builtins
from speculators.errors import RecipeError, StageError
from speculators.runner import products
from speculators.runner.history import Run
from speculators.runner.products import Product
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import open_store
from speculators.verbs import usage


def serve(argv: list[str]) -> int:
    """Start vLLM with a draft, on loopback, until Ctrl-C; or print the command."""
    argv, engine_argv = _split(argv)
    arguments = usage.parse("serve", argv)
    if len(arguments.names) > 1:
        names = " ".join(arguments.names)
        raise RecipeError(f"`serve` takes one draft, not `{names}`", "put arguments of vLLM after `--`")
    options = RunOptions(store=arguments.options.get("run.store", ""))
    runs = Path(arguments.options.get("run.dir", options.dir)).expanduser()
    product = products.find_product(arguments.names[0] if arguments.names else "", runs, open_store(options))
    config = _config(product.run)
    dtype = config.target.dtype.name if product.run else ""  # vLLM then takes that of the target's config.json
    portable = "--print" in arguments.flags
    draft, tokens = str(product.checkpoint.absolute()), product.evaluated_tokens
    command = vllm.serving_argv(config, draft, dtype=dtype, num_speculative_tokens=tokens, portable=portable)
    if portable:
        print(shlex.join([*command, *engine_argv]))
        return 0
    check_verifier(product)
    vllm.require_engine(config.serve.python)
    ui.narrate("serve", str(product.checkpoint))
    ui.narrate("target", product.verifier)
    ui.narrate("command", shlex.join([*command, *engine_argv]))
    return _become([*command, *engine_argv], vllm.serving_environment(config))


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Replace this process by vLLM, so that Ctrl-C reaches vLLM alone, which ends its own processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, {**os.environ, **environment})


def check_verifier(product: Product) -> None:
    """Check that the checkpoint names its target by a hub id or by a directory that exists.

    Raises:
        StageError: it does not, so that vLLM could not load the target.
    """
    name = product.verifier
    if model_card.is_hub_id(name) or Path(name).is_dir():
        return
    hint = f"write its path or hub id into {product.checkpoint / products.CONFIG}: speculators_config.verifier"
    if product.run is not None:
        named = f"verifier={product.target or 'PATH'}"
        copy = shlex.join(["speculators-run", "publish", products.argument(product), "DIRECTORY", named])
        hint = f"make a copy that names the target's directory, and serve that: {copy}"
    raise StageError(f"the draft's target is not at `{name}`, where its config.json says", hint)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of `serve`, and those after `--`, which vLLM gets."""
    if "--" not in argv:
        return argv, []
    index = argv.index("--")
    return argv[:index], argv[index + 1 :]


def _config(run: Run | None) -> Config:
    """The options of a run, with defaults for those that its release did not have; all defaults without a run."""
    values = to_builtins(Config(recipe="", target=Target(source="")))
    for section in ("target", "serve", "hardware"):
        values[section] |= run.config.get(section, {}) if run else {}
    return from_builtins(Config, values)
