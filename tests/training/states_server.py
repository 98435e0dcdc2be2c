"""A target whose states are known, and a server that hands them out as vLLM with our connector does.

Only the transport is played: the states are those of a small transformers model, computed once, so that whoever gets
them from a file and whoever gets them from the server gets the same bits.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
from safetensors.torch import save_file

from speculators.data.token_table import TokenTable, prediction_mask
from speculators.features.contract import ANSWERS, feature_contract
from speculators.features.shards import ShardWriter
from speculators.job import Endpoint
from tests.loopback import JsonHandler, serving

LAYER_IDS = [1, 3, 4, 6]
Known = dict[tuple[int, ...], torch.Tensor]
"""Token ids -> states [T, L, H] float32."""


def write_world(directory: Path, rows: int = 24) -> Known:
    """Target, tokens, vocabulary, and features as `extract` would have stored them."""
    known = write_target_and_tokens(directory, rows)
    tiny.write_vocabulary(directory / "vocab")
    contract = feature_contract(
        target="t" * 64, tokens="k" * 64, dtype="bfloat16", compute_dtype="float32",
        layer_ids=LAYER_IDS, hidden_size=tiny.H, last_state=ANSWERS,
    )  # fmt: skip
    writer = ShardWriter(directory / "features", contract, shard_tokens=200)
    table = TokenTable(directory / "tokens")
    for row, (ids, states) in enumerate(known.items()):
        writer.add(row, torch.tensor(ids), states, torch.from_numpy(prediction_mask(table.loss_mask(row))))
    writer.close()
    return known


@torch.no_grad()
def write_target_and_tokens(directory: Path, rows: int) -> Known:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in tiny.CONFIG.items() if k != "architectures"})).eval()
    model.save_pretrained(directory / "target")
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    model.model.norm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    table: dict[str, list[object]] = {name: [] for name in ("input_ids", "loss_mask", "seq_len", "id", "source")}
    draw, known = torch.Generator().manual_seed(5), {}
    for row in range(rows):
        length = int(torch.randint(8, 40, (), generator=draw))
        ids = torch.randint(tiny.V, (length,), generator=draw)
        entering.clear()
        model(ids[None])
        known[tuple(ids.tolist())] = torch.stack([entering[layer][0] for layer in LAYER_IDS], dim=1).contiguous()
        table["input_ids"].append(ids.tolist())
        table["loss_mask"].append([int(place >= max(1, length // 3)) for place in range(length)])
        table["seq_len"].append(length)
        table["id"].append(f"conversation-{row}")
        table["source"].append("random")
    datasets.Dataset.from_dict(table).save_to_disk(str(directory / "tokens"))
    return known


class StatesServer:
    """Answers extraction requests. `spoil` changes the tensors of an answer, `before` is called ahead of it."""

    def __init__(self, known: Known, directory: Path, model: str = "target-n1") -> None:
        self.known = known
        self.asked: list[tuple[int, ...]] = []
        """The prompt of every request."""
        self.spoil: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None
        self.before: Callable[[int], None] = lambda number: None
        """Gets the number of the request, from 1."""
        self.pick: Callable[[torch.Tensor], int] = lambda states: 7
        """The token that is answered, by the states of the prompt's last token [L, H]."""
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.http = serving(_handler(self, model))
        self.endpoint = Endpoint(
            url=f"http://127.0.0.1:{self.http.server_port}",
            model=model,
            api_key="k",
            mode="extract",
            directory=directory,
            log=directory / "server.log",
        )

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = tuple(body["prompt"])
        self.asked.append(ids)
        self.before(len(self.asked))
        name = f"{uuid.uuid4().hex}.safetensors"
        states = next(its[: len(ids)] for row, its in self.known.items() if row[: len(ids)] == ids)
        tensors = {"hidden_states": states.clone(), "token_ids": torch.tensor(ids)}
        self.spoil(tensors)
        save_file(tensors, self.directory / f"{name}.part")
        (self.directory / f"{name}.part").rename(self.directory / name)
        choice = {
            "text": "",
            "prompt_token_ids": list(ids),
            "token_ids": [self.pick(states[-1])],
            "finish_reason": "length",
        }
        return {"choices": [choice], "kv_transfer_params": {"hidden_states_file": name}}

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def _handler(server: StatesServer, model: str) -> type[JsonHandler]:
    class Handler(JsonHandler):
        protocol_version = "HTTP/1.1"

        def post(self, body: dict[str, Any]) -> None:
            if body["model"] != model:
                self.reply(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
                return
            try:
                answer = server.answer(body)
            except ConnectionError:
                self.close_connection = True
                return
            self.reply(200, answer)

    return Handler
