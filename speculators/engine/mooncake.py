"""Hidden states in a Mooncake store, where hs-connectors' MooncakeHiddenStatesConnector puts them, and not in files.

It puts the states of every request into an object of their own, asked for or not. An answer's `kv_transfer_params` say
which, and what is in it:

- `version`: of what they say, 1.
- `handle`: the object's key. It appears whole, or `HANDLE:error` in its place, JSON, says why it does not.
- `tensors`: of `hidden_states` [T, L, H], in what the target computes in, and `token_ids` [T], int64, each `dtype`
  (`torch.bfloat16`), `shape`, and where it lies in the object, in bytes: `offset`, `nbytes`.
- `metadata.total_aligned_bytes`: the size of the object.

Whoever reads an object removes it. One whose answer was lost on the way stays until the store needs its room.
"""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from speculators.config.schema import Mooncake
from speculators.errors import ServiceError, StageError

HANDLE = "handle"
VERSION = 1
MASTER_SECONDS = 5.0
"""How long the master may take to accept a connection. Afterwards, what it or a transfer takes ends after 30 s, which
is Mooncake's own limit."""


class Store:
    """The connection of one client, made when it is first wanted. Any thread may call its methods.

    It lends the store no memory, so nothing is lost with it.
    """

    def __init__(self, options: Mooncake) -> None:
        self.options = options
        self._connection: Any = None
        self._connecting = threading.Lock()

    def look(self, *keys: str) -> list[bool]:
        """Which objects are there.

        Raises:
            ServiceError: the store does not answer.
        """
        found = self._connected().batch_is_exist(list(keys))
        if min(found) < 0:
            raise self._useless(f"status {min(found)}")
        return list(map(bool, found))

    def read(self, key: str) -> torch.Tensor:
        """The bytes of an object, uint8 [its size].

        Raises:
            ValueError: they cannot be had: it is not there any more, or the server that holds it is not.
        """
        store = self._connected()
        if (size := store.get_size(key)) < 0:
            raise ValueError(f"status {size}")
        # Straight into what the tensors will be made of: all else wants a buffer of Mooncake's that it fits into.
        data = torch.empty(size, dtype=torch.uint8)
        store.register_buffer(data.data_ptr(), size)
        read = store.get_into(key, data.data_ptr(), size)
        store.unregister_buffer(data.data_ptr())
        if read != size:
            raise ValueError(f"status {read}")
        return data

    def remove(self, *keys: str) -> None:
        """Delete objects, those that are there. What cannot be deleted is left to the store."""
        for key in keys:
            self._connected().remove(key, force=True)  # whoever has just looked at it, we, has it reserved for a while

    def close(self) -> None:
        """Let go of it: it ends with the last call that is under way, which its own `close` would make crash."""
        self._connection = None

    def _connected(self) -> Any:
        with self._connecting:
            self._connection = self._connection or self._connect(self.options)
            return self._connection

    def _connect(self, options: Mooncake) -> Any:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:  # the package, or a library of the system
            raise ServiceError(
                f"Mooncake's client cannot be loaded: {error}",
                "pip install 'speculators-run[mooncake]', and apt install libibverbs1, without RDMA too",
            ) from None
        host, _, port = options.master.rpartition(":")
        try:  # Mooncake itself would try for a minute and a half
            with socket.create_connection((host, int(port)), timeout=MASTER_SECONDS) as probe:
                own = probe.getsockname()[0]
        except OSError as error:
            raise self._useless(error.strerror or str(error)) from None
        store = MooncakeDistributedStore()
        status = store.setup(own, options.metadata, 0, 0, options.protocol, options.device, options.master)
        if status:
            raise self._useless(f"connecting ends with status {status}")
        return store

    def _useless(self, why: str) -> ServiceError:
        return ServiceError(
            f"the Mooncake store at {self.options.master} cannot be used: {why}",
            "start its master (`mooncake_master --rpc_port PORT`), or name the one that the server uses: "
            "serve.mooncake.master=HOST:PORT",
        )


@dataclass(frozen=True, slots=True)
class StatesObject:
    """Promised states in a store."""

    manifest: Mapping[str, Any]
    """The `kv_transfer_params`."""
    store: Store
    item: str

    def unseen(self, url: str) -> ServiceError | None:
        version = self.manifest.get("version")
        if version == VERSION:
            return None
        return ServiceError(
            f"the server at {url} has a manifest of version {version} for the hidden states of {self.item}, and "
            f"{VERSION} is what this release reads",
            "pip install hs-connectors==0.9.0 where vLLM is",
        )

    async def there(self) -> bool:
        return await asyncio.to_thread(self._look)

    def late(self, seconds: float) -> ServiceError:
        return ServiceError(
            f"the hidden states of {self.item} were promised to the Mooncake store at {self.store.options.master} and "
            f"are not there after {seconds:g} s",
            "serve.mooncake.master is to be the server's; and if there is no room in the store for all requests in "
            "flight, then more serve.mooncake.segment_gib, or less extract.concurrency",
        )

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            data, wanted = self.store.read(self.manifest[HANDLE]), self.manifest["metadata"]["total_aligned_bytes"]
            if len(data) != wanted:
                raise ValueError(f"{len(data)} bytes, not {wanted}")
            tensors = {name: _tensor(data, said) for name, said in self.manifest["tensors"].items()}
            return tensors["token_ids"], tensors["hidden_states"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"{self.item}: the hidden states in {self.manifest[HANDLE]} cannot be read: "
                f"{type(error).__name__}: {error}",
                "see the server's log; -704: the store had to make room, serve.mooncake.segment_gib gives it more",
            ) from None
        finally:
            self.drop()

    def drop(self) -> None:
        self.store.remove(*self._keys())

    def _keys(self) -> tuple[str, str]:
        """That of the object, and that of what says why there is none."""
        return self.manifest[HANDLE], f"{self.manifest[HANDLE]}:error"

    def _look(self) -> bool:
        there, failed = self.store.look(*self._keys())
        if failed:
            try:
                said = self.store.read(self._keys()[1]).numpy().tobytes().decode(errors="replace")
            except ValueError as error:
                said = f"nobody knows why, {error}"
            self.drop()
            raise StageError(f"the server could not write the hidden states of {self.item}: {said}", "see its log")
        return there


def _tensor(data: torch.Tensor, said: Mapping[str, Any]) -> torch.Tensor:
    """The tensor in `data` that is described so; it shares its memory. Raises where it cannot lie there."""
    dtype = getattr(torch, said["dtype"].removeprefix("torch."))
    shape, offset, size = list(said["shape"]), said["offset"], said["nbytes"]
    whole = offset % dtype.itemsize == 0 and size == math.prod(shape) * dtype.itemsize
    if not whole or min([offset, *shape]) < 0 or offset + size > len(data):
        raise ValueError(f"no tensor lies so in {len(data)} bytes: {dict(said)}")
    return data[offset : offset + size].view(dtype).view(shape)
