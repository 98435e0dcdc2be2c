"""A program that plays vLLM with hs-connectors' Mooncake connector, on a real store: `MASTER [hs-connectors]`.

It says its URL, and ends with its standard input. With `hs-connectors` that package writes the objects.
"""

from __future__ import annotations

import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import torch
from mooncake.store import MooncakeDistributedStore

from tests.stages.states_server import StatesServer, states_of

SEGMENT = 64 * 2**20


class TheirServer(StatesServer):
    """hs-connectors describes the objects, and puts them."""

    def __init__(self, master: str) -> None:
        from hs_connectors.mooncake_store import MooncakeHiddenStatesStore, MooncakeStoreConfig

        super().__init__(Path())
        options = MooncakeStoreConfig(
            local_hostname="127.0.0.1",
            master_server_address=master,
            global_segment_size=SEGMENT,
            local_buffer_size=SEGMENT,
        )
        self.store = MooncakeHiddenStatesStore(options).setup()

    def write_object(self, prompt: list[int]) -> dict[str, Any]:
        from hs_connectors.mooncake_store import VERSION, packed_layout

        tensors = {"hidden_states": states_of(prompt), "token_ids": torch.tensor(prompt)}
        said, size = packed_layout({name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        handle = f"cmpl-{uuid.uuid4().hex}-0"
        manifest = {"handle": handle, "version": VERSION, "tensors": said, "metadata": {"total_aligned_bytes": size}}
        if self.trouble.get(prompt[0]) == "unwritten":
            put = threading.Timer(0.005, self.store.put_error, (manifest, "Non-finite producer tensor"))
        else:
            put = threading.Timer(0.005, self.store.put_sample, (manifest, tensors))
        put.start()
        return manifest


def serve(master: str, writer: str) -> StatesServer:
    if writer == "hs-connectors":
        return TheirServer(master)
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", SEGMENT, SEGMENT, "tcp", "", master) == 0
    server = StatesServer(Path())
    server.put = store.put
    return server


if __name__ == "__main__":
    server = serve(*sys.argv[1:])
    server.connector, server.trouble = "mooncake", {99: "unwritten"}
    print(server.url, flush=True)
    sys.stdin.read()
