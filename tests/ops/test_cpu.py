"""The loops in C++ give what torch gives, to rounding, and the same bits however many threads they have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speculators.ops import cpu
from speculators.ops.divergences import _by_torch as cost

SHORT, WIDE = torch.bfloat16, torch.float32


@pytest.fixture
def loops() -> cpu.Kernels:
    found = cpu.kernels()
    return found if found is not None else pytest.skip(cpu.missing())


def drawn(*shape: int, dtype: torch.dtype = WIDE, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


@pytest.mark.parametrize("width", [1, 15, 16, 259, 1000])
@pytest.mark.parametrize("wanted_dtype", [SHORT, WIDE])
@pytest.mark.parametrize("dtype", [SHORT, WIDE])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_a_loss_its_slope_and_whether_it_is_right_are_those_of_torch_in_float64(
    loops: cpu.Kernels, kind: str, dtype: torch.dtype, wanted_dtype: torch.dtype, width: int
) -> None:
    z, wanted = drawn(20, width, dtype=dtype, scale=4.0), drawn(7, width, dtype=wanted_dtype, scale=5.0)
    local, weight = torch.arange(20) // 3, drawn(20).abs()
    loss, correct, slope = cost(z.double(), wanted.double(), local, {kind: 1.0}, exact=False)
    found = z.clone()
    own_loss, own_correct = loops.losses(kind, found, wanted, local, weight, True)
    torch.testing.assert_close(own_loss.double(), loss, atol=2e-5, rtol=1e-5)
    assert torch.equal(own_correct, correct)
    precision = 1e-6 if dtype is WIDE else 2**-8
    torch.testing.assert_close(found.double(), slope * weight[:, None], atol=1e-6, rtol=precision)


def test_of_equal_logits_the_first_one_counts_on_both_sides(loops: cpu.Kernels) -> None:
    z, wanted = torch.zeros(3, 600), torch.zeros(3, 600)
    z[0, [300, 400]] = wanted[0, [300, 400]] = 1.0
    z[1, [300, 400]], wanted[1, 400] = 1.0, 1.0
    z[2, 400], wanted[2, [300, 400]] = 1.0, 1.0
    assert loops.losses("ce", z, wanted, torch.arange(3), None, False)[1].tolist() == [True, False, False]


def test_logits_stay_where_no_slope_is_wanted_and_what_is_no_number_is_seen_in_the_loss(loops: cpu.Kernels) -> None:
    z, wanted = drawn(4, 50), drawn(4, 50)
    kept = z.clone()
    loops.losses("kl", z, wanted, torch.arange(4), None, False)
    assert torch.equal(z, kept)
    z[1, 7], wanted[2, 9] = float("nan"), float("nan")
    for kind in ("kl", "ce"):
        assert loops.losses(kind, z.clone(), wanted, torch.arange(4), None, True)[0].isfinite().tolist() == [
            True, False, False, True,
        ]  # fmt: skip


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within the format's own rounding of what is computed in float32."""
    precision = 2e-6 if dtype is WIDE else 2**-8
    torch.testing.assert_close(found.float(), wanted.float(), atol=precision, rtol=precision)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 64), (70, 33), (200, 576)])
