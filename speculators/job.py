"""The interface between the runner and a stage: a request file.

The runner writes a `Request`; the worker reads it and calls the stage with a `Job`. Neither imports the other; both
import this module, which imports only `config`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from speculators.config.execution import Mooncake
from speculators.config.schema import Config, from_builtins

REQUEST_FORMAT = 3
"""Format version; raised when workers of older releases cannot read the request."""


@dataclass(kw_only=True, slots=True)
class Endpoint:
    """A server that is ready while the stage runs."""

    url: str
    """`http://127.0.0.1:PORT`, without a path."""
    model: str
    """Name of the served model, with the run's nonce."""
    api_key: str = field(repr=False)
    """Sent as a bearer token."""
    mode: str
    """`generate`, `extract`, `plain` or `speculative`."""
    directory: Path
    """Directory into which the server writes files for its clients, such as hidden states."""
    log: Path
    """The server's log, whose last lines are quoted when a connection breaks."""
    also: list[str] = field(default_factory=list)
    """URLs of further servers, with the same model, name, key and directory."""
    mooncake: Mooncake | None = None
    """Mooncake store that transfers hidden states, if the recipe uses one."""
    num_speculative_tokens: int = 0
    """Tokens that its draft proposes in one step; 0 without a draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReusableRows:
    """Rows of an earlier artifact, or of an unfinished attempt, that a stage may use instead of computing them again.

    They may have been deleted since the request was written.
    """

    conversations: Path | None = None
    """File of answered conversations, one a line, with `rows.jsonl` next to it; None for a stage that answers none."""
    hidden_states: Path | None = None
    """Directory with their hidden states, if it has the layers and the format of this stage."""

    def as_json(self) -> dict[str, str | None]:
        """The entry in a request."""
        paths = {"conversations": self.conversations, "hidden_states": self.hidden_states}
        return {name: str(path) if path else None for name, path in paths.items()}


@dataclass(kw_only=True, slots=True)
class Job:
    """An attempt at a stage: the values and paths that the stage gets."""

    node: str
    """The node's name in the pipeline."""
    stage: str
    """The kind of stage, a module of `speculators.stages`."""
    key: str
    """The artifact's key, 64 hex digits."""
    config: Config
    """The options that the stage declares; reading any other raises AttributeError."""
    derived: dict[str, Any]
    """Derived values; see `runner.planning.derive`."""
    inputs: dict[str, Path]
    """Input name -> directory of that artifact's data, read-only."""
    digests: dict[str, str]
    """Input name -> digest of its content."""
    services: dict[str, Endpoint]
    """Service name -> a server that is ready."""
    work: Path
    """Work directory of the key. It survives a killed attempt, so that the next one can resume from it."""
    reuse: list[ReusableRows] = field(default_factory=list)
    """Where rows of this stage may exist already, preferred ones first."""

    record: dict[str, Any] = field(default_factory=dict)
    """Facts about the result (rows read, dropped, seconds) that the stage adds to `artifact.json`. The terminal shows
    the sentences in its list `notes`."""
    digests_written: dict[str, str] = field(default_factory=dict)
    """sha256 of files that were hashed while they were written, by path below `output`; they are not hashed again."""
    _reported: float = 0.0

    @property
    def output(self) -> Path:
        """Directory that becomes the artifact; when the stage returns it may contain only complete files."""
        return self.work / "data"

    @property
    def scratch(self) -> Path:
        """Directory for partial results and checkpoints: kept between attempts, never published."""
        return self.work / "scratch"

    def progress(self, done: float, total: float, unit: str, **note: Any) -> None:
        """Report progress to the terminal; written at most four times a second."""
        now = time.monotonic()
        if now - self._reported < 0.25 and done < total:
            return
        self._reported = now
        write_json(self.work / "progress.json", {"done": done, "total": total, "unit": unit, "note": note})


@dataclass(kw_only=True, slots=True)
class Request:
    """The request for an attempt at a phase of a stage, in JSON types."""

    node: str
    stage: str
    key: str
    config: dict[str, Any]
    """The options that the stage declares, by section."""
    derived: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> directory of that artifact's data."""
    digests: dict[str, str]
    services: dict[str, dict[str, Any]]
    """Service name -> an `Endpoint`, whose API key is the name of an environment variable."""
    orders: dict[str, dict[str, Any]]
    """Service name -> a server to start on the worker's machine."""
    reuse: list[dict[str, str | None]]
    """`ReusableRows` that the stage may use; outside the key."""
    work: str
    store: str
    """Root of the artifact store into which the worker publishes."""
    preimage: dict[str, Any]
    """The JSON whose sha256 is `key`."""
    digest: str | None
    """The artifact's digest if it is known beforehand, such as that of a hub commit."""
    forced: bool
    """Whether to make the artifact although the store has one with this key."""
    provenance: dict[str, Any]
    """Facts stored with the artifact outside its key: run, recipe, overrides, attempt, input keys."""
    phase: int
    """Index from 0; the last phase publishes."""
    phases: int

    def write(self, path: Path) -> None:
        """Write the request file."""
        write_json(path, {"format": REQUEST_FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a request file.

        Raises:
            ValueError: the format version differs, or a field is missing or unknown.
        """
        fields = json.loads(path.read_text())
        if fields.pop("format", None) != REQUEST_FORMAT:
            raise ValueError(f"{path}: not a request of format {REQUEST_FORMAT}")
        differing = {field.name for field in dataclasses.fields(cls)} ^ fields.keys()
        if differing:
            raise ValueError(f"{path}: missing or unknown fields: {', '.join(sorted(differing))}")
        return cls(**fields)

    def job(self) -> Job:
        """Build the `Job` for the stage."""
        return Job(
            node=self.node,
            stage=self.stage,
            key=self.key,
            config=from_builtins(Config, self.config),
            derived=self.derived,
            inputs={name: Path(directory) for name, directory in self.inputs.items()},
            digests=self.digests,
            services={name: _endpoint(values) for name, values in self.services.items()},
            work=Path(self.work),
            reuse=[
                ReusableRows(**{name: Path(path) if path else None for name, path in rows.items()})
                for rows in self.reuse
            ],
        )


def phase_marker(index: int, services: Iterable[str]) -> str:
    """Name of the file in `scratch` that shows that phase `index`, with these servers, is done.

    It has their names, since an attempt on another machine may divide servers among phases otherwise.
    """
    return "-".join(filter(None, ["phase", str(index), *sorted(set(services))])) + ".done"


def _endpoint(values: Mapping[str, Any]) -> Endpoint:
    """Build an endpoint; its API key is read from the environment, so that request files contain no secret."""
    return Endpoint(
        url=values["url"],
        model=values["model"],
        api_key=os.environ.get(values["api_key_env"], ""),
        mode=values["mode"],
        directory=Path(values["directory"]),
        log=Path(values["log"]),
        also=values.get("also", []),
        mooncake=from_builtins(Mooncake, values["mooncake"]) if values.get("mooncake") else None,
        num_speculative_tokens=values.get("num_speculative_tokens", 0),
    )


def file_name(name: str) -> str:
    """A file name for a name that a user chose, such as `acme/short-lines`: `acme%2Fshort-lines`.

    Different names have different file names, and none begins with a dot.
    """
    quoted = quote(name, safe=" ")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)
