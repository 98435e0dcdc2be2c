"""float8 encoding: within its error bound, unchanged by encoding again, NaN where a value is not finite."""

from __future__ import annotations

import pytest
import torch

from speculators.errors import StageError
from speculators.features.encoding import (
    FLOAT8,
    bytes_per_token,
    decode,
    dequantize,
    encode,
    last_layer_part,
    layout,
    quantize,
    split_last_layer,
)


def drawn(*shape: int, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def error_allowed(states: torch.Tensor) -> torch.Tensor:
    """As the module promises it."""
    largest = states.abs().amax(-1, keepdim=True)
    return torch.where(states.abs() >= largest / 14336, states.abs() / 16, largest / 229376)


@pytest.mark.parametrize("spread", [1e-20, 1e-3, 1.0, 3e4, 1e30])
def test_a_value_comes_back_within_a_sixteenth_of_itself(spread: float) -> None:
    states = drawn(64, 3, 256, spread=spread)
    back = dequantize(*quantize(states)).double()
    assert bool(((back - states).abs() <= error_allowed(states.double())).all())
    assert float((back - states).norm() / states.double().norm()) < 0.03


def test_what_can_be_said_exactly_is_kept_exactly() -> None:
    states = torch.tensor([448.0, -448.0, 1.0, 0.0625, 0.0, -13.0]).view(1, 1, -1)
    quantized, scales = quantize(states)
    assert scales.item() == 1.0
    assert torch.equal(dequantize(quantized, scales).float(), states)
    # 449 no longer fits under 1, so everything is kept in steps twice as wide
    assert quantize(torch.tensor([[[449.0, 1.0]]]))[1].item() == 2.0


def test_massive_activations_leave_the_rest_of_the_token_its_precision() -> None:
    states = drawn(8, 2, 512)
    states[0, 1, 77], states[0, 1, 400] = 1e4, -3e3
    back = dequantize(*quantize(states)).float()
    rest = states[0, 1].abs() < 100
    assert float((back - states)[0, 1, rest].norm() / states[0, 1, rest].norm()) < 0.03
    assert bool(((back - states).abs() <= error_allowed(states)).all())


def test_a_layer_of_small_states_does_not_suffer_from_one_of_large_ones() -> None:
    states = torch.stack([drawn(4, 64, spread=1e-4), drawn(4, 64, spread=1e4, seed=1)], dim=1)
    back = dequantize(*quantize(states)).float()
    assert float((back - states)[:, 0].norm() / states[:, 0].norm()) < 0.03


def test_zeros_stay_zeros() -> None:
    quantized, scales = quantize(torch.zeros(2, 3, 8))
    assert bool(torch.isfinite(scales).all())
    assert torch.equal(dequantize(quantized, scales), torch.zeros(2, 3, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_value_of_float8_is_decoded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    every = every[~every.float().isnan()].view(1, 1, -1)
    for exponent in (-100, -3, 0, 7, 100):
        found = dequantize(every, torch.full((1, 1), 2.0**exponent, dtype=dtype))
        assert found.dtype is dtype
        assert torch.equal(found.double(), every.double() * 2.0**exponent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoding_what_was_decoded_changes_nothing(dtype: torch.dtype) -> None:
    states = drawn(200, 4, 96, spread=50.0).to(torch.bfloat16)
    quantized, scales = quantize(states)
    once = dequantize(quantized, scales.to(dtype))
    assert once.dtype is dtype
    assert torch.equal(dequantize(*quantize(once)).to(dtype), once)


def test_the_same_states_are_the_same_bits_whatever_floats_hold_them() -> None:
    states = drawn(50, 3, 64).to(torch.bfloat16)
    one, two = quantize(states), quantize(states.float())
    assert torch.equal(one[0].view(torch.uint8), two[0].view(torch.uint8))
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_never_becomes_a_number(bad: float) -> None:
    states = drawn(3, 2, 8)
    states[1, 0, 5] = bad
    back = dequantize(*quantize(states))
    assert bool(back[1, 0].isnan().all())
    assert bool(back[[0, 2]].isfinite().all())
    with pytest.raises(StageError, match="row 7: the hidden states cannot be stored in float8_e4m3fn"):
        encode("row 7", states, "float8_e4m3fn")


def test_states_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(StageError, match=r"row 7: .* float16: a value is not finite, or too large"):
        encode("row 7", torch.full((1, 1, 2), 1e6), "float16")
    assert encode("row 7", torch.full((1, 1, 2), 1e6), "bfloat16")["states"].dtype is torch.bfloat16


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_a_token_takes_the_bytes_that_are_promised(stored: str) -> None:
    states, wanted = encode("row 0", drawn(10, 4, 576), stored), torch.arange(10) > 6
    kept = split_last_layer(states, wanted)
    each, last = bytes_per_token(4, 576, stored)
    assert sum(tensor.nbytes for tensor in kept.values()) == 10 * each + 3 * last
    assert {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in kept.items()} == layout(4, 576, stored)
    assert torch.equal(decode(kept), decode(states)[:, :3])
    assert torch.equal(decode(last_layer_part(kept)), decode(states)[wanted, 3])


def test_float8_takes_half_of_what_bfloat16_takes() -> None:
    for width in (576, 4096):
        half, whole = bytes_per_token(4, width, "float8_e4m3fn"), bytes_per_token(4, width, "bfloat16")
        assert all(a / b < 0.504 for a, b in zip(half, whole, strict=True))
    assert quantize(drawn(1, 1, 4))[0].dtype is FLOAT8