@pytest.mark.parametrize("slope_dtype", [SHORT, WIDE])
@pytest.mark.parametrize("dtype", [SHORT, WIDE])
def test_a_norm_and_its_slopes_are_those_of_torch(
    loops: cpu.Kernels, shape: tuple[int, ...], slope_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x, weight, slope = drawn(*shape, dtype=dtype), drawn(shape[-1]), drawn(*shape, dtype=slope_dtype, scale=2.0)
    exact, of_exact = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = torch.nn.functional.rms_norm(exact, shape[-1:], of_exact, 1e-3)
    wanted.backward(slope.double())
    out, inverse = loops.rms_norm(x, weight, 1e-3, slope_dtype)
    close(out, wanted, slope_dtype)
    of_x, of_weight = loops.rms_norm_backward(slope, x, weight, inverse)
    assert exact.grad is not None
    close(of_x, exact.grad, dtype)
    torch.testing.assert_close(of_weight, of_exact.grad.float(), atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [SHORT, WIDE])
def test_a_gate_and_its_slopes_are_those_of_torch_however_large(loops: cpu.Kernels, dtype: torch.dtype) -> None:
    gate, up, slope = (drawn(50, 33, dtype=dtype, scale=scale) for scale in (30.0, 2.0, 1.0))
    wide, beside = gate.float().requires_grad_(), up.float().requires_grad_()
    wanted = torch.nn.functional.silu(wide) * beside
    wanted.backward(slope.float())
    close(loops.silu_mul(gate, up), wanted, dtype)
    for found, leaf in zip(loops.silu_mul_backward(slope, gate, up), (wide, beside), strict=True):
        assert leaf.grad is not None
        close(found, leaf.grad, dtype)


def test_what_is_rotated_is_turned_back_by_the_other_sine(loops: cpu.Kernels) -> None:
    x, angles = drawn(4, 5, 3, 8), drawn(4, 5, 1, 4)
    cosine, sine = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    turned = loops.apply_rotary(x, cosine, sine, WIDE)
    first, second = x.chunk(2, -1)
    close(turned, x * cosine + torch.cat([-second, first], -1) * sine, WIDE)
    close(loops.apply_rotary(turned, cosine, -sine, SHORT), x, SHORT)
    close(loops.apply_rotary(x.to(SHORT), cosine, sine, WIDE), turned, SHORT)


@pytest.mark.parametrize("shape", [(5, 7), (64, 96), (70, 33), (1, 40), (40, 1)])
@pytest.mark.parametrize("gradient_dtype", [SHORT, WIDE])
@pytest.mark.parametrize("dtype", [SHORT, WIDE])
def test_a_momentum_takes_the_gradient_in_and_says_where_it_goes_also_transposed(
    loops: cpu.Kernels, shape: tuple[int, int], gradient_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    held, gradient = drawn(*shape), drawn(*shape, dtype=gradient_dtype, scale=3.0)
    wanted = held * 0.9 + gradient.float() * 0.2
    for asked in (None, torch.empty(shape, dtype=dtype), torch.empty(shape[::-1], dtype=dtype).mT):
        moved = held.clone()
        loops.nesterov_momentum(moved, gradient, asked, 0.9, 0.2, 0.3)
        torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-6)
        if asked is not None:
            ahead = wanted + gradient.float() * 0.3
            torch.testing.assert_close(asked.float(), ahead, atol=1e-6, rtol=1e-6 if dtype is WIDE else 2**-8)


def test_a_polynomial_of_matrices_has_its_own_factors_for_each(loops: cpu.Kernels) -> None:
    x, square, factors = drawn(3, 40, 40, dtype=SHORT), drawn(3, 40, 40, dtype=SHORT), drawn(3, 3)
    a, b, c = factors[:, :, None, None].unbind(1)
    wanted = a * torch.eye(40) + b * x.float() + c * square.float()
    loops.polynomial(x, square, factors)
    torch.testing.assert_close(x.float(), wanted, atol=2e-2, rtol=2**-8)


@pytest.mark.parametrize("dtype", [SHORT, WIDE])
def test_a_weight_moves_by_an_update_and_a_sum_of_squares_is_one(loops: cpu.Kernels, dtype: torch.dtype) -> None:
    weight, update = drawn(33, 57), drawn(33, 57, dtype=dtype)
    wanted = weight * 0.99 - 0.1 * update.float()
    loops.apply_update(weight, None, update, 0.99, 0.1)
    torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-6)
    assert loops.sum_of_squares(update) == pytest.approx(float(update.double().square().sum()), rel=1e-6)


def test_the_number_of_threads_does_not_change_a_bit(loops: cpu.Kernels) -> None:
    def all_of_it() -> list[Tensor]:
        z, asked, held = drawn(50, 333, dtype=SHORT), torch.empty(90, 70, dtype=SHORT).mT, drawn(70, 90)
        loss, _ = loops.losses("kl", z, drawn(17, 333), torch.arange(50) // 3, None, True)
        loops.nesterov_momentum(held, drawn(70, 90, scale=2.0), asked, 0.95, 0.05, 0.05)
        x, slope, weight = drawn(77, 40), drawn(77, 40, dtype=SHORT), drawn(40)
        slopes = loops.rms_norm_backward(slope, x, weight, loops.rms_norm(x, weight, 1e-6, SHORT)[1])
        return [loss, z, asked, held, *slopes, torch.tensor(loops.sum_of_squares(held), dtype=torch.float64)]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_of_it())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for other in found[1:] for one, other in zip(found[0], other, strict=True))


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    cpu._load.cache_clear()
    yield tmp_path
    cpu._load.cache_clear()


def test_they_are_compiled_once_and_kept(loops: cpu.Kernels, afresh: Path) -> None:
    assert cpu.kernels() is not None
    assert cpu.missing() == ""
    (library,) = (afresh / "speculators-native").iterdir()
    made = library.stat().st_mtime_ns
    cpu._load.cache_clear()
    assert cpu.kernels() is not None
    assert library.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("CXX", "/nowhere/c++", "No such file or directory: '/nowhere/c++'"),
        ("CXX", "false", "false ended with 1"),
        ("SPECULATORS_NATIVE", "0", "SPECULATORS_NATIVE is 0"),
    ],
)
def test_without_a_compiler_or_if_asked_torch_does_it(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert cpu.kernels() is None
    assert why in cpu.missing()


def test_they_are_for_numbers_on_a_cpu_in_formats_that_they_know(loops: cpu.Kernels) -> None:
    assert cpu.kernels(torch.empty(1, dtype=torch.float16)) is None
    assert cpu.kernels(torch.empty(1, device="meta")) is None
    assert cpu.kernels(torch.empty(1)) is loops
