"""A server that hands out hidden states of its own making as a connector does, and misbehaves on demand.

As a program, `states_server.py PORT MODEL`, it leaves them where vLLM would under a runner.
"""

from __future__ import annotations

import fcntl
import json
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.loopback import JsonHandler, serving

LAYERS, WIDTH = 2, 8


def states_of(token_ids: list[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What the server computes: [T, LAYERS, WIDTH], of each token by itself."""
    ids = torch.tensor(token_ids, dtype=torch.float32)
    return (ids[:, None, None] + torch.arange(LAYERS * WIDTH).view(LAYERS, WIDTH) / 16).to(dtype)


def as_float8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As hs-connectors writes float8: one scale a token, over all layers."""
    states = tensors["hidden_states"].float()
    scales = states.abs().amax((1, 2), keepdim=True) / 448
    return {**tensors, "hidden_states": (states / scales).to(torch.float8_e4m3fn), "hidden_states_scales": scales}


def packed(handle: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """What hs-connectors says of an object in a Mooncake store, and the object: each tensor begins at 64 bytes."""
    said, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        shape = list(tensor.shape)
        said[name] = {"shape": shape, "dtype": str(tensor.dtype), "nbytes": len(raw), "offset": len(data)}
        data += raw + bytes(-len(raw) % 64)
    metadata = {
        "num_tokens": len(tensors["token_ids"]),
        "total_aligned_bytes": len(data),
        "extract_mode": "prompt_only",
    }
    return {"handle": handle, "version": 1, "tensors": said, "metadata": metadata}, data


class StatesServer:
    """`trouble` maps the first token of a prompt to what goes wrong with its states."""

    def __init__(self, directory: Path, trouble: dict[int, str] | None = None, port: int = 0, model: str = "m") -> None:
        self.directory = directory
        self.trouble = dict(trouble or {})
        self.asked: list[list[int]] = []
        """Prompts whose states were asked for."""
        self.connector = "ours"
        """`ours`, or vLLM's `example`, hs-connectors' `fp8` and `mooncake`, which write the states of every request."""
        self.put: Callable[[str, bytes], Any] = lambda key, data: None
        """What `mooncake` puts an object with."""
        self.dies_after = 1 << 30
        self.stopping = threading.Lock()
        outer = self

        class Handler(JsonHandler):
            def get(self) -> None:
                self.reply(200, {"data": [{"id": model}], "version": "1.2.3"})

            def post(self, body: dict[str, Any]) -> None:
                if len(outer.asked) >= outer.dies_after:
                    outer.stop()  # nobody is let in any more, and this one is left without an answer
                    self.close_connection = True
                    return
                self.reply(*outer.answer(body))

        self.http = serving(Handler, port)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body for one completion; its states are written on the way."""
        prompt: list[int] = fields["prompt"]
        choice = {"text": "x", "prompt_token_ids": prompt, "token_ids": [1], "finish_reason": "length"}
        if self.connector == "mooncake":
            return 200, {"choices": [choice], "kv_transfer_params": self.write_object(prompt)}
        if self.connector != "ours":
            return 200, {"choices": [choice], "kv_transfer_params": self.write_locked(prompt)}
        if not fields.get("kv_transfer_params"):
            return 200, {"choices": [choice]}
        self.asked.append(prompt)
        trouble = self.trouble.get(prompt[0], "")
        if trouble == "refused":
            return 400, {"error": {"message": "too long"}}
        name = f"{uuid.uuid4().hex}.safetensors"
        self.write(self.directory / name, prompt, trouble)
        return 200, {"choices": [choice], "kv_transfer_params": {"hidden_states_file": name}}

    def write(self, path: Path, prompt: list[int], trouble: str) -> None:
        """The states of one prompt, or what goes wrong."""
        if trouble == "unwritten":
            path.with_name(f"{path.name}.error").write_text("OSError: No space left on device")
            return
        states, ids = states_of(prompt), torch.tensor(prompt)
        if trouble == "nan":
            states[-1, 0, 3] = float("nan")
        if trouble == "tokens":
            ids = ids + 1
        if trouble == "layers":
            states = states[:, :1].contiguous()
        if trouble == "dtype":
            states = states.float()
        beside = path.with_suffix(".part")
        save_file({"hidden_states": states, "token_ids": ids}, beside)
        if trouble == "truncated":
            beside.write_bytes(beside.read_bytes()[:-8])
        beside.rename(path)

    def write_locked(self, prompt: list[int]) -> dict[str, str]:
        """As the stock connectors do: the answer names a path, which is whole once its lock is given back."""
        self.asked.append(prompt)
        path = self.directory / f"cmpl-{uuid.uuid4().hex}-0.safetensors"
        lock = Path(f"{path}.lock").open("w")  # noqa: SIM115 (held until the states are written)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            with lock:
                if self.trouble.get(prompt[0]) != "unwritten":
                    tensors = {"hidden_states": states_of(prompt), "token_ids": torch.tensor(prompt)}
                    save_file(as_float8(tensors) if self.connector == "fp8" else tensors, path)

        threading.Timer(0.005, write).start()
        return {"hidden_states_path": f"/where/the/server/is/{path.name}"}

    def write_object(self, prompt: list[int]) -> dict[str, Any]:
        """As hs-connectors' Mooncake connector does: the answer describes an object, which appears later."""
        self.asked.append(prompt)
        trouble, tensors = self.trouble.get(prompt[0], ""), {"hidden_states": states_of(prompt)}
        handle = f"cmpl-{uuid.uuid4().hex}-0"
        manifest, data = packed(handle, tensors | {"token_ids": torch.tensor(prompt)})
        states = manifest["tensors"]["hidden_states"]
        if trouble == "version":
            manifest["version"] = 2
        if trouble == "outside":
            states["offset"] += len(data)
        if trouble == "before":
            states["offset"] = -64
        if trouble == "crooked":
            states["offset"] = 1
        if trouble == "shape":
            states["shape"] = [len(prompt), LAYERS, WIDTH + 1]
        if trouble == "type":
            states["dtype"] = "torch.nn"
        if trouble == "nameless":
            del manifest["tensors"]["token_ids"]
        if trouble == "truncated":
            data = data[:-64]
        if trouble == "unwritten":
            handle, data = f"{handle}:error", json.dumps({"error": "Non-finite producer tensor"}).encode()
        if trouble != "never":
            threading.Timer(0.005, self.put, (handle, data)).start()
        return manifest

    def stop(self) -> None:
        with self.stopping:
            self.http.shutdown()
            self.http.server_close()


if __name__ == "__main__":
    StatesServer(Path("states").absolute(), port=int(sys.argv[1]), model=sys.argv[2])
    threading.Event().wait()
