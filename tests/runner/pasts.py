"""Run directories as runs leave them, for the tests of what looks back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speculators.config import compose
from speculators.config.fields import to_builtins
from speculators.job import write_json
from speculators.runner.execution.events import Events
from speculators.runner.store.artifacts import Store
from tests.conftest import EVALUATION, publish_files

KEY = "ab" * 32
RESULTS = {"acceptance_length": {"human_eval": 2.0, "sharegpt": 3.0}, "speed_up": {"human_eval": 1.5, "sharegpt": 1.0}}


def past(
    runs: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    status: str = "done",
    process: dict[str, Any] | None = None,
    speed_up: float = 1.5,
    argv: Sequence[str] = ("recipe=tiny", "train.lr=1e-3"),
) -> Path:
    """A run that trained, evaluated and found the tokens; `failed`: in evaluate; empty: killed there, no run.json."""
    path = (runs / name).resolve()
    path.mkdir(parents=True)
    write_json(path / "config.json", {"recipe": "tiny", "run": {"dir": str(runs)}, **(config or {})})
    events = Events(path / "events.jsonl")
    events.emit("run.started", recipe="tiny", run=name, words=list(argv), process=process or {})
    events.emit("stage.decided", node="tokenize", state="cached", reason="made by earlier", key=KEY)
    events.emit("stage.decided", node="train", state="run", reason="changed: train.lr 1 -> 2", key=KEY)
    events.emit("stage.started", node="train", log=str(path / "logs/train.log"), phase=0, phases=1, attempt=2)
    record = {"validation": {"acceptance_length": 1.5, "loss": 9.0, "loss_0": 3.0}, "steps": 10}
    events.emit("stage.finished", node="train", seconds=61.0, record=record, key=KEY)
    events.emit("stage.decided", node="evaluate", state="run", reason="upstream: speculator", key=KEY)
    events.emit("stage.started", node="evaluate", log=str(path / "logs/evaluate.log"), phase=0, phases=1)
    if status == "done":
        measured = {**RESULTS, "speed_up": {"human_eval": speed_up, "sharegpt": 1.0}}
        events.emit("stage.finished", node="evaluate", seconds=3.0, record=measured, key=KEY)
    elif status == "failed":
        events.emit("stage.failed", node="evaluate", message="evaluate was killed by SIGKILL\n\nits log")
    if status:
        steps = {n: {"stage": n, "state": "cached", "reason": "", "key": KEY} for n in ("tokenize", "train")}
        write_json(path / "run.json", {"status": status, "seconds": 65.0, "steps": steps})
        events.emit("run.finished", status=status, seconds=65.0)
    events.close()
    return path


def trained(
    runs: Path,
    name: str,
    store: Store,
    *,
    verifier: str = "org/target",
    measured: bool = True,
    evaluated: dict[str, Any] = EVALUATION,
    **others: Any,
) -> Path:
    """A run that ended in a draft for `verifier`, with the options of the demo; `measured`: and evaluated it."""
    config = to_builtins(compose.compose(["recipe=smollm2_eagle3"]))
    path = past(runs, name, config={**config, "recipe": "tiny"}, **others)
    checkpoint = {
        "draft_vocab_size": 12000,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"speculative_tokens": 7}],
            "verifier": {"name_or_path": verifier},
        },
    }
    summary = {"steps": 40, "best_step": 20, "tokens": 1234, "parameters": 99, "validation_rows": 6}
    files = {
        "best/config.json": json.dumps(checkpoint),
        "best/model.safetensors": "weights",
        "best/README.md": "# As training left it",
        "metrics.jsonl": "{}\n",
        "summary.json": json.dumps({**summary, "validation": {"acceptance_length": 1.625}}),
    }
    draft = publish_files(store, files, run=name)
    steps = {"train": {"stage": "train", "path": str(draft.data), "key": draft.key, "inputs": {}}}
    if measured:
        results = {**evaluated, "dtype": "float32", "temperature": 0.0, "max_tokens": 128}
        evaluation = publish_files(store, {"evaluation.json": json.dumps(results)}, stage="evaluate", run=name)
        inputs = {"speculator": "train"}
        steps["evaluate"] = {"stage": "evaluate", "path": str(evaluation.data), "key": evaluation.key, "inputs": inputs}
    write_json(path / "run.json", {"status": "done", "seconds": 65.0, "steps": steps})
    return path
