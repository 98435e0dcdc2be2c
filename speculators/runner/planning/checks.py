"""Check a recipe against its graph, the target's files and this machine, before anything starts."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from pathlib import Path

from speculators.checkpoint_files import (
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    find_tensor,
    layer_norm,
    stated_tying,
    tensor_shapes,
    text_config,
)
from speculators.config.choices import Device, Sampling
from speculators.config.schema import Config, Evaluate, Regenerate
from speculators.errors import ContractError, RecipeError
from speculators.runner import executors, hardware
from speculators.runner.planning import graph
from speculators.runner.planning.derive import Facts
from speculators.runner.planning.graph import Node
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import existing
from speculators.tokenizer_files import chat_template, check_tokenizer, read_json

CHATTING = {"regenerate", "tokenize", "evaluate"}
"""Kinds of stages that need the chat template."""


def check_graph(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check options that depend on the stages of the recipe.

    Raises:
        RecipeError: there is no dataset to train on, or to measure on; `evaluate` has no draft, or nothing measures it.
    """
    if not config.data and any(node.spec.datasets == "data" for node in nodes.values()):
        raise RecipeError(
            "data={}: the recipe names no dataset to train on",
            "data=[sharegpt], or `data: {NAME: {source: FILE, format: messages}}` in the recipe",
        )
    draft = config.evaluate.draft
    if bool(draft) != (graph.DRAFT in nodes):
        if draft:
            raise RecipeError(f"evaluate.draft={draft}: no stage of the recipe measures it", "pipeline=evaluate")
        raise RecipeError(
            "evaluate.draft: names no draft to measure", "evaluate.draft=DIRECTORY, or evaluate.draft=hub:ID@REVISION"
        )
    tokens = config.speculator.num_speculative_tokens
    if tokens is not None and draft and not any(node.spec.trains for node in nodes.values()):
        raise RecipeError(
            f"speculator.num_speculative_tokens={tokens}: is of a draft that the recipe trains, and it trains none",
            f"evaluate.num_speculative_tokens=[{tokens}] speculator.num_speculative_tokens=null",
        )
    if not config.evaluate.datasets and any(node.spec.datasets == "evaluate.datasets" for node in nodes.values()):
        raise RecipeError(
            "evaluate.datasets=[]: names no dataset to measure on",
            "evaluate.datasets=[human_eval], or until=train",
        )


