"""Reads hidden states from a Mooncake store, where hs-connectors' MooncakeHiddenStatesConnector writes them.

The connector stores the hidden states of every request as one object, whether the request asked for them or not. The
answer's `kv_transfer_params` are its manifest:

- `version`: of the manifest's format, 1.
- `handle`: the object's key. The object appears complete, or `HANDLE:error`, JSON, appears instead and says why.
- `tensors`: `hidden_states` [T, L, H] in the target's compute dtype and `token_ids` int64 [T]; for each its `dtype`
  (`torch.bfloat16`), its `shape`, and its byte range in the object, `offset` and `nbytes`.
- `metadata.total_aligned_bytes`: the size of the object.

The reader deletes an object. One whose answer was lost stays until the store evicts it.
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

from speculators.config.execution import Mooncake
from speculators.errors import ServiceError, StageError
from speculators.packages import install_command
from speculators.timeouts import MOONCAKE_MASTER_SECONDS

HANDLE = "handle"
"""Field of `kv_transfer_params` that marks a manifest of this connector."""
VERSION = 1
"""The manifest version that this module reads."""


class MooncakeStore:
    """A connection to a Mooncake store, opened at its first use. Its methods may be called from any thread.

    It contributes no memory to the store, so the store loses no object when it closes.
    """

    def __init__(self, options: Mooncake) -> None:
        self.options = options
        self._connection: Any = None
        self._connect_lock = threading.Lock()

    def exists(self, *keys: str) -> list[bool]:
        """Whether there is an object under each key.

        Raises:
            ServiceError: the store does not answer.
        """
        statuses = self._connected().batch_is_exist(list(keys))
        if min(statuses) < 0:
            raise self._unusable(f"status {min(statuses)}")
        return list(map(bool, statuses))

    def read(self, key: str) -> torch.Tensor:
        """Read an object's bytes, uint8 [size].

        Raises:
            ValueError: the object, or the server that holds it, is gone.
        """
        store = self._connected()
        if (size := store.get_size(key)) < 0:
            raise ValueError(f"status {size}")
        # Into memory that the tensors share: Mooncake's other calls copy through a buffer that limits the size.
        data = torch.empty(size, dtype=torch.uint8)
        store.register_buffer(data.data_ptr(), size)
        status = store.get_into(key, data.data_ptr(), size)
        store.unregister_buffer(data.data_ptr())
        if status != size:
            raise ValueError(f"status {status}")
        return data

    def remove(self, *keys: str) -> None:
        """Delete the objects that exist. One that cannot be deleted is left to the store's eviction."""
        for key in keys:
            self._connected().remove(key, force=True)  # a read leases the object for some seconds; force overrides it

    def close(self) -> None:
        """Release the connection. Mooncake's own `close` would crash calls in other threads; the last one ends it."""
        self._connection = None

    def _connected(self) -> Any:
        with self._connect_lock:
            self._connection = self._connection or self._connect(self.options)
            return self._connection

    def _connect(self, options: Mooncake) -> Any:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:  # the package, or a system library that it needs
            raise ServiceError(
                f"Mooncake's client cannot be loaded: {error}",
                f"{install_command('mooncake')} and apt install libibverbs1 (needed without RDMA too)",
            ) from None
        host, _, port = options.master.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=MOONCAKE_MASTER_SECONDS) as probe:
                local_address = probe.getsockname()[0]
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from None
        store = MooncakeDistributedStore()
        status = store.setup(local_address, options.metadata, 0, 0, options.protocol, options.device, options.master)
        if status:
            raise self._unusable(f"connecting failed with status {status}")
        return store

    def _unusable(self, reason: str) -> ServiceError:
        return ServiceError(
            f"the Mooncake store at {self.options.master} cannot be used: {reason}",
            "start its master (`mooncake_master --rpc_port PORT`), or name the one that the server uses: "
            "serve.mooncake.master=HOST:PORT",
        )


@dataclass(frozen=True, slots=True)
class MooncakeTransfer:
    """A `transfer.Transfer` through an object in a Mooncake store."""

    manifest: Mapping[str, Any]
    """The `kv_transfer_params` of the answer."""
    store: MooncakeStore
    item: str
    """The name of the request in errors."""

    def access_error(self, url: str) -> ServiceError | None:
        version = self.manifest.get("version")
        if version == VERSION:
            return None
        return ServiceError(
            f"the server at {url} sent a manifest of version {version} for the hidden states of {self.item}; this "
            f"release reads version {VERSION}",
            "pip install hs-connectors==0.9.0 in the server's environment",
        )

    async def complete(self) -> bool:
        return await asyncio.to_thread(self._complete)

    def timeout_error(self, seconds: float) -> ServiceError:
        return ServiceError(
            f"the hidden states of {self.item} did not appear in the Mooncake store at "
            f"{self.store.options.master} within {seconds:g} s",
            "set serve.mooncake.master to the server's; if the store is too small for all requests in flight, raise "
            "serve.mooncake.segment_gib or lower extract.concurrency",
        )

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            data, size = self.store.read(self.manifest[HANDLE]), self.manifest["metadata"]["total_aligned_bytes"]
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes, expected {size}")
            tensors = {name: _tensor(data, entry) for name, entry in self.manifest["tensors"].items()}
            return tensors["token_ids"], tensors["hidden_states"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"{self.item}: the hidden states in {self.manifest[HANDLE]} cannot be read: "
                f"{type(error).__name__}: {error}",
                "see the server's log; status -704 means that the store evicted them: raise serve.mooncake.segment_gib",
            ) from None
        finally:
            self.delete()

    def delete(self) -> None:
        self.store.remove(*self._keys())

    def _keys(self) -> tuple[str, str]:
        """The keys of the object and of the error that may appear in its place."""
        return self.manifest[HANDLE], f"{self.manifest[HANDLE]}:error"

    def _complete(self) -> bool:
        complete, failed = self.store.exists(*self._keys())
        if failed:
            try:
                reason = self.store.read(self._keys()[1]).numpy().tobytes().decode(errors="replace")
            except ValueError as error:
                reason = f"the reason cannot be read, {error}"
            self.delete()
            raise StageError(
                f"the server could not write the hidden states of {self.item}: {reason}", "see the server's log"
            )
        return complete


def _tensor(data: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    """View a byte range of `data`, uint8 [size], as the tensor that a manifest entry describes.

    Raises:
        ValueError: the range does not fit the shape or the data.
    """
    dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
    shape, offset, size = list(entry["shape"]), entry["offset"], entry["nbytes"]
    consistent = offset % dtype.itemsize == 0 and size == math.prod(shape) * dtype.itemsize
    if not consistent or min([offset, *shape]) < 0 or offset + size > len(data):
        raise ValueError(f"the manifest entry does not fit an object of {len(data)} bytes: {dict(entry)}")
    return data[offset : offset + size].view(dtype).view(shape)
