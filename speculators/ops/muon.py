"""Muon's update of matrices (Jordan et al. 2024): the nearest orthogonal matrix to a matrix's momentum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speculators.ops import cpu

FLOOR = 5e-3
"""Singular values from this share of the largest upwards end near one, smaller ones in between; in float32."""
ROUGH_FLOOR = 2e-3
"""The same in shorter formats, where they end less near: small ones count for more (docs/log.md)."""
SCALE = 0.8490016030350571
WEIGHTS = (0.02035097971791578, 0.28000543285858204)
POLES = (7.853246321038987e-05, 0.01920639484477456)
"""Coefficients of f(x) = SCALE * x * (1 + sum(weight / (x^2 + pole))), nearest to 1 on [FLOOR, 1] of all odd rational
functions with two pairs of poles (Zolotarev 1877; Nakatsukasa and Freund, SIAM Review 2016, doi:10.1137/140990334).
tests/training/test_muon_coefficients.py derives them."""
QUINTICS = (
    (8.26322276051256, -23.504199369861908, 16.754055389848872),
    (4.03699987276044, -2.8876570662791146, 0.5215665376942002),
    (3.6701282810834766, -2.6409937093278533, 0.49533509848619456),
    (2.793181226775115, -2.014977622886023, 0.42978968487580005),
)
"""Coefficients (a, b, c) of polynomials a x + b x^3 + c x^5 that, one after the other, bring [ROUGH_FLOOR, 1] nearest
to 1 (Amsel et al. 2025, arXiv:2505.16932). The same test file derives them."""
TOGETHER = 1 << 22
"""Numbers in matrices that are made orthogonal together, unless one alone has more: what a CPU's cache holds."""


def stacked(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Room for matrices of one shape or its transpose, [B, k, n], k <= n: those that are tall lie there transposed."""
    return torch.empty(len(shapes), *sorted(shapes[0]), dtype=dtype, device=device)


def turned(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each of [B, k, n] in its own shape; nothing is copied."""
    return [matrix.mT if rows > columns else matrix for matrix, (rows, columns) in zip(x, shapes, strict=True)]


def orthogonalise(x: Tensor, shapes: Sequence[Sequence[int]], block: int = 0) -> list[Tensor]:
    """The orthogonal matrix nearest to each, about: singular values from the floor up end around one.

    With X = USV', f(S) is wanted for S, f being Zolotarev's function, which ends between 0.9 and 1.1, or the chain of
    `QUINTICS` in formats shorter than float32, between 0.65 and 1.35; either is X times a function of its Gram matrix
    [k, k]. The usual chain (Jordan et al. 2024) takes one step more, to 0.68 and 1.19.

    With `block`, the shorter side is cut into groups of so many rows, each made orthogonal by itself: k / block
    times less work, and what is lost is that two groups may still move along the same direction.

    Args:
        x: as `stacked` lays them [B, k, n], used up. Their format is that of the products.
        shapes: of the matrices, as they are and as they are given back.
        block: rows of a group; 0 for all.
    """
    count, rows, columns = x.shape
    size = min(block, rows) if block else rows
    groups = -(-rows // size)
    if rows % size:  # rows of zeros stay what they are
        x = nn.functional.pad(x, (0, 0, 0, groups * size - rows))
    x = x.reshape(count * groups, size, columns)
    if x.dtype is torch.float16:  # others have the exponents for products of what is small (`_shorten`)
        x.mul_(1.0 / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32) + 1e-30).to(x.dtype))
    x, applied = _by_inverses(x) if x.dtype is torch.float32 else _by_products(x)
    if groups > 1:
        return turned((applied @ x).reshape(count, groups * size, columns)[:, :rows], shapes)
    found: list[Tensor] = []
    for tall, run in itertools.groupby(shapes, lambda shape: shape[0] > shape[1]):
        some = slice(len(found), len(found) + len(list(run)))
        # What is applied is symmetric: a tall matrix is computed as it is to be, and need not be turned.
        found += (x[some].mT @ applied[some] if tall else applied[some] @ x[some]).unbind()
    return found


def together(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which matrices are made orthogonal at once: of one shape or its transpose, and `TOGETHER` at most."""
    groups: list[list[int]] = []
    last: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        kind = tuple(sorted(shape))
        if kind not in last or (len(last[kind]) + 1) * math.prod(kind) > TOGETHER:
            last[kind] = []
            groups.append(last[kind])
        last[kind].append(place)
    return groups


def _by_inverses(x: Tensor) -> tuple[Tensor, Tensor]:
    """By Zolotarev's function, which float32 will do for: one product and two inverses, and a last product to come.

    Takes [B, k, n] and gives the same, and what has to be applied to it from the left, [B, k, k].
    """
    gram = x @ x.mT
    length = _shorten(gram)
    # By the fourth root of the sum of the singular values' fourth powers, which is hardly above the largest.
    norm = (gram.flatten(1).norm(dim=1).sqrt() + 1e-7)[:, None, None]
    gram.div_(norm.square())
    applied: Tensor | None = None
    for weight, pole in zip(WEIGHTS, POLES, strict=True):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
        applied = inverse.mul_(weight) if applied is None else applied.add_(inverse, alpha=weight)
    assert applied is not None
    applied.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return x, applied.mul_(SCALE / norm / length[:, None, None])


def _by_products(x: Tensor) -> tuple[Tensor, Tensor]:
    """By `QUINTICS`; as `_by_inverses`, but for what is given, to which all but the last has been applied."""
    gram = _gram(x)
    length = _shorten(gram)
    for place, quintic in enumerate(QUINTICS):
        if place:
            x = gram @ x
            gram = _gram(x)
        square = gram @ gram
        factors = torch.tensor(quintic, device=x.device).expand(len(x), 3)
        if not place:
            # As above, by the eighth powers, which are there already.
            norm = torch.linalg.vector_norm(square, dim=(1, 2), dtype=torch.float32).sqrt().add_(1e-7)[:, None]
            factors = factors * norm ** torch.tensor([-0.5, -1.5, -2.5], device=x.device) / length[:, None]
        _polynomial(gram, square, factors.contiguous())
    return x, gram


def _shorten(gram: Tensor) -> Tensor:
    """Divide Gram matrices [B, k, k] so that all powers of them stay within the format.

    Returns: the lengths [B] that what they are made of would be divided by; powers of two, so that nothing is rounded.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)
    squares = torch.exp2(torch.frexp(squares.add_(1e-30)).exponent)
    for one, square in zip(gram, squares, strict=True):
        one.div_(square)
    return squares.sqrt_()


def _polynomial(x: Tensor, square: Tensor, factors: Tensor) -> None:
    """Let [B, k, k] become a + b x + c x^2, `factors` [B, 3] float32; the first ones are large and are not rounded."""
    if loops := cpu.kernels(x):
        return loops.polynomial(x, square, factors)
    a, b, c = factors[:, :, None].unbind(1)
    exact = (b[:, None] * x).addcmul_(c[:, None], square.float())
    exact.diagonal(dim1=-2, dim2=-1).add_(a)
    x.copy_(exact)
    return None


def _gram(x: Tensor) -> Tensor:
    """Products of the rows [B, k, n]; those of a single wide matrix in parts, which are computed side by side."""
    _, rows, columns = x.shape
    count = next(count for count in range(max(1, columns // rows), 0, -1) if columns % count == 0)
    if len(x) > 1 or count == 1:
        return x @ x.mT
    parts = x[0].unflatten(1, (count, -1)).transpose(0, 1)
    return (parts @ parts.mT).sum(0, keepdim=True)
