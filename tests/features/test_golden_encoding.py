"""Goldens of the bytes of float8 hidden states, because files of earlier releases have to stay readable.

`python -m tests.goldens.update encodings` writes the goldens.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from speculators.features.encoding import dequantize, quantize

GOLDEN = Path(__file__).parent.parent / "goldens" / "encodings.json"
LARGEST_BFLOAT16 = 3.3895313892515355e38
INPUTS: dict[str, list[float]] = {
    "zeros": [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "one scale, exact": [448.0, -448.0, 1.0, 0.0625, 0.0, -13.0, 2.0**-6, -(2.0**-9)],
    "one step above the range": [450.0, -1.0, 0.5, 13.0, -26.0, 2.0**-7, 2.0**-8, 0.0],
    "ties, to even": [448.0, 17.0, 19.0, -17.0, -19.0, 1.0625, 1.1875, 2.0**-10],
    "float8's subnormal numbers": [448.0, *(k * 2.0**-9 for k in range(1, 8))],
    "below float8's smallest": [448.0, 2.0**-10, 1.5 * 2.0**-10, 2.0**-11, -(2.0**-10), -(2.0**-20), 2.0**-126, 0.0],
    "massive activation": [1e4, -3e3, 1.0, -0.5, 0.1, 0.01, -1e-3, 1e-4],
    "largest of bfloat16": [LARGEST_BFLOAT16, -LARGEST_BFLOAT16, 1e38, -1e37, 1e36, 1e30, 1.0, 0.0],
    "smallest normal": [2.0**-126, -(2.0**-126), 2.0**-127, 2.0**-130, 0.0, 0.0, 0.0, 0.0],
    "bfloat16's subnormal numbers": [2.0**-133, -(2.0**-132), 2.0**-127, 0.0, 0.0, 0.0, 0.0, 0.0],
    "around the smallest scale": [2.0**-92, -(2.0**-95), 2.0**-100, 2.0**-109, 2.0**-110, 0.0, 0.0, 0.0],
    "infinite": [float("inf"), 1.0, -1.0, 0.0, 2.0, 3.0, 4.0, 5.0],
    "not a number": [float("nan"), 1.0, -1.0, 0.0, 2.0, 3.0, 4.0, 5.0],
}
"""Hidden states of one token and layer each, all exact in bfloat16 or rounded to it first."""


def recorded(dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, str]]:
    """Of each input the bytes of its float8 values, of its scale, and of what both are read as (bfloat16), in hex."""
    found = {}
    for name, values in INPUTS.items():
        states, scales = quantize(torch.tensor(values).bfloat16().to(dtype).view(1, 1, -1))
        back = dequantize(states, scales)
        # Of NaN, which bits say so is the processor's business.
        back = torch.where(back.isnan(), torch.nan, back)
        scale = "nan" if bool(scales.isnan()) else _hex(scales)
        found[name] = {"states": _hex(states), "scale": scale, "decoded": _hex(back) if scale != "nan" else "nan"}
    return found


def _hex(tensor: torch.Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def update() -> None:
    """Write the goldens."""
    GOLDEN.write_text(json.dumps(recorded(), indent=1) + "\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", INPUTS)
def test_the_bytes_of_float8_states_are_the_golden_ones(name: str, dtype: torch.dtype) -> None:
    golden, found = json.loads(GOLDEN.read_text())[name], recorded(dtype)[name]
    if golden["scale"] == "nan":  # no value comes back, whatever its bytes are
        assert found["scale"] == found["decoded"] == "nan"
    else:
        assert found == golden, "written states would be read otherwise: `python -m tests.goldens.update encodings`"
