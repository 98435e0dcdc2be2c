"""Products: how many rows they have, and what comes out of them."""

from __future__ import annotations

import pytest
import torch

from speculators.drafts.layers import Linear
from speculators.ops.functional import ROW_MULTIPLE, padded_rows


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.bfloat16, ROW_MULTIPLE),
        (ROW_MULTIPLE, torch.bfloat16, ROW_MULTIPLE),
        (ROW_MULTIPLE + 1, torch.float16, 2 * ROW_MULTIPLE),
        (0, torch.bfloat16, 0),
        (ROW_MULTIPLE + 1, torch.float32, ROW_MULTIPLE + 1),
    ],
)
def test_rows_of_a_short_format_come_in_padded_rows(rows: int, dtype: torch.dtype, expected: int) -> None:
    found = padded_rows(torch.ones(rows, 3), dtype)
    assert found.shape == (expected, 3)
    assert torch.equal(found[:rows], torch.ones(rows, 3, dtype=dtype))
    assert found[rows:].abs().sum() == 0


def test_a_product_in_a_short_format_and_its_gradients_are_those_of_its_own_rows() -> None:
    layer, generator = Linear(8, 5), torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 8, generator=generator, requires_grad=True)
    slope = torch.randn(3, 7, 5, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    (found * slope).sum().backward()
    assert found.shape == (3, 7, 5)
    assert found.dtype is torch.bfloat16
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(found.float(), x @ layer.weight.T, atol=0.02, rtol=0.02)
    torch.testing.assert_close(x.grad, slope @ layer.weight, atol=0.02, rtol=0.02)
    expected = slope.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, expected, atol=0.05, rtol=0.02)
