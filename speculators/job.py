"""What crosses the line between the runner and a stage: one request file.

The runner writes a `Request`, the worker reads it and hands the stage a `Job`. Neither side imports the other; this
module is the agreement and imports only `config`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.config.schema import Config, Mooncake, from_builtins

REQUEST_FORMAT = 2
"""Raised when a worker of an older release could not read the request."""


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """A server that is up for the duration of the stage."""

    url: str
    """`http://127.0.0.1:PORT`, without a path."""
    model: str
    """The served model name; carries the run's nonce."""
    api_key: str = field(repr=False)
    """Sent as a bearer token."""
    mode: str
    """`generate`, `extract`, `plain` or `speculative`."""
    directory: Path
    """Where the server leaves files for its clients, hidden states for one."""
    log: Path
    """The server's log: its last lines explain a connection that breaks."""
    also: list[str] = field(default_factory=list)
    """Further servers as `url`, which serve the same under the same name and key into the same directory."""
    mooncake: Mooncake | None = None
    """The store into which they put hidden states, if the recipe says that they do."""


@dataclass(kw_only=True, slots=True)
class Job:
    """One attempt at one stage, as the stage sees it: plain values and paths."""

    node: str
    """The node's name in the pipeline."""
    stage: str
    """The kind of stage, a module of `speculators.stages`."""
    key: str
    """The artifact's key, 64 hex digits."""
    config: Config
    """The recipe, cut down to what the stage declared; reading anything else raises AttributeError."""
    derived: dict[str, Any]
    """What the runner computed from target, speculator and hardware; see `runner.planning.derive`."""
    inputs: dict[str, Path]
    """Input name -> directory of that artifact's data, read-only."""
    digests: dict[str, str]
    """Input name -> digest of its content."""
    services: dict[str, Endpoint]
    """Service name -> a server that is ready."""
    work: Path
    """This key's own directory. It outlives a killed attempt: what lies here is this very stage's, to resume from."""

    record: dict[str, Any] = field(default_factory=dict)
    """Facts about the result (rows read, dropped, seconds) that go into `artifact.json`; the stage fills it.
    What a person must hear of is in its list `notes`, a sentence each: the terminal shows them."""
    digests_written: dict[str, str] = field(default_factory=dict)
    """Path below `output` -> sha256 of a file that was hashed while it was written, and is not read again for it."""
    _reported: float = 0.0

    @property
    def output(self) -> Path:
        """What will be the artifact: only files that the stage finished belong here when it returns."""
        return self.work / "data"

    @property
    def scratch(self) -> Path:
        """Kept between attempts, never published: partial results, checkpoints."""
        return self.work / "scratch"

    def progress(self, done: float, total: float, unit: str, **note: Any) -> None:
        """Tell the terminal how far the stage is; written at most four times a second."""
        now = time.monotonic()
        if now - self._reported < 0.25 and done < total:
            return
        self._reported = now
        write_json(self.work / "progress.json", {"done": done, "total": total, "unit": unit, "note": note})


@dataclass(kw_only=True, slots=True)
class Request:
    """All that crosses the line for one attempt at one phase of a stage, in JSON types."""

    node: str
    stage: str
    key: str
    config: dict[str, Any]
    """The options that the stage declared, by section."""
    derived: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> directory of that artifact's data."""
    digests: dict[str, str]
    services: dict[str, dict[str, Any]]
    """Service name -> an `Endpoint`, whose API key is the name of an environment variable."""
    orders: dict[str, dict[str, Any]]
    """Service name -> a server that has to be started beside the worker, on the worker's machine."""
    work: str
    store: str
    """Root of the artifact store into which the worker publishes."""
    preimage: dict[str, Any]
    """What `key` is the hash of."""
    digest: str | None
    """The artifact's digest where it is known before the artifact is made, a hub commit for one."""
    forced: bool
    """Make the artifact although the store has one under this key."""
    provenance: dict[str, Any]
    """Facts that are stored with the artifact and do not enter its key: run, recipe, overrides, attempt, input keys."""
    phase: int
    """From 0; the last one publishes."""
    phases: int

    def write(self, path: Path) -> None:
        """Write the request file."""
        write_json(path, {"format": REQUEST_FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a request file.

        Raises:
            ValueError: its format is another one, or a field is missing or unknown.
        """
        fields = json.loads(path.read_text())
        if fields.pop("format", None) != REQUEST_FORMAT:
            raise ValueError(f"{path}: not a request of format {REQUEST_FORMAT}")
        differing = {field.name for field in dataclasses.fields(cls)} ^ fields.keys()
        if differing:
            raise ValueError(f"{path}: missing or unknown fields: {', '.join(sorted(differing))}")
        return cls(**fields)

    def job(self) -> Job:
        """The request as the stage sees it."""
        return Job(
            node=self.node,
            stage=self.stage,
            key=self.key,
            config=from_builtins(Config, self.config),
            derived=self.derived,
            inputs={name: Path(directory) for name, directory in self.inputs.items()},
            digests=self.digests,
            services={name: _endpoint(plain) for name, plain in self.services.items()},
            work=Path(self.work),
        )


def _endpoint(plain: Mapping[str, Any]) -> Endpoint:
    """The key is read from the environment, so that no request file holds a secret."""
    return Endpoint(
        url=plain["url"],
        model=plain["model"],
        api_key=os.environ.get(plain["api_key_env"], ""),
        mode=plain["mode"],
        directory=Path(plain["directory"]),
        log=Path(plain["log"]),
        also=plain.get("also", []),
        mooncake=from_builtins(Mooncake, plain["mooncake"]) if plain.get("mooncake") else None,
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(beside, path)
