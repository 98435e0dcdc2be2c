"""Used by upstream's interpreter: a checkpoint as upstream's package loads it, in float32 and without kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.model import SpeculatorModel


def load(checkpoint: str, saved_to: str = "") -> tuple[Any, Any]:
    """The model, and what loading said about its tensors; saved again by upstream's own means on the way if asked."""
    loaded = SpeculatorModel.from_pretrained(checkpoint, dtype=torch.float32)
    if saved_to:
        loaded.save_pretrained(saved_to)
    loaded.config.transformer_layer_config._attn_implementation = "eager"
    model = type(loaded)(loaded.config)
    saved = load_file(f"{checkpoint}/model.safetensors")
    model.load_vocab_mappings(saved.get("t2d"), saved.get("d2t"))
    found = model.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in saved.items()}, strict=False
    )
    model.load_verifier_weights()
    return model, found


def answer(found: Any, taken: Iterable[str], loss: torch.Tensor, metrics: Mapping[str, Any]) -> None:
    """Print one line of JSON; `taken` are tensors that come from the target."""
    said = {
        "loss": float(loss),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "missing": [name for name in found.missing_keys if name not in taken],
        "unexpected": list(found.unexpected_keys),
    }
    print(json.dumps(said))
