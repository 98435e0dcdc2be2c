"""A service: ready only when the right server answers, dead with the reason, gone when stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speculators.config.choices import Connector
from speculators.config.execution import Mooncake
from speculators.config.schema import Config
from speculators.errors import ServiceError
from speculators.job import Request
from speculators.runner.servers import guard
from speculators.runner.servers.server import Server, ServerSpec, cause, external, free_port, reap_left_overs
from tests.requests import make_request

FAKE = Path(__file__).parents[1] / "fake_server.py"


def service(tmp_path: Path, *options: str, port: int = 0, serves: str = "target-n1") -> Server:
    port = port or free_port()
    spec = ServerSpec(
        name="n1",
        mode="baseline",
        argv=[sys.executable, str(FAKE), str(port), serves, *options],
        env={"VLLM_API_KEY": "secret-of-n1"},
        url=f"http://127.0.0.1:{port}",
        model="target-n1",
        api_key="secret-of-n1",
        log=tmp_path / "run" / "server.log",
    )
    return Server(spec, tmp_path / "store" / "services" / "n1")


def orphan(tmp_path: Path) -> int:
    """The pid of the process that the server detached, once it is there."""
    file, deadline = tmp_path / "orphan", time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(file.read_text())


def settle(made: Server, seconds: float = 30.0) -> str:
    deadline = time.monotonic() + seconds
    while made.poll() == "starting" and time.monotonic() < deadline:
        time.sleep(0.02)
    return made.state


def test_a_server_that_starts_late_becomes_ready_and_is_gone_after_stop(tmp_path: Path) -> None:
    made = service(tmp_path, "--late", "0.5", "--detach", str(tmp_path / "orphan"))
    made.start()
    assert made.poll() == "starting"
    assert settle(made) == "ready"
    assert Path(made.request_entry()["directory"]).is_dir()
    made.stop()
    assert guard.start_time(orphan(tmp_path)) is None
    assert not made.directory.exists()
    assert made.spec.log.exists()


def test_the_request_names_the_variable_that_holds_the_key_and_never_the_key(tmp_path: Path) -> None:
    made = service(tmp_path)
    plain = made.request_entry()
    assert made.worker_env() == {plain["api_key_env"]: "secret-of-n1"}
    assert "secret" not in repr(plain) + repr(made.spec)
    assert (plain["model"], plain["mode"], plain["log"]) == ("target-n1", "baseline", str(made.spec.log))


def test_a_server_that_dies_while_starting_is_quoted_with_the_error_at_the_root(tmp_path: Path) -> None:
    log = (
        "(EngineCore pid=7) ERROR 11-22 08:00:00 [core.py:9]   File core.py, line 1\\n"
        "(EngineCore pid=7) ERROR 11-22 08:00:00 [core.py:9] ValueError: 3.2 GiB is larger than the available KV cache"
        "\\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."
    )
    made = service(tmp_path, "--late", "60", "--die", str(tmp_path), "--say", log)
    made.start()
    assert settle(made) == "dead"
    failure = made.failure()
    assert failure.message.startswith("the server ended with exit code 1 before it was ready: ValueError: 3.2 GiB is")
    assert "serve.kv_cache_gib" in failure.hint
    assert str(made.spec.log) in failure.hint
    made.stop()


def test_a_server_that_dies_in_use_is_dead_and_says_so(tmp_path: Path) -> None:
    made = service(tmp_path, "--die", str(tmp_path / "die"), "--say", "RuntimeError: lost the device")
    made.start()
    assert settle(made) == "ready"
    (tmp_path / "die").touch()
    deadline = time.monotonic() + 10
    while made.poll() == "ready" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "while it was in use: RuntimeError: lost the device" in made.failure().message
    made.stop()


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("/usr/bin/python: No module named vllm", "pip install vllm"),
        ("Error while finding module specification (ModuleNotFoundError: No module named 'vllm')", "pip install vllm"),
        ("OSError: [Errno 98] Address already in use", "serve.port=0"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "gpu_memory_utilization"),
        ("ValueError: Couldn't instantiate the backend tokenizer from one of: ", "tokenizer.json"),
        ("  Value error, Model architectures ['X'] are not supported for now", "does not support the model"),
    ],
)
def test_the_usual_reasons_have_hints(tmp_path: Path, said: str, hint: str) -> None:
    made = service(tmp_path)
    made.spec.log.parent.mkdir()
    made.spec.log.write_text(said + "\n")
    assert hint in made._explain(1).hint


def test_the_cause_is_the_last_exception_that_is_not_second_hand(tmp_path: Path) -> None:
    lines = ["Traceback (most recent call last):", '  File "a.py"', "KeyError: 'lm_head'", "", "bye"]
    assert cause(lines) == "KeyError: 'lm_head'"
    of_a_schema = [
        "pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, no such model" * 99,
    ]
    assert cause(of_a_schema).startswith(of_a_schema[0] + " Value error, no such model")
    assert len(cause(of_a_schema)) == 400
    assert cause(["just words", ""]) == "just words"
    assert cause([]) == "its log is empty"


def test_a_server_with_another_models_name_is_not_used(tmp_path: Path) -> None:
    made = service(tmp_path, serves="target-of-somebody-else")
    made.start()
    assert settle(made) == "dead"
    assert "serves target-of-somebody-else, not target-n1" in made.failure().message
    made.stop()


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServiceError, match=f"port {port} of 127.0.0.1 is in use"):
            service(tmp_path, port=port).start()
    assert not (tmp_path / "store").exists()


def test_a_stubborn_server_that_never_gets_ready_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.runner.servers.server.SERVER_GRACE_SECONDS", 0.5)
    made = service(tmp_path, "--late", "60", "--stubborn", "--detach", str(tmp_path / "orphan"))
    made.start()
    pid = orphan(tmp_path)
    made.stop()
    assert guard.start_time(pid) is None


def test_the_directory_of_an_external_servers_states_is_the_one_that_the_recipe_names(tmp_path: Path) -> None:
    config = Config()
    config.serve.url, config.serve.hidden_states_dir = "http://gpu-7:8000", "/mnt/states"
    assert (
        external(config, config.serve.url, "extract", tmp_path / "n2", tmp_path / "log").request_entry()["directory"]
        == "/mnt/states"
    )
    config.serve.hidden_states_dir, config.extract.connector = "", Connector.example
    assert (
        external(config, config.serve.url, "extract", tmp_path / "n2", tmp_path / "log").spec.hidden_states_dir is None
    )


def test_a_stage_hears_of_the_mooncake_store_where_the_recipe_puts_states_into_one(tmp_path: Path) -> None:
    config = Config()
    config.serve.url, config.serve.mooncake.master = "http://gpu-7:8000", "10.0.0.1:50052"
    heard = []
    for config.extract.connector in (Connector.example, Connector.mooncake):
        plain = external(config, config.serve.url, "extract", tmp_path / "n2", tmp_path / "log").request_entry()
        make_request("extract", tmp_path, services={"target": plain}).write(tmp_path / "request.json")
        heard.append(Request.read(tmp_path / "request.json").job().services["target"].mooncake)
    assert heard == [None, Mooncake(master="10.0.0.1:50052")]


def test_an_external_server_is_used_under_its_own_name_and_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = service(tmp_path, serves="target-n1")
    ours.start()
    assert settle(ours) == "ready"
    config = Config()
    url, config.serve.api_key_env = ours.spec.url + "/", "THEIR_KEY"
    with pytest.raises(ServiceError, match="THEIR_KEY, which is not set"):
        external(config, url, "baseline", tmp_path / "n2", tmp_path / "log")
    monkeypatch.setenv("THEIR_KEY", "wrong")
    refused = external(config, url, "baseline", tmp_path / "n2", tmp_path / "log")
    refused.start()
    assert settle(refused) == "dead"
    assert "refuses the API key" in refused.failure().message
    monkeypatch.setenv("THEIR_KEY", "secret-of-n1")
    used = external(config, url, "baseline", tmp_path / "n2", tmp_path / "log")
    used.start()
    assert settle(used) == "ready"
    assert used.request_entry()["model"] == "target-n1"
    used.stop()
    assert ours.poll() == "ready"
    config.serve.extra_urls = [ours.spec.url + "/"]
    assert external(config, url, "baseline", tmp_path / "n2", tmp_path / "log").request_entry()["also"] == []
    several = external(config, url, "generate", tmp_path / "n2", tmp_path / "log")
    several.start()
    assert settle(several) == "ready"
    assert several.request_entry()["also"] == [ours.spec.url]
    config.serve.extra_urls = [f"http://127.0.0.1:{free_port()}"]
    missing = external(config, url, "generate", tmp_path / "n2", tmp_path / "log")
    missing.start()
    assert settle(missing) == "dead"
    assert f"no server answers at {config.serve.extra_urls[0]}" in missing.failure().message
    ours.stop()
    gone = external(config, url, "baseline", tmp_path / "n2", tmp_path / "log")
    gone.start()
    assert settle(gone) == "dead"
    assert "no server answers" in gone.failure().message


RUNNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_server import service, settle
made = service(Path(sys.argv[2]), *sys.argv[4:])
made.start()
if sys.argv[3] == "ready":
    assert settle(made) == "ready"
print("go", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_a_killed_runner_leaves_no_server_behind(tmp_path: Path, when: str) -> None:
    late = ["--late", "60"] if when == "starting" else []
    argv = [
        sys.executable,
        "-c",
        RUNNER,
        str(Path(__file__).parent),
        str(tmp_path),
        when,
        "--detach",
        str(tmp_path / "orphan"),
        *late,
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "go\n"
        pid = orphan(tmp_path)
        runner.kill()
    deadline = time.monotonic() + 15
    while guard.start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert guard.start_time(pid) is None


def test_the_next_service_reaps_what_a_killed_guard_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    living, killed = service(tmp_path), service(tmp_path, "--stubborn", "--detach", str(tmp_path / "orphan"))
    killed.directory = tmp_path / "store/services/killed"
    for made in (living, killed):
        made.start()
        assert settle(made) == "ready"
    pid = orphan(tmp_path)
    while f'"pid": {pid}' not in (killed.directory / "pids.json").read_text():
        time.sleep(0.02)
    assert killed._guard is not None
    killed._guard.send_signal(signal.SIGKILL)
    killed._guard.wait()
    fresh = service(tmp_path)
    fresh.directory = tmp_path / "store/services/fresh"
    fresh.start()
    assert guard.start_time(pid) is None
    assert not killed.directory.exists()
    assert settle(fresh) == "ready"
    assert living.poll() == "ready"
    for made in (living, killed, fresh):
        made.stop()


def test_the_directory_of_a_runner_that_died_before_its_guard_wrote_anything_is_removed(tmp_path: Path) -> None:
    home = tmp_path / "store/services/half"
    home.mkdir(parents=True)
    code = "import pathlib, sys; from speculators.runner.servers import guard; guard.claim(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(home / "pids.json")], check=True)
    assert reap_left_overs(tmp_path / "store/services/next") == []
    assert not home.exists()


def test_spec_fields_that_hold_the_key_are_not_shown() -> None:
    hidden = {f.name for f in dataclasses.fields(ServerSpec) if not f.repr}
    assert hidden == {"env", "api_key"}
    assert os.environ.get("VLLM_API_KEY") is None
