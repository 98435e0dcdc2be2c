"""Muon's update of matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised.

With USV' the singular value decomposition of the momentum, the update is near UV', so that all directions are learnt at
the same rate. Two methods compute U f(S) V' with f near 1, as matrix products of the Gram matrix, which has the length
of the shorter side: in bfloat16 and float16 a chain of quintics, whose products these formats are fast at; in float32 a
rational function, one product and two inverses.

In float32, for the demo's drafts on a CPU, the chain takes 2.9 times the rational function's time, 1.9 to 2.2 times in
blocks of 96 rows: half or more, and a fifth or more, of all products of a training step (tests/benchmarks/muon.py).

Shapes: B matrices; k shorter side; n longer side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from speculators.ops import cpu

FLOOR = 5e-3
"""Singular values from this share of the largest up end near one, smaller ones in between; in float32."""
ROUGH_FLOOR = 2e-3
"""The same in shorter formats, where they end less near: small ones count for more (docs/log.md)."""
SCALE = 0.8490016030350571
WEIGHTS = (0.02035097971791578, 0.28000543285858204)
POLES = (7.853246321038987e-05, 0.01920639484477456)
"""Coefficients of f(x) = SCALE * x * (1 + sum(weight / (x^2 + pole))), nearest to 1 on [FLOOR, 1] of all odd rational
functions with two pairs of poles (Zolotarev 1877; Nakatsukasa and Freund, SIAM Review 2016, doi:10.1137/140990334).
tests/ops/test_muon_coefficients.py derives them."""
QUINTICS = (
    (8.26322276051256, -23.504199369861908, 16.754055389848872),
    (4.03699987276044, -2.8876570662791146, 0.5215665376942002),
    (3.6701282810834766, -2.6409937093278533, 0.49533509848619456),
    (2.793181226775115, -2.014977622886023, 0.42978968487580005),
)
"""Coefficients (a, b, c) of polynomials a x + b x^3 + c x^5 whose composition on [ROUGH_FLOOR, 1] is nearest to 1
(Polar Express, Amsel et al. 2025, arXiv:2505.16932). The same test derives them."""
BATCH_ELEMENTS = 1 << 22
"""Elements of matrices that are orthogonalised together, unless one has more: about a CPU's cache."""


