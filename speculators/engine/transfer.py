"""Transfer of hidden states from a server to the client: where they are, when they are complete, how they are read.

Three connectors are supported. The fields of the answer tell which one the server uses:

- `hidden_states_file`, of this package's connector: a file name in the directory that server and client share. The file
  appears by a rename, or `NAME.error` appears instead and holds the reason.
- `hidden_states_path`, of vLLM's ExampleHiddenStatesConnector and its derivatives (hs-connectors' float8 one): a path
  on the server. The server locks `PATH.lock` exclusively before it answers, and unlocks it when the file is written or
  writing failed. It writes the hidden states of every request, also of those that did not ask.
- `handle`, of hs-connectors' Mooncake connector: the key of an object in a store, see `mooncake`.

float8 hidden states come with `scales` [T, L] in the target's dtype (this package's connector), or with
`hidden_states_scales` float32 [T, 1, 1], one scale for all layers of a token (hs-connectors), and are read as bfloat16.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from speculators.engine.mooncake import HANDLE, MooncakeStore, MooncakeTransfer
from speculators.errors import ServiceError, StageError
from speculators.features.encoding import dequantize

NATIVE_FIELD, EXAMPLE_FIELD = "hidden_states_file", "hidden_states_path"
"""Fields of `kv_transfer_params` that name a file: of this package's connector, and of vLLM's example connector."""
WRITE_FAILED_HINT = (
    "see the server's log: its disk may be full or broken, or another program may write to its directory"
)


class Transfer(Protocol):
    """Hidden states that a server has announced in its answer."""

    def access_error(self, url: str) -> ServiceError | None:
        """Why this machine cannot access what the server at `url` writes; None if it can."""

    async def complete(self) -> bool:
        """Check once whether the hidden states are written.

        Raises:
            StageError: the server could not write them.
            ServiceError: it cannot be determined.
        """

    def timeout_error(self, seconds: float) -> ServiceError:
        """The error for hidden states that are not complete after `seconds`."""

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read and delete them: token ids int64 [T], hidden states [T, L, H] in the target's compute dtype.

        Raises:
            StageError: the data is damaged, or not what a connector writes.
        """

    def delete(self) -> None:
        """Delete what the server has written."""


@dataclass(frozen=True, slots=True)
class FileTransfer:
    """A `Transfer` through a safetensors file."""

    path: Path
    item: str = "an answer"
    """The name of the request in errors."""
    lock: Path | None = None
    """The file that the server holds locked while it writes; None: the file appears complete, by a rename."""

    def access_error(self, url: str) -> ServiceError | None:
        if self.path.parent.is_dir():
            return None
        return ServiceError(
            f"the server at {url} wrote the hidden states of {self.item} to {self.path.name}, and its directory is "
            f"not on this machine: {self.path.parent} is no directory",
            "serve.hidden_states_dir=DIRECTORY: where the server's kv_connector_extra_config.shared_storage_path is "
            "mounted on the machine that runs the stage",
        )

    async def complete(self) -> bool:
        return self._renamed() if self.lock is None else self._unlocked(self.lock)

    def timeout_error(self, seconds: float) -> ServiceError:
        return ServiceError(
            f"the hidden states of {self.item} did not appear as {self.path} within {seconds:g} s",
            "server and stage must share that directory; set serve.hidden_states_dir to where it is mounted here",
        )

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            tensors = load_file(self.path)
            token_ids, hidden_states = tensors["token_ids"], tensors["hidden_states"]
        except (SafetensorError, KeyError, OSError) as error:
            raise StageError(
                f"{self.item}: the hidden states in {self.path.name} cannot be read: {type(error).__name__}: {error}",
                WRITE_FAILED_HINT,
            ) from None
        finally:
            self.delete()
        if "scales" in tensors:
            hidden_states = dequantize(hidden_states, tensors["scales"])
        elif "hidden_states_scales" in tensors:
            hidden_states = (hidden_states.float() * tensors["hidden_states_scales"]).to(torch.bfloat16)
        return token_ids, hidden_states

    def delete(self) -> None:
        for path in filter(None, (self.path, self.lock)):
            path.unlink(missing_ok=True)

    def _renamed(self) -> bool:
        if self.path.exists():
            return True
        error_file = Path(f"{self.path}.error")
        if error_file.exists():
            reason = error_file.read_text()
            error_file.unlink()
            raise StageError(
                f"the server could not write the hidden states of {self.item}: {reason}", "see the server's log"
            )
        return False

    def _unlocked(self, lock: Path) -> bool:
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        except OSError as error:
            raise ServiceError(
                f"files in {lock.parent} cannot be locked ({error.strerror}), and the server signals by a lock that "
                "hidden states are complete",
                "put the server's directory on a file system that supports locks, or use extract.connector=native",
            ) from None
        if self.path.exists():
            return True
        self.delete()
        raise StageError(f"the server could not write the hidden states of {self.item}", WRITE_FAILED_HINT)


def announced_transfer(
    params: Mapping[str, Any], directory: Path, store: MooncakeStore | None, item: str
) -> Transfer | None:
    """The transfer that an answer's `kv_transfer_params` announce; None if they announce none.

    Objects are read from `store`, and ignored if it is None. Files are looked up by name in `directory`, the mount
    point of the server's directory on this machine. If that is no directory, the server's own path is used as it is.
    """
    if HANDLE in params and store is not None:
        return MooncakeTransfer(params, store, item)
    if NATIVE_FIELD in params:
        return FileTransfer(directory / Path(params[NATIVE_FIELD]).name, item)
    if EXAMPLE_FIELD not in params:
        return None
    server_path = Path(params[EXAMPLE_FIELD])
    path = directory / server_path.name if directory.is_dir() else server_path
    return FileTransfer(path, item, path.with_name(f"{path.name}.lock"))
