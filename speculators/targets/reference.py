"""A few tokens through the target as transformers runs it: which layers the captured states really are.

Norm and head can only judge the last state. The others go into the draft, and a capture that is off by a layer, or of
other weights, gives states that look like any. The whole model has to be built to tell, so it is done for small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculators.targets.checkpoint import TargetCheckpoint

ROWS = 2
"""Rows whose beginnings are run."""
CLEARLY = 0.5
"""Another layer is the captured one if it is nearer by this factor: neighbours look alike in a deep model."""
TOLERANCE = 8.0
"""Standard deviations of rounding by which a state may differ from its reference, and..."""
SLACK = 2e-3
"""... relative difference where nothing rounds."""


class LayerComparison(NamedTuple):
    """What a comparison found."""

    verdict: str = ""
    """What is wrong; empty if nothing is, or if it could not be found out."""
    off: float | None = None
    """Largest relative difference of a captured layer from its reference; None if it could not be found out."""
    note: str = ""
    """Why not."""


def compare_layers(
    target: TargetCheckpoint,
    samples: Sequence[tuple[Tensor, Tensor]],
    layer_ids: Sequence[int],
    drift: float,
    largest_gib: float,
) -> LayerComparison:
    """Compare samples of (token ids [T], states [T, L, H]) with the layers that they are said to be.

    `drift` is the standard deviation of what rounding does to a state, relative to it.
    """
    gib = target.bytes / 2**30
    if gib > largest_gib:
        return LayerComparison(note=f"the target has {gib:.3g} GiB, target.max_reference_gib is {largest_gib:g}")
    try:
        references = _run(target, [ids for ids, _ in samples])
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return LayerComparison(note=f"transformers does not run the target: {type(error).__name__}: {error}")
    # [rows, L, layers + 1] and then the median over everything but the layers: a first token is like no other
    off = torch.cat([_differences(states, truth) for (_, states), truth in zip(samples, references, strict=True)])
    off = off.nanmedian(0).values
    # The last layer's output may have been kept at none of these tokens.
    known = [place for place in range(len(layer_ids)) if not off[place].isnan().any()]
    off, layer_ids = off[known], [layer_ids[place] for place in known]
    nearest = off.argmin(-1)
    wrong = [
        (asked, int(found))
        for place, (asked, found) in enumerate(zip(layer_ids, nearest, strict=True))
        if off[place, found] < CLEARLY * off[place, asked]
    ]
    limit = TOLERANCE * drift + SLACK
    at_best = float(off.min(-1).values.max())
    if at_best > limit:
        return LayerComparison(
            f"they come from other weights: states differ from every layer of this target by {at_best:.2g} of their "
            f"size, rounding explains {limit:.2g}",
            at_best,
        )
    if wrong:
        pairs = ", ".join(f"{found} instead of {asked}" for asked, found in wrong)
        return LayerComparison(f"they are of other layers: {pairs}", at_best)
    return LayerComparison(off=round(float(max(off[place, asked] for place, asked in enumerate(layer_ids))), 4))


def _differences(states: Tensor, truth: Tensor) -> Tensor:
    """Relative distance of every captured layer of a token from every layer, [T, L, layers + 1]."""
    captured, truth = states.float()[:, :, None], truth.float()[:, None]
    return (captured - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _run(target: TargetCheckpoint, rows: Sequence[Tensor]) -> list[Tensor]:
    """For each row [T] the input of every layer and the last one's output, [T, layers + 1, H]."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(target.directory), local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    model, loaded = found
    if loaded["missing_keys"]:
        raise ValueError(f"weights are missing, {sorted(loaded['missing_keys'])[0]} for one")
    model.eval()
    layers = _layers(model, int(target.config["num_hidden_layers"]))
    kept: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept.append((args[0] if args else named["hidden_states"])[0])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0])

    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    states = []
    for ids in rows:
        kept.clear()
        model(ids[None].long(), use_cache=False)
        states.append(torch.stack(kept, 1))
    return states


def _layers(model: Any, count: int) -> Any:
    """The decoder layers: the list of as many modules as the config says there are."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"it has no list of {count} layers")
    return lists[0]
