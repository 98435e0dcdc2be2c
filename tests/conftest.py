"""Worlds that tests are built in."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.schema import Config
from speculators.runner.planning import key as keys
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifact import Artifact
from speculators.runner.store.artifacts import Store

# Tests are small and run beside each other: threads that wait for a core would keep their whole team waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts the commands that it puts into the background with SIGINT ignored, and every child inherits that: the
# processes that tests interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The stories on the real engine first: they take longest, and all other tests run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("smoke") is None)


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or touches the store, or what lies beside it, of whoever runs it."""
    monkeypatch.setenv("SPECULATORS_STORE", str(tmp_path / "store"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def config() -> Config:
    return compose.compose(["recipe=smollm2_eagle3"])


SIDE = {"tokens_per_second": 31.25, "ms_per_token": 32.0}
ROW: dict[str, object] = {
    "num_speculative_tokens": 3,
    "concurrency": 1,
    "acceptance_length": 1.5,
    "per_position": [0.3, 0.15, 0.05],
    "baseline": SIDE,
    "speculative": SIDE,
    "speed_up": 1.0,
}
EVALUATION = {
    "num_speculative_tokens": 3,
    "datasets": {name: {**ROW, "measurements": [ROW]} for name in ("human_eval", "sharegpt")},
    "lossless": {"dtype": "float32", "prompts": 64, "identical": 64, "ties": 0, "faults": 0},
}
"""What `evaluate` leaves, as far as the runner looks into it."""


def write_header(path: Path, vocab: int, hidden: int, **others: list[int] | None) -> None:
    """A safetensors file of a tied decoder as far as the runner looks into one: its header, and no weights.

    `others` are further tensors, or None for one of the usual ones that is missing.
    """
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden], **others}
    tensors = {n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items() if s is not None}
    header = json.dumps(tensors).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


USABLE_ROW = {
    "id": "row-1",
    "task_id": "row-1",
    "prompt": "How does a kettle work?",
    "conversations": [
        {"from": "human", "value": "How does a kettle work?"},
        {"from": "gpt", "value": "It heats water."},
    ],
}
"""A row that each of the demo's datasets can use."""


def publish(
    store: Store, planner: Planner, name: str, digests: dict[str, str], content: str = "", run: str = "earlier"
) -> str:
    """Put an artifact in the store as a run would have left it; gives its digest."""
    step = planner.step(name, digests)
    work = store.work(step.node.kind, step.key)
    (work / "data").mkdir(parents=True)
    facts = {"num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152}
    known = {"target": ("config.json", json.dumps(facts)), "evaluate": ("evaluation.json", json.dumps(EVALUATION))}
    rows = json.dumps([USABLE_ROW]) if name.startswith("dataset.") else name
    file, text = known.get(name, ("content", content or rows))
    (work / "data" / file).write_text(text)
    if name == "target":
        (work / "data" / "chat_template.jinja").write_text("{{ messages }}")
        write_header(work / "data" / "model.safetensors", facts["vocab_size"], facts["hidden_size"])
    made = {"preimage": step.preimage, "record": {}, "provenance": {"run": run, "node": name, "finished": "2026"}}
    artifact = store.publish(step.node.kind, step.key, **made, digest=step.digest or None)
    return artifact.digest


def publish_files(store: Store, files: dict[str, str], stage: str = "train", **config: object) -> Artifact:
    """Put an artifact of these files and options in the store, under the key that they give."""
    image = keys.preimage(stage, 1, config=config, inputs={}, packages={}, service={})
    key = keys.digest(image)
    with store.claim(stage, key, waiting=print):
        for name, text in files.items():
            path = store.work(stage, key) / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        told = {"preimage": image, "record": {"rows": 2}, "provenance": {"run": "earlier", "finished": "2026"}}
        return store.publish(stage, key, **told, digest=None)


def publish_all(store: Store, planner: Planner, run: str = "earlier") -> dict[str, str]:
    """A store in which every node of the recipe is made."""
    digests: dict[str, str] = {}
    for name in planner.graph:
        digests[name] = publish(store, planner, name, digests, run=run)
    return digests


OF_CHECKPOINT = ["target.num_hidden_layers=4", "target.hidden_size=8", "target.vocab_size=32", "vocab.size=16"]
OF_CHECKPOINT += ["speculator.target_layer_ids=null"]
"""What a recipe has to say of `checkpoint` where the demo's says something else."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model directory as far as the runner looks into one: 4 layers, and files that nobody reads here."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text('{"num_hidden_layers": 4, "hidden_size": 8, "vocab_size": 32}')
    write_header(path / "model.safetensors", vocab=32, hidden=8)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path
