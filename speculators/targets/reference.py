"""Reference: a few tokens through the target as transformers runs it, to see which layers were captured.

Norm and head judge the last-layer hidden state alone. The other layers are the draft's input; off by one layer, or
from other weights, they look like any hidden states. Checking them takes the whole model, so it is for small targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculators.targets.checkpoint import TargetCheckpoint

ROWS = 2
"""Rows whose first tokens are run."""
NEARER_FACTOR = 0.5
"""Another layer was captured if its distance is smaller by this factor: in a deep model, neighbours are similar."""
TOLERANCE = 8.0
"""Standard deviations of the rounding error by which a hidden state may differ from its reference, plus `SLACK`."""
SLACK = 2e-3
"""Relative difference that is tolerated without any rounding."""
MEASURED_FACTOR = 2.0
"""Where that is exceeded: multiple of the target's own rounding error, measured, by which they may differ."""


class LayerComparison(NamedTuple):
    """The result of comparing captured layers with the reference."""

    problem: str = ""
    """What is wrong; empty if nothing is, or if the reference could not be run."""
    difference: float | None = None
    """Largest relative difference of a captured layer from its reference; None if the reference could not be run."""
    note: str = ""
    """Why the reference could not be run."""


def compare_layers(
    target: TargetCheckpoint,
    samples: Sequence[tuple[Tensor, Tensor]],
    layer_ids: Sequence[int],
    drift: float,
    compute_dtype: torch.dtype,
    max_gib: float,
) -> LayerComparison:
    """Compare captured hidden states with the layers of the target as transformers computes them.

    Args:
        target: the checkpoint to run.
        samples: (token ids [T], hidden states [T, L, H]) of the beginnings of some rows.
        layer_ids: the L layers that were requested.
        drift: standard deviation of the rounding error of a hidden state, relative to its norm.
        compute_dtype: what the server computes in. A target may amplify rounding more than `drift` says, as random
            weights do; then it is run in this dtype, too, to measure by how much.
        max_gib: largest checkpoint that is run.
    """
    gib = target.bytes / 2**30
    if gib > max_gib:
        return LayerComparison(note=f"the target has {gib:.3g} GiB, target.max_reference_gib is {max_gib:g}")
    try:
        references = _run_target(target, [token_ids for token_ids, _ in samples])
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return LayerComparison(note=f"transformers does not run the target: {type(error).__name__}: {error}")
    # [tokens, L, layers + 1], then the median over tokens: the first token of a sequence is like no other.
    distances = [_distances(captured, layers) for (_, captured), layers in zip(samples, references, strict=True)]
    distance = torch.cat(distances).nanmedian(0).values
    # The last layer may have been kept at none of these tokens.
    known = [i for i in range(len(layer_ids)) if not distance[i].isnan().any()]
    distance, layer_ids = distance[known], [layer_ids[i] for i in known]
    nearest = distance.argmin(-1).tolist()
    wrong = [
        f"{near} instead of {layer}"
        for row, layer, near in zip(distance, layer_ids, nearest, strict=True)
        if row[near] < NEARER_FACTOR * row[layer]
    ]
    limit = TOLERANCE * drift + SLACK
    smallest = float(distance.min(-1).values.max())
    if smallest > limit:
        rounded = _run_target(target, [token_ids for token_ids, _ in samples], compute_dtype)
        errors = [_distances(captured, layers) for captured, layers in zip(rounded, references, strict=True)]
        limit = max(limit, MEASURED_FACTOR * float(torch.cat(errors).median(0).values.diagonal().max()))
    if smallest > limit:
        return LayerComparison(
            f"they come from other weights: they differ from every layer of this target by {smallest:.2g} of their "
            f"norm, rounding explains {limit:.2g}",
            smallest,
        )
    if wrong:
        return LayerComparison(f"they are of other layers: {', '.join(wrong)}", smallest)
    largest = float(max(row[layer] for row, layer in zip(distance, layer_ids, strict=True)))
    return LayerComparison(difference=round(largest, 4))


def _distances(captured: Tensor, layers: Tensor) -> Tensor:
    """Relative distance of every captured layer [T, L, H] from every layer [T, layers + 1, H]."""
    captured, layers = captured.float()[:, :, None], layers.float()[:, None]
    return (captured - layers).norm(dim=-1) / layers.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _run_target(target: TargetCheckpoint, rows: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """For each row of token ids [T], the input of every layer and the last one's output, [T, layers + 1, H]."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(target.directory), local_files_only=True, dtype=dtype, output_loading_info=True
    )
    model, loading_info = loaded
    if loading_info["missing_keys"]:
        raise ValueError(f"weights are missing, {sorted(loading_info['missing_keys'])[0]} for one")
    model.eval()
    layers = _decoder_layers(model, int(target.config["num_hidden_layers"]))
    captured: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args[0] if args else kwargs["hidden_states"])[0])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        captured.append((output[0] if isinstance(output, tuple) else output)[0])

    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    hidden_states = []
    for token_ids in rows:
        captured.clear()
        model(token_ids[None].long(), use_cache=False)
        hidden_states.append(torch.stack(captured, 1))
    return hidden_states


def _decoder_layers(model: Any, count: int) -> Any:
    """Find the decoder layers: the module list of the length that the config names."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"it has no list of {count} layers")
    return lists[0]
