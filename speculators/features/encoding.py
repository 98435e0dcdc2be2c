"""Encodes and decodes hidden states for storage: in a floating-point dtype, or in float8 with scales.

float8 is e4m3 with one scale for each token and layer, because magnitudes differ by orders between layers, and between
a sequence's first token and the others; a scale over several would spend the dtype's range on that. A scale is the
smallest power of two with which the token's largest value of that layer fits, so

- it is exact in bfloat16, and so is every value times its scale: decoding does not round;
- encoding decoded values again changes none of them. An engine may export float8, all code in between handles floats,
  and storing them rounds no second time.

Accuracy: with A the largest magnitude of a token's layer, a value x with |x| >= A / 14336 is decoded within |x| / 16, a
smaller one within A / 229376. Massive activations, some ten thousand times the rest, leave the rest its precision.
A token's layer that holds NaN or an infinity gets the scale NaN, so that all of it is decoded to NaN.

The engine's process imports this module, so it imports torch and nothing else that is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from speculators.errors import StageError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest value of e4m3, 0.875 * 2**9."""
SIGN_AND_VALUE = 0x87F0 - 0x10000
"""Mask, as int16, of the bits of bfloat16 that an e4m3 value shifted left by 4 occupies."""
BIAS_FACTOR, LARGEST_FACTOR = 2.0**120, 2.0**127
"""2**(127 - 7), the difference of the two dtypes' exponent biases; the largest power of two in bfloat16."""
LAST = {"scales": "last_scales", "states": "last"}
"""Tensor of `encode` -> name of the last layer's part of it, where that is kept apart."""
CHUNK_ELEMENTS = 1 << 19
"""Values decoded at a time on a CPU: 1 MiB in bfloat16, which stays in the cache."""
SMALLEST_EXPONENT = -100
"""Smallest exponent of a scale. Keeps products of value and scale in the range of normal numbers."""


def quantize(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize hidden states [..., H] to float8 e4m3 [..., H] and scales, bfloat16 [...].

    Scales are powers of two, NaN where a value is not finite. Does not synchronize with an accelerator.
    """
    largest = hidden_states.abs().amax(-1).float()
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2**exponent, 0.5 <= fraction < 1
    exponent = torch.where(fraction <= LARGEST / 512, exponent - 9, exponent - 8)
    # Built from its bits, because pow() need not be exact on every device.
    bits = (exponent.clamp(SMALLEST_EXPONENT, 120) + 127) << 7
    scales = bits.to(torch.int16).view(torch.bfloat16)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    return (hidden_states.float() / scales.float().unsqueeze(-1)).to(FLOAT8), scales


def dequantize(quantized: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values times scales, exact, in the dtype of the scales: bfloat16 (written to `out` if given) or float32."""
    if scales.dtype is not torch.bfloat16:
        return dequantize(quantized, torch.ones_like(scales, dtype=torch.bfloat16)) * scales.unsqueeze(-1)
    # By bit operations, since torch converts float8 ten times slower on a CPU. The bits of e4m3, shifted to the sign,
    # exponent and fraction of bfloat16, are the value times 2**-120, subnormal numbers included.
    out = torch.empty_like(quantized, dtype=torch.bfloat16) if out is None else out
    step, factors = max(1, len(out)), [torch.full_like(scales, BIAS_FACTOR), scales]
    if out.device.type == "cpu" and out.numel():
        # Chunks that stay in the cache; one multiplication instead of two where the product cannot overflow.
        step = max(1, CHUNK_ELEMENTS // out[0].numel())
        if bool(scales.amax() <= LARGEST_FACTOR / BIAS_FACTOR):
            factors = [scales * BIAS_FACTOR]
    for begin in range(0, len(out), step):
        chunk = slice(begin, begin + step)
        bits = out[chunk].view(torch.int16).copy_(quantized[chunk].view(torch.int8))
        bits <<= 4
        bits &= SIGN_AND_VALUE
        for factor in factors:
            out[chunk] *= factor[chunk].unsqueeze(-1)
    return out


def encode(item: str, hidden_states: torch.Tensor, stored: str) -> dict[str, torch.Tensor]:
    """Encode hidden states [T, L, H] in the dtype named `stored`: `states`, and for float8 `scales` [T, L].

    Raises:
        StageError: a value is not finite, or too large for the dtype; the message begins with `item`.
    """
    dtype: torch.dtype = getattr(torch, stored)
    if dtype is FLOAT8:
        quantized, scales = quantize(hidden_states)
        encoded, checked = {"scales": scales, "states": quantized}, scales
    else:
        checked = hidden_states.to(dtype)
        encoded = {"states": checked}
    if not bool(torch.isfinite(checked).all()):
        raise StageError(
            f"{item}: the hidden states cannot be stored in {stored}: a value is not finite, or too large",
            "if they overflow float16, set extract.dtype=bfloat16; else the target itself overflows",
        )
    return encoded


def split_last_layer(encoded: Mapping[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split what `encode` returns into the draft's layers at every position and the last layer where `mask` is true.

    Args:
        encoded: tensors of T tokens and L layers, the last one included.
        mask: bool [T]; the last layer is only needed at supervised positions.
    """
    last = {LAST[name]: tensor[mask, -1] for name, tensor in encoded.items()}
    return {**{name: tensor[:, :-1].contiguous() for name, tensor in encoded.items()}, **last}


def last_layer_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last layer's tensors under the names that `decode` takes: `states` [U, H], and `scales` [U] for float8."""
    return {name: tensors[last] for name, last in LAST.items() if last in tensors}


def layout(layers: int, hidden_size: int, stored: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape) of one token after `split_last_layer`; for the tensors in `LAST`, of one entry.

    `layers` counts all captured layers, the last one included.
    """
    dtype: torch.dtype = getattr(torch, stored)
    scales = {"scales": (torch.bfloat16, (layers - 1,)), "last_scales": (torch.bfloat16, ())}
    values = {"states": (dtype, (layers - 1, hidden_size)), "last": (dtype, (hidden_size,))}
    return {**(scales if dtype is FLOAT8 else {}), **values}


def decode(tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode `states` [..., H]: float8 to bfloat16 (in `out` if given), other dtypes are returned as they are."""
    if "scales" in tensors:
        return dequantize(tensors["states"], tensors["scales"], out)
    return tensors["states"]


def copy_prefix(encoded: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
    """Copy the first entries of each encoded tensor into the tensor of the same name; its length is their number."""
    for name, tensor in into.items():
        tensor.copy_(encoded[name][: len(tensor)])


def bytes_per_token(layers: int, hidden_size: int, stored: str) -> tuple[int, int]:
    """Bytes of one token without the last layer, and bytes of one entry of the last layer."""
    each = {n: d.itemsize * math.prod(s) for n, (d, s) in layout(layers, hidden_size, stored).items()}
    last = sum(each.get(name, 0) for name in LAST.values())
    return sum(each.values()) - last, last
