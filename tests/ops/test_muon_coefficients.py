"""Derives the coefficients of Muon's update that `ops/muon.py` holds as literals."""

from __future__ import annotations

import math

import pytest
import torch

from speculators.ops import muon


def zolotarev(poles: int, floor: float) -> tuple[float, list[float], list[float]]:
    """The odd rational function with so many pairs of poles that is nearest to 1 on [floor, 1].

    It is scale * x * (1 + sum(weight / (x^2 + pole))). Zolotarev found it in 1877; Nakatsukasa and Freund use it for
    the polar factor (SIAM Review 2016, doi:10.1137/140990334). Its zeros and poles are Jacobi's elliptic functions at
    equal distances, computed here by their descent to circular ones (Abramowitz and Stegun, 16.4).

    Returns:
        scale, the weights, and the poles.
    """
    larger, smaller = 1.0, floor
    descent = []
    while larger - smaller > 1e-15:
        descent.append((larger - smaller) / (larger + smaller))
        larger, smaller = (larger + smaller) / 2, math.sqrt(larger * smaller)
    squares = []
    for index in range(1, 2 * poles + 1):
        amplitude = 2 ** len(descent) * math.pi / 2 * index / (2 * poles + 1)
        for ratio in reversed(descent):
            amplitude = (amplitude + math.asin(ratio * math.sin(amplitude))) / 2
        squares.append((floor * math.tan(amplitude)) ** 2)
    pole_list, zeros = squares[0::2], squares[1::2]
    weights = [
        math.prod(zero - pole for zero in zeros) / math.prod(other - pole for other in pole_list if other != pole)
        for pole in pole_list
    ]
    # It oscillates evenly about one, from its lowest value at the floor to its highest at one.
    ends = [
        x * (1.0 + sum(w / (x * x + pole) for w, pole in zip(weights, pole_list, strict=True))) for x in (floor, 1.0)
    ]
    return 2.0 / sum(ends), weights, pole_list


def quintics(count: int, floor: float, margin: float) -> list[tuple[float, float, float]]:
    """Derive odd polynomials a x + b x^3 + c x^5 whose composition is nearest to 1 on [floor, 1].

    Each is the nearest to 1 on the range of the one before, which makes the composition the best of its kind (Amsel et
    al. 2025, arXiv:2505.16932). The error of a quintic is largest at both ends and at two points between them, with
    alternating sign; Remez' exchange finds these as the extrema of the last polynomial. Beyond its interval a quintic
    soon grows, so each interval reaches `margin` times further up than values should come.
    """
    low, high, polynomials = floor, 1.0, []
    for _ in range(count):
        high *= margin
        inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
        for _ in range(20):
            x = torch.tensor([low, *inner, high], dtype=torch.float64)
            powers = torch.stack([x, x**3, x**5, torch.tensor([1, -1, 1, -1])], dim=1)
            a, b, c, error = torch.linalg.solve(powers, torch.ones_like(x)).tolist()
            root = math.sqrt(9 * b * b - 20 * a * c)
            inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        polynomials.append((a, b, c))
        low, high = 1.0 - error, 1.0 + error
    return polynomials


def test_the_rational_coefficients_are_those_of_the_derivation() -> None:
    scale, weights, poles = zolotarev(2, muon.FLOOR)
    assert pytest.approx(scale, rel=1e-12) == muon.SCALE
    assert pytest.approx(weights, rel=1e-12) == muon.WEIGHTS
    assert pytest.approx(poles, rel=1e-12) == muon.POLES


def test_the_quintic_coefficients_are_those_of_the_derivation() -> None:
    derived = quintics(4, muon.ROUGH_FLOOR, 1.02)
    assert len(muon.QUINTICS) == len(derived)
    for literal, expected in zip(muon.QUINTICS, derived, strict=True):
        assert literal == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("poles", "floor"), [(1, 0.1), (2, 5e-3), (3, 1e-3), (4, 1e-6)])
def test_the_rational_function_oscillates_as_often_as_the_best_of_its_type_must(poles: int, floor: float) -> None:
    # Chebyshev's criterion: no other function of the type is nearer if the error is greatest 2r + 2 times in turn.
    scale, weights, pole_list = zolotarev(poles, floor)
    x = torch.logspace(math.log10(floor), 0, 200_001, dtype=torch.float64)
    error = scale * x * (1 + sum(w / (x * x + pole) for w, pole in zip(weights, pole_list, strict=True))) - 1
    extrema = [0, *(torch.where(error.diff()[1:] * error.diff()[:-1] < 0)[0] + 1).tolist(), len(x) - 1]
    assert len(extrema) == 2 * poles + 2
    signs = torch.tensor([(-1.0) ** (index + 1) for index in range(len(extrema))], dtype=torch.float64)
    torch.testing.assert_close(error[extrema], signs * error.abs().max(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("floor", [0.1, 5e-3, 1e-3])
def test_each_quintic_oscillates_as_often_as_the_best_must(floor: float) -> None:
    low, high = floor, 1.0
    for a, b, c in quintics(3, floor, 1.01):
        x = torch.linspace(low, 1.01 * high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        extrema = [0, *(torch.where(error.diff()[1:] * error.diff()[:-1] < 0)[0] + 1).tolist(), len(x) - 1]
        signs = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(error[extrema], signs * error.abs().max(), atol=0, rtol=1e-5)
        low, high = 1 - float(error.abs().max()), 1 + float(error.abs().max())
    assert high - 1 < 1 - floor
