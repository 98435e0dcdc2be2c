"""Hidden states on their way from a server to whoever asked: where they are, when they are whole, what is in them.

Three ways are known. Which one a server goes is in its answer, so nobody has to say it:

- `hidden_states_file`, of our connector: a name in the directory that server and client share. The file appears by a
  rename, or `NAME.error` in its place says why it does not.
- `hidden_states_path`, of vLLM's ExampleHiddenStatesConnector and what is made from it (hs-connectors' float8 one):
  the server's own path. Before the answer comes, the server has an exclusive lock on `PATH.lock`, and gives it back
  when the file is written, or could not be. It writes the states of every request, asked for or not.
- `handle`, of hs-connectors' Mooncake connector: the key of an object in a store, see `mooncake`.

float8 comes as `scales` [T, L] in the target's type (ours), or `hidden_states_scales` [T, 1, 1] in float32, one over
all layers (hs-connectors'), which reads as bfloat16.
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

from speculators.engine.mooncake import HANDLE, StatesObject, Store
from speculators.errors import ServiceError, StageError
from speculators.features.encoding import dequantize

OURS, STOCK = "hidden_states_file", "hidden_states_path"
"""Under which an answer's `kv_transfer_params` name a file."""
SEES_LOG = "the server's disk is full or broken, or another program writes to its directory; see its log"


class Promised(Protocol):
    """Hidden states that a server has promised. Whoever has waited for many of them takes one at a time."""

    def unseen(self, url: str) -> ServiceError | None:
        """Why nothing that the server at `url` promises can be seen from here; None where it can."""

    async def there(self) -> bool:
        """Whether they are there, and whole.

        Raises:
            StageError: the server could not write them.
            ServiceError: nobody can tell.
        """

    def late(self, seconds: float) -> ServiceError:
        """What to say if they are not there after so many."""

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids that the states belong to, int64 [T], and the states [T, L, H] in the dtype the target computes in.

        They are gone from where they were afterwards.

        Raises:
            StageError: they are not what a connector writes, or not whole.
        """

    def drop(self) -> None:
        """Remove what the server has written."""


@dataclass(frozen=True, slots=True)
class StatesFile:
    """Promised states in a file."""

    path: Path
    item: str = "an answer"
    """What an error calls them."""
    lock: Path | None = None
    """What the server holds locked until they are written; None: they appear whole."""

    def unseen(self, url: str) -> ServiceError | None:
        if self.path.parent.is_dir():
            return None
        return ServiceError(
            f"the server at {url} has put the hidden states of {self.item} into {self.path.name}, which would be in "
            f"{self.path.parent} here, and that is no directory",
            "serve.hidden_states_dir=DIRECTORY: the server's kv_connector_extra_config.shared_storage_path, as it is "
            "mounted on the machine where the stage runs",
        )

    async def there(self) -> bool:
        return self._appeared() if self.lock is None else self._released(self.lock)

    def late(self, seconds: float) -> ServiceError:
        return ServiceError(
            f"the hidden states of {self.item} were promised as {self.path} and are not there after {seconds:g} s",
            "is the server's directory visible from here? Server and stage have to share it; serve.hidden_states_dir "
            "says where it is mounted",
        )

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            tensors = load_file(self.path)
            token_ids, states = tensors["token_ids"], tensors["hidden_states"]
        except (SafetensorError, KeyError, OSError) as error:
            raise StageError(
                f"{self.item}: the hidden states in {self.path.name} cannot be read: {type(error).__name__}: {error}",
                SEES_LOG,
            ) from None
        finally:
            self.drop()
        if "scales" in tensors:
            states = dequantize(states, tensors["scales"])
        elif "hidden_states_scales" in tensors:
            states = (states.float() * tensors["hidden_states_scales"]).to(torch.bfloat16)
        return token_ids, states

    def drop(self) -> None:
        for path in filter(None, (self.path, self.lock)):
            path.unlink(missing_ok=True)

    def _appeared(self) -> bool:
        if self.path.exists():
            return True
        failed = Path(f"{self.path}.error")
        if failed.exists():
            message = failed.read_text()
            failed.unlink()
            raise StageError(f"the server could not write the hidden states of {self.item}: {message}", "see its log")
        return False

    def _released(self, lock: Path) -> bool:
        try:
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        except OSError as error:
            raise ServiceError(
                f"nothing can be locked in {lock.parent}: {error.strerror}; so nobody knows when states are whole",
                "put the server's directory on a file system whose locks work, or use extract.connector=native",
            ) from None
        if self.path.exists():
            return True
        self.drop()
        raise StageError(f"the server could not write the hidden states of {self.item}", SEES_LOG)


def promised(answer: Mapping[str, Any], directory: Path, store: Store | None, item: str) -> Promised | None:
    """What an answer's `kv_transfer_params` promise; None if that is nothing.

    An object is in `store`, and is nothing where the recipe speaks of none. A file lies in `directory`, whatever that
    is called where the server is. Where nobody has said what the directory of a server that is not ours is called here,
    the path that the server says has to do.
    """
    if HANDLE in answer and store is not None:
        return StatesObject(answer, store, item)
    if OURS in answer:
        return StatesFile(directory / Path(answer[OURS]).name, item)
    if STOCK not in answer:
        return None
    said = Path(answer[STOCK])
    path = directory / said.name if directory.is_dir() else said
    return StatesFile(path, item, path.with_name(f"{path.name}.lock"))