def muon_updates(
    momenta: Sequence[Tensor], grads: Sequence[Tensor], beta: float, grad_factor: float = 1.0,
    dtype: torch.dtype = torch.float32, block: int = 0,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Update momenta in place and yield the orthogonalised Nesterov direction of each matrix, a batch at a time.

    Args:
        momenta: float32 matrices, of any shapes; m = beta * m + (1 - beta) * grad_factor * grad.
        grads: of the same shapes, float32 or shorter.
        beta: momentum.
        grad_factor: of the gradients, as gradient clipping computes it.
        dtype: format of the products, and of the updates.
        block: see `orthogonalize`.

    Yields: index into `momenta`, and the update, of that momentum's shape. Matrices of one shape follow each other.
    """
    for indices in _batches([momentum.shape for momentum in momenta]):
        shapes = [momenta[index].shape for index in indices]
        x = _wide_buffer(shapes, dtype, momenta[indices[0]].device)
        for index, direction in zip(indices, _in_own_shapes(x, shapes), strict=True):
            update_momentum(momenta[index], grads[index], beta, grad_factor, direction)
        yield from zip(indices, _orthogonalize(x, shapes, block), strict=True)


def update_momentum(
    momentum: Tensor, grad: Tensor, beta: float, grad_factor: float = 1.0, direction: Tensor | None = None
) -> None:
    """Update a float32 momentum in place: m = beta * m + (1 - beta) * grad_factor * grad.

    `direction`, if given, is overwritten with Nesterov's direction beta * m + (1 - beta) * grad_factor * grad, over
    beta: the orthogonalisation is indifferent to length.
    """
    factor = (1.0 - beta) * grad_factor
    if kernels := cpu.kernels(momentum, *([] if direction is None else [direction])):
        kernels.nesterov_momentum(momentum, grad, direction, beta, factor, factor / beta)
        return
    momentum.mul_(beta).add_(grad, alpha=factor)
    if direction is not None:
        direction.copy_(torch.add(momentum, grad, alpha=factor / beta))


def orthogonalize(matrices: Sequence[Tensor], dtype: torch.dtype, block: int = 0) -> list[Tensor]:
    """Replace the singular values of matrices, of any shapes, by values near one.

    In float32 they end between 0.9 and 1.1 from `FLOOR` of the largest up; in shorter formats between 0.65 and 1.35
    from `ROUGH_FLOOR` up. The usual chain (Jordan et al. 2024) takes a step more, to 0.68 and 1.19.

    Args:
        matrices: on one device.
        dtype: format of the products.
        block: rows of the shorter side that are orthogonalised by themselves, for k / block times less work, while
            two blocks may move along the same direction; 0 for all.

    Returns: a contiguous matrix for each, of its shape and format.
    """
    updates = list(matrices)
    for indices in _batches([matrix.shape for matrix in matrices]):
        shapes = [matrices[index].shape for index in indices]
        x = _wide_buffer(shapes, dtype, matrices[indices[0]].device)
        for index, view in zip(indices, _in_own_shapes(x, shapes), strict=True):
            view.copy_(_unit_norm(matrices[index]) if dtype is torch.float16 else matrices[index])
        for index, update in zip(indices, _orthogonalize(x, shapes, block), strict=True):
            updates[index] = update.to(matrices[index].dtype).contiguous()
    return updates


def update_scale(shape: Sequence[int]) -> float:
    """Factor that gives an orthogonal update the RMS of AdamW's updates (Liu et al. 2025, arXiv:2502.16982)."""
    return 0.2 * math.sqrt(max(shape))


def _batches(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group the indices of matrices of one shape or its transpose, with at most `BATCH_ELEMENTS` in a group."""
    batches: list[list[int]] = []
    open_batches: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        key = tuple(sorted(shape))
        if key not in open_batches or (len(open_batches[key]) + 1) * math.prod(key) > BATCH_ELEMENTS:
            open_batches[key] = []
            batches.append(open_batches[key])
        open_batches[key].append(index)
    return batches


def _wide_buffer(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a batch [B, k, n] for matrices of one shape or its transpose; tall ones are kept transposed."""
    return torch.empty(len(shapes), *sorted(shapes[0]), dtype=dtype, device=device)


def _in_own_shapes(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return views of a batch [B, k, n], each in its matrix's own shape."""
    return [matrix.mT if rows > columns else matrix for matrix, (rows, columns) in zip(x, shapes, strict=True)]


def _orthogonalize(x: Tensor, shapes: Sequence[Sequence[int]], block: int) -> list[Tensor]:
    """Orthogonalise a batch [B, k, n], which is overwritten; the results have the matrices' own shapes."""
    count, rows, columns = x.shape
    size = min(block, rows) if block else rows
    groups = -(-rows // size)
    if rows % size:  # rows of zeros stay zero
        x = nn.functional.pad(x, (0, 0, 0, groups * size - rows))
    x = x.reshape(count * groups, size, columns)
    if x.dtype is torch.float16:  # others have the exponents for products of small numbers (`_rescale`)
        x = _unit_norm(x)
    x, factor = _rational(x) if x.dtype is torch.float32 else _quintics(x)
    if groups > 1:
        return _in_own_shapes((factor @ x).reshape(count, groups * size, columns)[:, :rows], shapes)
    updates: list[Tensor] = []
    for tall, run in itertools.groupby(shapes, lambda shape: shape[0] > shape[1]):
        part = slice(len(updates), len(updates) + len(list(run)))
        # The factor is symmetric: for a tall matrix the transposed product needs no copy.
        updates += (x[part].mT @ factor[part] if tall else factor[part] @ x[part]).unbind()
    return updates


def _unit_norm(x: Tensor) -> Tensor:
    """Divide matrices [..., k, n] by their Frobenius norms, within the range of their format; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return x * (1.0 / norm).clamp(max=torch.finfo(x.dtype).max).to(x.dtype)


def _rational(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 [B, k, n] and the factors [B, k, k] to multiply from the left, by Zolotarev's function."""
    gram = x @ x.mT
    length = _rescale(gram)
    # The Schatten 4-norm is hardly above the largest singular value.
    norm = (gram.flatten(1).norm(dim=1).sqrt() + 1e-7)[:, None, None]
    gram.div_(norm.square())
    factor: Tensor | None = None
    for weight, pole in zip(WEIGHTS, POLES, strict=True):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
        factor = inverse.mul_(weight) if factor is None else factor.add_(inverse, alpha=weight)
    assert factor is not None
    factor.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return x, factor.mul_(SCALE / norm / length[:, None, None])


def _quintics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return [B, k, n] after all quintics but the last, and the factors [B, k, k] of the last."""
    gram = _gram(x)
    length = _rescale(gram)
    smallest = 1e-6 if x.dtype is torch.float16 else 1e-7  # the factors of a matrix of zeros have to be finite
    for step, coefficients in enumerate(QUINTICS):
        if step:
            x = gram @ x
            gram = _gram(x)
        square = gram @ gram
        factors = torch.tensor(coefficients, device=x.device).expand(len(x), 3)
        if not step:
            # The Schatten 8-norm, from the square that is needed anyway.
            norm = torch.linalg.vector_norm(square, dim=(1, 2), dtype=torch.float32).sqrt().add_(smallest)[:, None]
            factors = factors * norm ** torch.tensor([-0.5, -1.5, -2.5], device=x.device) / length[:, None]
        _polynomial(gram, square, factors.contiguous())
    return x, gram


def _rescale(gram: Tensor) -> Tensor:
    """Divide Gram matrices [B, k, k] in place, so that their powers stay within the range of the format.

    Returns: float32 [B], what the matrices themselves would be divided by. Powers of two, so that nothing is rounded.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)
    if gram.dtype is torch.float16:  # of unit norm, or of zeros, whose factors have to be finite
        squares.clamp_(min=0.25)
    squares = torch.exp2(torch.frexp(squares.add_(1e-30)).exponent)
    for matrix, square in zip(gram, squares, strict=True):
        matrix.div_(square)
    return squares.sqrt_()


def _polynomial(x: Tensor, square: Tensor, factors: Tensor) -> None:
    """Set [B, k, k] to a I + b x + c x^2, `factors` float32 [B, 3]; the first are large, so they are not rounded."""
    if kernels := cpu.kernels(x):
        return kernels.polynomial(x, square, factors)
    a, b, c = factors[:, :, None].unbind(1)
    exact = (b[:, None] * x).addcmul_(c[:, None], square.float())
    exact.diagonal(dim1=-2, dim2=-1).add_(a)
    x.copy_(exact)
    return None


def _gram(x: Tensor) -> Tensor:
    """Compute x @ x.mT of [B, k, n]; for a single wide matrix as a batch of column chunks, which run in parallel."""
    _, rows, columns = x.shape
    count = next(count for count in range(max(1, columns // rows), 0, -1) if columns % count == 0)
    if len(x) > 1 or count == 1:
        return x @ x.mT
    chunks = x[0].unflatten(1, (count, -1)).transpose(0, 1)
    return (chunks @ chunks.mT).sum(0, keepdim=True)