def check_machine(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check that this machine can run the stages of the recipe.

    Raises:
        RecipeError: an executor cannot run a stage, or a device, a port or a directory is not available.
    """
    executors.check_executors(config, nodes)
    _check_device(config, nodes)
    _check_cores(config, nodes)
    _check_ranks(config, nodes)
    _check_sampling(config, nodes)
    _check_port(config, nodes)
    _check_directories(config, nodes)


def _check_device(config: Config, nodes: Mapping[str, Node]) -> None:
    local = [node for node in nodes.values() if not executors.is_remote(config, node.kind)]
    starts_server = any(graph.starts_servers(node, config) for node in local)
    needs_gpu = {
        "train.device": any(node.spec.trains for node in local) and config.train.device is Device.cuda,
        "hardware.device": starts_server and config.hardware.device is Device.cuda,
    }
    options = [option for option, needed in needs_gpu.items() if needed]
    requested = config.hardware.gpus
    if config.hardware.gpu_memory_gib is not None or not (options or (requested and vllm.device(config) == "cuda")):
        return  # described GPUs need not be here for a plan
    count = len(hardware.find_machine().gpus)
    if options and not count:
        hint = f"{options[0]}=cpu, or {options[0]}=auto"
        raise RecipeError(f"{options[0]}=cuda: this machine has no NVIDIA GPU", hint)
    if "hardware.device" in options and vllm.built_for_cpu(config.serve.python):
        raise RecipeError(
            "hardware.device=cuda: the installed vLLM is built for CPUs",
            "install the `vllm` wheel, or name an interpreter that has it: serve.python=PATH; or hardware.device=cpu",
        )
    if requested and local and requested > count:
        raise RecipeError(
            f"hardware.gpus={requested}: this machine has {count}",
            f"hardware.gpus={count or 'null'}, or describe the GPUs to plan for others: hardware.gpu_memory_gib=N",
        )


def _check_cores(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check the processes and cores of a training on this machine's cores."""
    processes, train_cores = config.train.num_processes or 1, config.hardware.train_cores
    local = [n for n in nodes.values() if n.spec.trains and not executors.is_remote(config, n.kind)]
    if not local or max(processes, train_cores) == 1 or config.hardware.gpu_memory_gib is not None:
        return
    cores = hardware.find_machine(look_for_gpus=False).cores
    if processes > cores and not hardware.find_machine().gpus:
        raise RecipeError(
            f"train.num_processes={processes}: this machine has {cores} cores and no GPU",
            f"train.num_processes={cores}, or null for one process",
        )
    if train_cores >= cores and any(n.draws for n in local) and not config.serve.url and vllm.device(config) == "cpu":
        raise RecipeError(
            f"hardware.train_cores={train_cores}: leaves none of this machine's {cores} cores for the server",
            "hardware.train_cores=0, for half of them",
        )


def _check_ranks(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check that each rank of a server on this machine's CPU has a core."""
    local = any(graph.starts_servers(n, config) and not executors.is_remote(config, n.kind) for n in nodes.values())
    ranks = vllm.ranks(config)
    if ranks == 1 or not local or vllm.device(config) != "cpu":
        return
    cores = hardware.find_machine(look_for_gpus=False).cores
    if ranks > cores:
        options = [
            f"serve.{kind}_parallel" for kind in vllm.PARALLEL if (getattr(config.serve, f"{kind}_parallel") or 1) > 1
        ]
        values = " ".join(f"{option}={getattr(config.serve, option.removeprefix('serve.'))}" for option in options)
        raise RecipeError(
            f"{values}: a server would have {ranks} processes, and this machine has {cores} cores and no GPU",
            f"{' '.join(f'{option}=1' for option in options)}, for one process on all cores",
        )


def _check_sampling(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check that no server samples where vLLM's CPU build cannot: in the rejection sampler, behind proposed tokens.

    vLLM 0.32 leaves the temperatures there uninitialized, and ends at requests with a seed. A server that exports
    hidden states proposes tokens, too.
    """
    here = [n for n in nodes.values() if graph.starts_servers(n, config) and not executors.is_remote(config, n.kind)]
    if not here or vllm.device(config) != "cpu":
        return
    if _samples(config.regenerate) and any(node.kind == "regenerate" and node.mode == "extract" for node in here):
        raise RecipeError(
            f"{_sampling_option('regenerate', config.regenerate)}: vLLM's CPU build cannot sample in a server that "
            "exports hidden states",
            "pipeline=offline, which answers with a plain server, or regenerate.temperature=0",
        )
    model = config.evaluate.sampling is Sampling.model
    if _samples(config.evaluate) and any(node.kind == "evaluate" for node in here):
        raise RecipeError(
            f"{_sampling_option('evaluate', config.evaluate)}: vLLM's CPU build cannot sample with a draft",
            f"{'evaluate.sampling=recipe' if model else 'evaluate.temperature=0'}, or evaluate on a GPU",
        )


def _samples(options: Regenerate | Evaluate) -> bool:
    return bool(options.sampling is Sampling.model or options.temperature or getattr(options, "temperatures", ()))


def _sampling_option(stage: str, options: Regenerate | Evaluate) -> str:
    if options.sampling is Sampling.model:
        return f"{stage}.sampling=model"
    several = getattr(options, "temperatures", ())
    return f"{stage}.temperatures={list(several)}" if several else f"{stage}.temperature={options.temperature}"


def _check_directories(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check that directories can exist where the recipe names them."""
    for option, name in (("run.dir", config.run.dir), ("run.store", config.run.store)):
        if name and not (parent := existing(Path(name).expanduser().absolute())).is_dir():
            raise RecipeError(f"{option}={name}: {parent} is not a directory", f"{option}=DIRECTORY")
    hidden_states = config.serve.hidden_states_dir
    here = any(n.mode == "extract" and not executors.is_remote(config, n.kind) for n in nodes.values())
    if here and config.serve.url and hidden_states and not Path(hidden_states).expanduser().is_dir():
        raise RecipeError(
            f"serve.hidden_states_dir={hidden_states}: this machine has no such directory",
            "serve.hidden_states_dir=DIRECTORY, the server's shared_storage_path as this machine sees it",
        )


def _check_port(config: Config, nodes: Mapping[str, Node]) -> None:
    """Check that the port of the first server that is started on this machine is free."""
    port = config.serve.port
    local = [n for n in nodes.values() if graph.starts_servers(n, config) and not executors.is_remote(config, n.kind)]
    if not port or not local:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise RecipeError(f"serve.port={port}: the port {reason}", "serve.port=0, for any free port") from None


def check_target(
    config: Config, nodes: Mapping[str, Node], checkpoint: Path | None, known: Facts, *, local: bool
) -> None:
    """Check the recipe against the target's shape and, if it is fetched, the files of its checkpoint.

    `local`: it is a directory of the user, whose tokenizer may be damaged.

    Raises:
        RecipeError: sequences are too long for the target, or it contains code that the recipe does not trust.
        ContractError: the tokenizer is damaged, or has no chat template.
    """
    _check_lengths(config, nodes, known)
    if checkpoint is None:
        return
    if read_json(checkpoint / "config.json").get("auto_map") and not config.target.trust_remote_code:
        raise RecipeError(
            f"target.trust_remote_code=false: the target contains Python code (`auto_map` in {checkpoint}/config.json)",
            "target.trust_remote_code=true, if you trust the authors of that code",
        )
    for stage, section in (("regenerate", config.regenerate), ("evaluate", config.evaluate)):
        asks = section.sampling is Sampling.model and any(node.kind == stage for node in nodes.values())
        if asks and not (checkpoint / "generation_config.json").is_file():
            raise RecipeError(
                f"{stage}.sampling=model: the target has no generation_config.json",
                f"{stage}.sampling=recipe {stage}.temperature=1.0, which vLLM would serve it with",
            )
    chatting = any(node.kind in CHATTING for node in nodes.values())
    if chatting and local:
        check_tokenizer(checkpoint)
    if chatting and chat_template(checkpoint) is None:
        raise ContractError(
            f"target.source={config.target.source}: its tokenizer has no chat template",
            "use the instruction-tuned version of the model, or add a chat_template.jinja to the checkpoint",
        )
    if any(node.spec.trains or node.mode == "extract" for node in nodes.values()):
        _check_tensors(config, checkpoint, known)


def _check_tensors(config: Config, checkpoint: Path, known: Facts) -> None:
    """Check that the checkpoint has the tensors that training reads, before the target is served for hours.

    Raises:
        ContractError: embeddings, final norm or head are missing, have another shape or are of an unsupported kind.
    """
    source, values = f"target.source={config.target.source}", read_json(checkpoint / "config.json")
    shapes, matrix = tensor_shapes(checkpoint), [known.vocab_size, known.hidden_size]
    needed = {"input embeddings": (EMBEDDINGS, matrix), "final norm": (FINAL_NORM, matrix[1:])}
    if stated_tying(values) is False:
        needed["output head"] = HEAD, matrix
    tensors = {what: find_tensor(shapes, names) for what, (names, _) in needed.items()}
    for what, name in tensors.items():
        names, expected = needed[what]
        if name is None:
            untied = " although its config.json has `tie_word_embeddings: false`" if names is HEAD else ""
            raise ContractError(
                f"{source}: no tensor is the {what}, such as {names[0]} or {names[1]}{untied}",
                ("set `tie_word_embeddings` to true if the head is the embeddings; else " if untied else "")
                + "save the whole model again, in the format of transformers",
            )
        if shapes[name] != expected:
            raise ContractError(
                f"{source}: {name} has the shape {shapes[name]}, by config.json it is {expected}",
                "use a config.json and weights of one model",
            )
    if why := layer_norm(str(text_config(values).get("model_type")), tensors["final norm"] or "", shapes):
        raise ContractError(
            f"{source}: its final norm {why}: it is a LayerNorm, and only RMSNorm is supported",
            "train for a target whose final norm is an RMSNorm",
        )


def _check_lengths(config: Config, nodes: Mapping[str, Node], known: Facts) -> None:
    positions = known.positions
    if positions is None or "--hf-overrides" in " ".join(config.serve.extra_args):
        return
    if config.max_seq_len >= positions:
        answers = config.answer_limit() >= positions - 1
        raise RecipeError(
            f"max_seq_len={config.max_seq_len}: must be below the {positions} positions of the target, of which a "
            "server keeps one for the token that it generates",
            f"max_seq_len={positions - 1}" + (f" regenerate.max_tokens={positions // 2}" if answers else ""),
        )
    if any(node.kind == "evaluate" for node in nodes.values()) and config.evaluate.max_tokens >= positions:
        raise RecipeError(
            f"evaluate.max_tokens={config.evaluate.max_tokens}: leaves no space for a prompt in the {positions} "
            "positions of the target",
            f"evaluate.max_tokens={positions // 2}",
        )
