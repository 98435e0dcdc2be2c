"""What is wrong with a recipe, as far as its graph, the target's files and this machine tell before anything starts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.config.choices import Device
from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError
from speculators.runner import executors
from speculators.runner.planning import graph
from speculators.runner.planning.derive import Facts
from speculators.runner.planning.graph import Node

CHATTING = {"regenerate", "tokenize", "evaluate"}
"""Kinds of stages that render conversations."""


def check_graph(config: Config, nodes: Mapping[str, Node]) -> None:
    """Refuse what the stages of the recipe could not do anywhere.

    Raises:
        RecipeError: no data set to measure on.
    """
    if not config.evaluate.datasets and any(node.spec.datasets == "evaluate.datasets" for node in nodes.values()):
        raise RecipeError(
            "evaluate.datasets=[]: names no data set to measure on",
            "evaluate.datasets=[human_eval], or until=train",
        )


def check_machine(config: Config, nodes: Mapping[str, Node]) -> None:
    """Refuse what the stages of the recipe could not do from this machine.

    Raises:
        RecipeError: an executor that cannot run a stage, or a device or port that this machine does not have.
    """
    executors.check_executors(config, nodes)
    _check_device(config, nodes)
    _check_port(config, nodes)


def _check_device(config: Config, nodes: Mapping[str, Node]) -> None:
    here = [node for node in nodes.values() if not executors.is_remote(config, node.kind)]
    served = any(graph.phases(node, config) != [[]] for node in here) and not config.serve.url
    wanted = {
        "train.device": any(node.spec.trains for node in here) and config.train.device is Device.cuda,
        "hardware.device": served and config.hardware.device is Device.cuda,
    }
    for option, asked in wanted.items():
        if asked and not has_gpu():
            raise RecipeError(f"{option}=cuda: this machine has no NVIDIA GPU", f"{option}=cpu, or {option}=auto")


def has_gpu() -> bool:
    """Whether this machine may have an NVIDIA GPU, by its device files and its driver's program: no import of torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def _check_port(config: Config, nodes: Mapping[str, Node]) -> None:
    """The port that servers started here are to listen on; another one that a server takes beside it is the next."""
    port = config.serve.port
    local = [n for n in nodes.values() if graph.phases(n, config) != [[]] and not executors.is_remote(config, n.kind)]
    if not port or config.serve.url or not local:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            taken = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise RecipeError(f"serve.port={port}: the port {taken}", "serve.port=0 takes a free one") from None


def check_target(config: Config, nodes: Mapping[str, Node], checkpoint: Path | None, known: Facts) -> None:
    """Refuse a target that the recipe cannot use, by the files of its checkpoint as far as they are here.

    Raises:
        RecipeError: lengths that the target does not have, or code of its own that the recipe does not trust.
        ContractError: no chat template.
    """
    _check_lengths(config, nodes, known)
    if checkpoint is None:
        return
    plain = read_json(checkpoint / "config.json")
    if plain.get("auto_map") and not config.target.trust_remote_code:
        raise RecipeError(
            f"target.trust_remote_code=false: the target comes with code of its own (`auto_map` in {checkpoint}"
            "/config.json)",
            "target.trust_remote_code=true, if you trust who wrote that code",
        )
    if any(node.kind in CHATTING for node in nodes.values()) and not has_chat_template(checkpoint):
        raise ContractError(
            f"target.source={config.target.source}: its tokenizer has no chat template",
            "take the instruction-tuned version of the model, or put a chat_template.jinja beside the weights",
        )


def _check_lengths(config: Config, nodes: Mapping[str, Node], known: Facts) -> None:
    positions = known.positions
    if positions is None or "--hf-overrides" in " ".join(config.serve.extra_args):
        return
    if config.max_seq_len >= positions:
        raise RecipeError(
            f"max_seq_len={config.max_seq_len}: must be below the {positions} positions of the target, of which a "
            "server keeps one for the token that it generates",
            f"max_seq_len={positions - 1}",
        )
    if any(node.kind == "evaluate" for node in nodes.values()) and config.evaluate.max_tokens >= positions:
        raise RecipeError(
            f"evaluate.max_tokens={config.evaluate.max_tokens}: leaves no room for a prompt in the {positions} "
            "positions of the target",
            f"evaluate.max_tokens={positions // 2}",
        )


def has_chat_template(checkpoint: Path) -> bool:
    """Whether transformers finds a chat template there: a file of its own, or a field of the tokenizer's config."""
    if (checkpoint / "chat_template.jinja").is_file():
        return True
    files = (checkpoint / "tokenizer_config.json", checkpoint / "chat_template.json")
    return any(read_json(file).get("chat_template") for file in files if file.is_file())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the target's.

    Raises:
        ContractError: the file is none.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"target.source: {path} is not JSON ({error})", "fetch or save the target again") from None
    if not isinstance(plain, dict):
        raise ContractError(f"target.source: {path} holds no JSON object", "fetch or save the target again")
    return plain
