"""How hidden states are stored: in a floating-point type as they are, or in float8 with scales.

float8 is e4m3 with one scale for every token and layer, because magnitudes differ by orders between layers, and between
a sequence's first token and the rest: a scale over several would spend the type's range on that. A scale is the
smallest power of two under which the token's largest value of that layer fits, so

- it is exact in bfloat16, and so is every value times its scale: decoding rounds nothing;
- encoding what was decoded changes no value. States that an engine hands out in float8 can be handled as floats, and
  are stored again without a second rounding.

How exact: with A the largest magnitude of a token's layer, a value x with |x| >= A / 14336 comes back within |x| / 16,
a smaller one within A / 229376. Massive activations, some ten thousand times the rest, leave the rest its precision.
A token's layer that holds NaN or an infinity gets the scale NaN: nothing of it comes back as a number.

An engine's process imports this module: it needs torch and nothing else that is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from speculators.errors import StageError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3: 0.875 * 2**9."""
SIGN_AND_VALUE = 0x87F0 - 0x10000
"""As int16: the bits of e4m3 in bfloat16."""
MISSING, LARGEST_FACTOR = 2.0**120, 2.0**127
"""What those bits have to be multiplied by, and the largest power of two in bfloat16."""
LAST = {"scales": "last_scales", "states": "last"}
"""How the last layer's part of what `encode` makes is called where it is kept apart."""
CHUNK_ELEMENTS = 1 << 19
"""Values that are decoded at a time on a CPU: 1 MiB in bfloat16."""
SMALLEST_EXPONENT = -100
"""Of a scale. Smaller states than any that matter become zero, and no product leaves the normal numbers."""


def quantise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [..., H] as float8 [..., H] and their scales, bfloat16 [...]: powers of two, NaN where one is not finite.

    On an accelerator nothing waits for it.
    """
    largest = states.abs().amax(-1).float()
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2**exponent, 0.5 <= fraction < 1
    exponent = torch.where(fraction <= LARGEST / 512, exponent - 9, exponent - 8)
    # From its bits, because a power that is computed need not be exact on every device.
    bits = (exponent.clamp(SMALLEST_EXPONENT, 120) + 127) << 7
    scales = bits.to(torch.int16).view(torch.bfloat16)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    return (states.float() / scales.float().unsqueeze(-1)).to(FLOAT8), scales


def dequantise(quantised: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What `quantise` kept, exactly, in the type of the scales: bfloat16 (in `out`, if it is given) or float32."""
    if scales.dtype is not torch.bfloat16:
        return dequantise(quantised, torch.ones_like(scales, dtype=torch.bfloat16)) * scales.unsqueeze(-1)
    # By its bits, since on a CPU torch converts float8 value by value, which takes ten times as long: with the sign in
    # its place, exponent and fraction read as bfloat16 are the value times 2**-120, subnormal ones too.
    out = torch.empty_like(quantised, dtype=torch.bfloat16) if out is None else out
    step, factors = max(1, len(out)), [torch.full_like(scales, MISSING), scales]
    if out.device.type == "cpu" and out.numel():
        # As many at a time as stay in its cache, and no pass over them that can be saved.
        step = max(1, CHUNK_ELEMENTS // out[0].numel())
        if bool(scales.amax() <= LARGEST_FACTOR / MISSING):
            factors = [scales * MISSING]
    for begin in range(0, len(out), step):
        some = slice(begin, begin + step)
        bits = out[some].view(torch.int16).copy_(quantised[some].view(torch.int8))
        bits <<= 4
        bits &= SIGN_AND_VALUE
        for factor in factors:
            out[some] *= factor[some].unsqueeze(-1)
    return out


def encode(item: str, states: torch.Tensor, stored: str) -> dict[str, torch.Tensor]:
    """States [T, L, H] as they are stored: `states` in the type named `stored`, and for float8 their `scales` [T, L].

    Raises:
        StageError: a value of `item` is not finite, or too large for that type.
    """
    dtype: torch.dtype = getattr(torch, stored)
    if dtype is FLOAT8:
        quantised, scales = quantise(states)
        kept, telling = {"scales": scales, "states": quantised}, scales
    else:
        telling = states.to(dtype)
        kept = {"states": telling}
    if not bool(torch.isfinite(telling).all()):
        raise StageError(
            f"{item}: the hidden states cannot be stored in {stored}: a value is not finite, or too large",
            "if they overflow float16, set extract.dtype=bfloat16; else the target itself overflows",
        )
    return kept


def sift(encoded: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what `encode` made, what training needs: the draft's layers of all tokens, the last one at `wanted`, bool [T].

    The last layer's output only says what the target says next, and nobody asks for that everywhere.
    """
    last = {LAST[name]: tensor[wanted, -1] for name, tensor in encoded.items()}
    return {**{name: tensor[:, :-1].contiguous() for name, tensor in encoded.items()}, **last}


def last_of(sifted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last layer's part as `decode` takes it: [U, H], and its scales [U]."""
    return {name: sifted[own] for name, own in LAST.items() if own in sifted}


def layout(layers: int, hidden_size: int, stored: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `sift` leaves of one token, and in `LAST` of one place, by name: its type, and its shape.

    `layers` counts the last one.
    """
    dtype: torch.dtype = getattr(torch, stored)
    scales = {"scales": (torch.bfloat16, (layers - 1,)), "last_scales": (torch.bfloat16, ())}
    states = {"states": (dtype, (layers - 1, hidden_size)), "last": (dtype, (hidden_size,))}
    return {**(scales if dtype is FLOAT8 else {}), **states}


def decode(tensors: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """The states [..., H] out of what `encode` made; bfloat16, in `out` if it is given, if they were in float8."""
    if "scales" in tensors:
        return dequantise(tensors["states"], tensors["scales"], out)
    return tensors["states"]


def copy_first(encoded: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
    """Put the beginning of what `sift` left into tensors of as many tokens, and as many places of the last layer."""
    for name, tensor in into.items():
        tensor.copy_(encoded[name][: len(tensor)])


def bytes_each(layers: int, hidden_size: int, stored: str) -> tuple[int, int]:
    """What one token takes, and what one place of the last layer takes beside it."""
    each = {n: d.itemsize * math.prod(s) for n, (d, s) in layout(layers, hidden_size, stored).items()}
    last = sum(each.get(name, 0) for name in LAST.values())
    return sum(each.values()) - last, last
