"""vLLM's command line, from the recipe."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators import packages as packages_module
from speculators.config.algorithms import Eagle3
from speculators.config.checks import check_config
from speculators.config.choices import Connector, Device, Dtype, HiddenStatesDtype
from speculators.config.fields import to_builtins
from speculators.config.schema import Config, from_builtins
from speculators.errors import RecipeError
from speculators.packages import install_command
from speculators.runner.servers import threads, vllm
from tests.runner.fake_server import distribution

CLIENT = "mooncake-transfer-engine-non-cuda"


def recipe() -> Config:
    config = Config(speculator=Eagle3())
    config.hardware.device = Device.cpu
    return config


def words(config: Config, mode: str = "baseline", **changes: Any) -> list[str]:
    options: dict[str, Any] = {"draft": None, "proposal": {}, "capture_layer_ids": None, "dtype": "float32", **changes}
    return vllm.argv(
        config,
        mode=mode,
        target=Path("/models/smol"),
        max_model_len=640,
        model="target-n1",
        port=8123,
        hidden_states_dir=Path("/store/services/n1/states"),
        **options,
    )


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_a_plain_server_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert words(recipe()) == [
        *[sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "8123"],
        *["--model", "/models/smol", "--served-model-name", "target-n1", "--dtype", "float32"],
        *["--max-model-len", "640", "--max-num-seqs", "64", "--generation-config", "vllm"],
        *["--no-enable-log-requests", "--uvicorn-log-level", "warning", "--no-enable-prefix-caching"],
        *["--enforce-eager", "--kv-cache-memory-bytes", str(2 * 2**30)],
    ]


def test_only_answering_keeps_beginnings_of_prompts() -> None:
    caching = {mode for mode in ("generate", "baseline") if "--enable-prefix-caching" in words(recipe(), mode)}
    assert caching == {"generate"}
    assert "--no-enable-prefix-caching" in words(recipe(), "extract", capture_layer_ids=[2, 30])
    assert "--no-enable-prefix-caching" in words(recipe(), "speculative", draft=Path("/draft"))


def test_servers_that_answer_conversations_have_the_recipes_parsers() -> None:
    config = recipe()
    config.serve.tool_call_parser, config.serve.reasoning_parser = "hermes", "qwen3"
    argv = words(config, "generate")
    assert "--enable-auto-tool-choice" in argv
    assert (value(argv, "--tool-call-parser"), value(argv, "--reasoning-parser")) == ("hermes", "qwen3")
    assert "--tool-call-parser" in words(config, "extract", capture_layer_ids=[2])
    assert "--tool-call-parser" not in words(config, "baseline")


def test_a_speculative_server_gets_the_draft_and_how_many_tokens_it_proposes() -> None:
    proposal = {"method": "eagle3", "num_speculative_tokens": 5}
    argv = words(recipe(), "speculative", draft=Path("/draft"), proposal=proposal)
    assert json.loads(value(argv, "--speculative_config")) == {"model": "/draft", **proposal}


def test_an_extracting_server_gets_the_layers_and_our_connector() -> None:
    argv = words(recipe(), "extract", capture_layer_ids=[2, 15, 27, 30])
    speculative = json.loads(value(argv, "--speculative_config"))
    assert speculative["method"] == "extract_hidden_states"
    assert speculative["draft_model_config"]["hf_config"] == {"eagle_aux_hidden_state_layer_ids": [2, 15, 27, 30]}
    connector = json.loads(value(argv, "--kv_transfer_config"))
    assert connector["kv_connector_module_path"] == "speculators.engine.connector"
    assert connector["kv_connector_extra_config"] == {"shared_storage_path": "/store/services/n1/states"}
    assert value(argv, "--scheduler-cls") == "speculators.engine.connector.ExtractionScheduler"


def test_states_that_are_stored_in_float8_leave_the_engine_so() -> None:
    config = recipe()
    config.extract.dtype = HiddenStatesDtype.float8_e4m3fn
    for dtype, sent in (("bfloat16", "float8_e4m3fn"), ("float32", "float8_e4m3fn"), ("float16", None)):
        argv = words(config, "extract", dtype=dtype, capture_layer_ids=[2, 30])
        connector = json.loads(value(argv, "--kv_transfer_config"))
        assert connector["kv_connector_extra_config"].get("dtype") == sent


def test_a_gpu_is_shared_by_its_memory_and_over_ranks() -> None:
    config = recipe()
    config.hardware.device = Device.cuda
    config.serve.tensor_parallel, config.serve.gpu_memory_utilization = 2, 0.9
    config.target.trust_remote_code = True
    config.serve.extra_args = ["--kv-cache-dtype", "fp8"]
    argv = words(config)
    assert value(argv, "--gpu-memory-utilization") == "0.9"
    assert value(argv, "--tensor-parallel-size") == "2"
    assert "--trust-remote-code" in argv
    assert "--enforce-eager" not in argv
    assert "--kv-cache-memory-bytes" not in argv
    assert argv[-2:] == ["--kv-cache-dtype", "fp8"]
    config.serve.enforce_eager = True
    assert "--enforce-eager" in words(config), "as the recipe says"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm.server_environment(config, api_key="k")


def test_no_argument_of_the_recipe_can_be_given_again() -> None:
    on_gpus = recipe()
    on_gpus.hardware.device, on_gpus.target.trust_remote_code = Device.cuda, True
    on_gpus.serve.gpu_memory_utilization, on_gpus.serve.tensor_parallel, on_gpus.serve.data_parallel = 0.9, 2, 2
    commands = [words(on_gpus), words(recipe(), "speculative", draft=Path("/d"))]
    commands += [words(recipe(), "extract", capture_layer_ids=[2]), words(recipe(), "generate")]
    given = {word for command in commands for word in command if word.startswith("--")}
    given |= {"-tp", "-dp=2", "-sc.method", "--kv_transfer_config.kv_role", "--config"}
    for word in given:
        config = recipe()
        config.serve.extra_args = [word]
        with pytest.raises(RecipeError, match="is set by the recipe"):
            check_config(config)


def order(config: Config, tmp_path: Path) -> vllm.ServerOrder:
    """One of a plain server."""
    return vllm.ServerOrder(
        config=config, mode="baseline", dtype="float32", target="/models/smol", max_model_len=640,
        directories=str(tmp_path), logs=str(tmp_path),
    )  # fmt: skip


def test_an_order_goes_through_a_file_with_all_that_the_server_is_told(tmp_path: Path) -> None:
    config = recipe()
    config.serve.extra_args, config.extract.dtype = ["--seed", "3"], HiddenStatesDtype.float8_e4m3fn
    made = dataclasses.replace(order(config, tmp_path), mode="extract", capture_layer_ids=[2, 5])
    read = from_builtins(vllm.ServerOrder, json.loads(json.dumps(to_builtins(made))))
    assert read == made
    assert vllm.make_server(read, {"OF_THE_RUNNER": "1"}).spec.env["OF_THE_RUNNER"] == "1"


def test_the_key_is_in_the_environment_and_not_in_the_arguments(tmp_path: Path) -> None:
    spec = vllm.make_server(order(recipe(), tmp_path), {}).spec
    assert spec.env["VLLM_API_KEY"] == spec.api_key
    assert len(spec.api_key) >= 32
    assert spec.api_key not in " ".join(spec.argv)
    assert spec.url == f"http://127.0.0.1:{value(spec.argv, '--port')}"
    assert value(spec.argv, "--served-model-name") == spec.model == f"target-{spec.name}"


def test_a_given_port_serves_the_plain_and_the_speculative_server_side_by_side(tmp_path: Path) -> None:
    config = recipe()
    config.serve.port = 8100
    plain = order(config, tmp_path)
    both = (plain, dataclasses.replace(plain, mode="speculative", draft="/draft"))
    urls = [vllm.make_server(one, {}).spec.url for one in both]
    assert urls == ["http://127.0.0.1:8100", "http://127.0.0.1:8101"]


@pytest.mark.parametrize(
    ("cores", "wanted", "ranks", "bound"),
    [
        ({0, 2, 3, 4, 9}, "auto", 1, "0,2-4,9"),
        ({0, 1, 2, 3}, "auto", 2, "0-1|2-3"),
        ({0, 1}, "nobind", 1, "nobind"),
    ],
)
def test_the_engine_gets_every_core_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], wanted: str, ranks: int, bound: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores, raising=False)
    config = recipe()
    config.serve.cpu_threads, config.serve.tensor_parallel = wanted, ranks
    assert vllm.server_environment(config, api_key="k")["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_on_few_cores_the_model_and_its_front_end_are_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3}, raising=False)
    config = recipe()
    assert value(words(config), "--distributed-executor-backend").endswith("UniProcExecutor")
    assert vllm.server_environment(config, api_key="k")["OMP_NUM_THREADS"] == "2"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm.server_environment(config, api_key="k")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert "--distributed-executor-backend" not in words(config)
    assert "OMP_NUM_THREADS" not in vllm.server_environment(config, api_key="k")


@pytest.mark.parametrize("preloaded", ["", "/lib/libfirst.so"])
def test_intels_openmp_is_preloaded_where_its_wheel_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preloaded: str
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    assert "LD_PRELOAD" not in threads.openmp_environment(tmp_path / "bin" / "python")
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert threads.openmp_environment(tmp_path / "bin" / "python")["LD_PRELOAD"] == ":".join(
        filter(None, [preloaded, str(library)])
    )
    assert threads.openmp_environment(tmp_path / "bin" / "python")["KMP_BLOCKTIME"] == threads.BLOCK_MS
    monkeypatch.setenv("LD_PRELOAD", "/opt/libgomp.so")
    assert "LD_PRELOAD" not in threads.openmp_environment(tmp_path / "bin" / "python")


def test_intels_threads_sleep_as_soon_where_somebody_else_preloads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libiomp5.so")
    found = threads.openmp_environment(tmp_path / "bin" / "python")
    assert "LD_PRELOAD" not in found
    assert found["KMP_BLOCKTIME"] == threads.BLOCK_MS


@pytest.mark.parametrize(
    ("installed", "version", "device"),
    [
        ("vllm 0.31.1", "0.31.1", "cuda"),
        ("vllm_cpu 0.32.0", "0.32.0", "cpu"),
        ("vllm 0.32.0+cpu", "0.32.0+cpu", "cpu"),
        ("vllm_flash_attn 2.6.0", None, "cuda"),
    ],
)
def test_the_engine_of_another_interpreter_is_known_without_starting_it(
    tmp_path: Path, installed: str, version: str | None, device: str
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    distribution(tmp_path / "lib/python3.12/site-packages", *installed.split())
    config = Config(speculator=Eagle3())
    config.serve.python = str(python)
    assert vllm.engine_version(str(python)) == version
    assert vllm.device(config) == device
    assert words(config)[0] == str(python)


def test_an_interpreter_that_is_not_there_has_no_engine() -> None:
    assert vllm.engine_version("/nowhere/bin/python") is None


def extraction(connector: Connector = Connector.native, device: Device = Device.cuda) -> Config:
    config = recipe()
    config.hardware.device, config.extract.connector = device, connector
    return config


def test_a_server_of_several_devices_is_told_how_it_is_spread_over_them() -> None:
    config = extraction()
    config.serve.tensor_parallel, config.serve.pipeline_parallel, config.serve.data_parallel = 2, 3, 4
    argv = words(config, "extract", capture_layer_ids=[2, 30])
    spread = {kind: value(argv, f"--{kind}-parallel-size") for kind in ("tensor", "pipeline", "data")}
    assert spread == {"tensor": "2", "pipeline": "3", "data": "4"}
    assert vllm.ranks(config) == 24
    vllm.check_extraction(config)


@pytest.mark.parametrize(
    ("connector", "told"),
    [
        (Connector.example, {"kv_connector": "ExampleHiddenStatesConnector"}),
        (
            Connector.fp8,
            {
                "kv_connector": "FP8HiddenStatesConnector",
                "kv_connector_module_path": "hs_connectors.fp8_hidden_states_connector",
            },
        ),
    ],
)
def test_a_stock_connector_is_loaded_as_its_authors_say(connector: Connector, told: dict[str, str]) -> None:
    config = extraction(connector)
    config.extract.dtype = HiddenStatesDtype.float8_e4m3fn
    argv = words(config, "extract", capture_layer_ids=[2, 30])
    extra = {"shared_storage_path": "/store/services/n1/states"}
    given = json.loads(value(argv, "--kv_transfer_config"))
    assert given == {**told, "kv_role": "kv_producer", "kv_connector_extra_config": extra}
    assert "--scheduler-cls" not in argv


@pytest.mark.parametrize(
    ("connector", "change", "message"),
    [
        (Connector.mooncake, {"device": "cpu", "mooncake": True}, "extract.connector=mooncake needs a GPU"),
        (Connector.mooncake, {"stages": 2, "mooncake": True}, "mooncake does not work with serve.pipeline_parallel"),
        (Connector.mooncake, {"mooncake": True}, "mooncake needs hs-connectors, which this environment does not"),
        (Connector.example, {"device": "cpu"}, "extract.connector=example needs a GPU"),
        (Connector.example, {"stages": 2}, "extract.connector=example does not work with serve.pipeline_parallel"),
        (Connector.native, {"stages": 2, "device": "cpu"}, "serve.pipeline_parallel=2: vLLM on a CPU does not pass"),
        (Connector.fp8, {"dtype": "float16"}, "exports hidden states in bfloat16, and target.dtype is float16"),
        (Connector.fp8, {}, "needs hs-connectors, which this environment does not have"),
    ],
)
def test_what_a_connector_cannot_do_is_refused_before_anything_starts(
    connector: Connector, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "installed_version", lambda name, path: None)
    monkeypatch.setattr(vllm, "is_installed", lambda prefix, path: "mooncake" in change)
    config = extraction(connector, Device[change.get("device", "cuda")])
    config.serve.pipeline_parallel = change.get("stages", 1)
    config.target.dtype = Dtype[change.get("dtype", "bfloat16")]
    with pytest.raises(RecipeError, match=message):
        vllm.check_extraction(config)
    config.serve.url, config.serve.hidden_states_dir = (
        "http://gpu-7:8000",
        "/mnt",
    )  # then it is for whoever has started it
    vllm.check_extraction(config)


def test_an_external_server_keeps_states_only_where_the_recipe_says_they_are_seen() -> None:
    config = extraction(Connector.native)
    config.serve.url = "http://gpu-7:8000"
    with pytest.raises(RecipeError, match="gpu-7:8000 writes hidden states into a directory that the recipe") as raised:
        vllm.check_extraction(config)
    assert raised.value.hint.startswith("serve.hidden_states_dir=DIRECTORY")
    config.serve.hidden_states_dir = "/mnt/states"
    vllm.check_extraction(config)


def test_float8_of_hs_connectors_is_taken_where_the_server_has_the_package(tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    distribution(packages, "hs_connectors", "0.9.0")
    config = extraction(Connector.fp8)
    config.serve.python = str(tmp_path / "bin/python")
    vllm.check_extraction(config)


def test_hs_connectors_is_told_where_the_mooncake_store_is() -> None:
    config = extraction(Connector.mooncake)
    config.serve.mooncake.master, config.serve.mooncake.host = "10.0.0.1:50052", "10.0.0.2"
    config.serve.mooncake.segment_gib = 0.5
    given = json.loads(value(words(config, "extract", capture_layer_ids=[2, 30]), "--kv_transfer_config"))
    assert given == {
        "kv_connector": "MooncakeHiddenStatesConnector",
        "kv_connector_module_path": "hs_connectors.mooncake_hidden_states_connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {
            "mooncake": {
                "local_hostname": "10.0.0.2",
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": "10.0.0.1:50052",
                "global_segment_size": 2**29,
                "local_buffer_size": 2**31,
                "protocol": "tcp",
                "device_name": "",
            }
        },
    }


def test_mooncakes_client_has_to_be_where_vllm_is_and_where_the_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, here = extraction(Connector.mooncake), list[str]()
    config.serve.python = str(tmp_path / "bin/python")
    packages = tmp_path / "lib/python3.11/site-packages"
    monkeypatch.setattr(
        packages_module, "sys", SimpleNamespace(path=here, prefix="/env", base_prefix="/", executable="/env/python")
    )
    with pytest.raises(RecipeError, match="needs Mooncake's client, which this environment does not have") as raised:
        vllm.check_extraction(config)
    assert install_command("mooncake") in raised.value.hint
    distribution(tmp_path / "here", CLIENT, "0.3.13")
    distribution(tmp_path / "here", "hs_connectors", "0.9.0")
    here.append(str(tmp_path / "here"))
    with pytest.raises(RecipeError, match=f"needs Mooncake's client, which {config.serve.python} does not have"):
        vllm.check_extraction(config)
    distribution(packages, "mooncake_transfer_engine", "0.3.13.post1")
    distribution(packages, "hs_connectors", "0.9.0")
    vllm.check_extraction(config)
    config.serve.mooncake.master = "10.0.0.1"
    with pytest.raises(RecipeError, match=r"serve.mooncake.master=10.0.0.1 is not HOST:PORT"):
        vllm.check_extraction(config)
