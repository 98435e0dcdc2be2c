"""Induction heads that a draft can begin with: attention that finds where a token stood before, and what came next.

Small training sets teach a draft which token follows which, and not to look back for the last time that it did: of the
answers of a small target, a third to a half can be copied from where the last one or two tokens stood before, and a
draft trained on 60 000 tokens from noise does not (docs/log.md). One attention layer can (Olsson et al. 2022,
arXiv:2209.11895), because the target's low states at a place still tell its token, and something of the one before.
What reads that out of the states is a linear fit; a draft's `prepare` makes queries, keys and values of it.

The directions in which the token before is compared are those that the states tell most about: the canonical
variables of the token and the states (Hotelling 1936). Random ones are told half as well.

Shapes: F what is read of a place; H width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators.features.batch import PackedBatch

SLOW = 75.0
"""Rotary pairs that take more tokens than this to turn by one radian compare contents; faster ones tell distances."""
MATCH = 13.0
"""Logit of a place whose token is the one that is looked for, among a few hundred of others around 0."""
RIDGE = 0.1
"""Of the fit, against states of unit variance."""
SMALL = 1e-3
"""Of the tokens' variance: directions in which they vary less are not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Second moments of what is read and of the tokens that are to be read out of it; float64, on the CPU."""

    count: int
    read: Tensor
    """Sum of what is read [F]."""
    reads: Tensor
    """Sum of its products [F, F]."""
    token: Tensor
    """Sum of the tokens' embeddings [H]."""
    tokens: Tensor
    """Sum of their products [H, H]."""
    own: Tensor
    """Sum of read times its own token's embedding [F, H]."""
    before: Tensor
    """The same for the token before [F, H]."""

    @classmethod
    def of(
        cls, packs: Iterable[PackedBatch], read: Callable[[PackedBatch], Tensor], token: Callable[[Tensor], Tensor]
    ) -> Fit:
        """Sum over all places of the packs but the first of each document."""
        sums: list[Tensor] = []
        count = 0
        for pack in packs:
            kept = torch.ones(len(pack.token_ids), dtype=torch.bool, device=pack.token_ids.device)
            kept[[start for start, _ in pack.documents()]] = False
            f, x = read(pack)[kept], token(pack.token_ids)
            own, before = x[kept], x[:-1][kept[1:]]
            new = [f.sum(0), f.T @ f, own.sum(0), own.T @ own, f.T @ own, f.T @ before]
            count += len(f)
            sums = [a.cpu().double() + (sums[i] if sums else 0.0) for i, a in enumerate(new)]
        return cls(count=count, **dict(zip(cls.__slots__[1:], sums, strict=True)))

    def size(self) -> Tensor:
        """Root of the mean square of what is read [F]."""
        return (self.reads.diagonal() / self.count).clamp(min=1e-12).sqrt()

    def spread(self, rows: Tensor) -> Tensor:
        """Standard deviation of what linear readers [n, F] read [n]."""
        mean = rows @ self.read / self.count
        return ((rows @ self.reads * rows).sum(1) / self.count - mean.square()).clamp(min=1e-12).sqrt()

    def directions(self, count: int) -> Tensor:
        """Where the states tell most of the token before, best first; tokens have unit variance in them [count, H].

        Embeddings have a large part in common, which tells no token from another; it is left out.
        """
        covariance = self._covariance()
        explained = self._apart(self._of_before().T @ self._solved(self._of_before()))
        smallest = SMALL * covariance.diagonal().mean()
        covariance.diagonal().add_(smallest)
        white = torch.linalg.inv(torch.linalg.cholesky(covariance))
        found = torch.linalg.eigh(white @ explained @ white.T)[1].flip(1).T[:count] @ white
        found -= (found @ self._common())[:, None] * self._common()
        return found / self.deviation(found)[:, None]

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Directions that are drawn, otherwise like `directions`."""
        drawn = torch.randn(len(self.token), count, generator=generator, dtype=torch.float64)
        drawn -= self._common()[:, None] * (self._common() @ drawn)
        look = torch.linalg.qr(drawn)[0].T
        return look / self.deviation(look)[:, None]

    def readers(self, look: Tensor, before: bool = False) -> Tensor:
        """What tells of a place what `look` [n, H] reads of its own token, or of the one before; evenly wide [n, F]."""
        crossed = self._of_before() if before else self.own - self.read[:, None] * self.token / self.count
        found = self._solved(crossed @ look.T).T
        return found / self.spread(found)[:, None]

    def constant(self) -> Tensor:
        """What reads 1 of a place, on average and with little spread [F]."""
        gram, scale = self._gram()
        found = torch.linalg.solve(gram, self.read / self.count / scale) / scale
        return found / (found @ self.read / self.count)

    def centred(self, rows: Tensor) -> Tensor:
        """Readers [n, F] that read 0 on average, otherwise the same."""
        return rows - (rows @ self.read / self.count)[:, None] * self.constant()

    def apart_from(self, one: Tensor) -> Tensor:
        """What reads about 1 of tokens and -1 of a single one [H]: least squares, both sides with the same weight."""
        products = self.tokens / self.count + torch.outer(one, one)
        products.diagonal().add_(SMALL * products.diagonal().mean())
        return torch.linalg.solve(products, self.token / self.count - one)

    def deviation(self, look: Tensor) -> Tensor:
        """Standard deviation of tokens in directions [n, H]: [n]."""
        return (look @ self._covariance() * look).sum(1).clamp(min=1e-12).sqrt()

    def _of_before(self) -> Tensor:
        return self.before - self.read[:, None] * self.token / self.count

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Products of what is read, each divided by its size; and the sizes."""
        scale = self.size()
        gram = self.reads / self.count / scale[:, None] / scale
        gram.diagonal().add_(RIDGE)
        return gram, scale

    def _solved(self, crossed: Tensor) -> Tensor:
        gram, scale = self._gram()
        return torch.linalg.solve(gram, crossed / self.count / scale[:, None]) / scale[:, None]

    def _common(self) -> Tensor:
        mean = self.token / self.count
        return mean / mean.norm().clamp(min=1e-12)

    def _apart(self, products: Tensor) -> Tensor:
        """Products of tokens [H, H] without what they have in common."""
        rest = torch.eye(len(products), dtype=products.dtype) - self._common()[:, None] * self._common()
        return rest @ products @ rest

    def _covariance(self) -> Tensor:
        mean = self.token / self.count
        return self._apart(self.tokens / self.count - mean[:, None] * mean)


def principal(rows: Tensor) -> Tensor:
    """The directions in which rows [n, H] differ most, widest first [H, H]."""
    centred = rows - rows.mean(0)
    return torch.linalg.eigh((centred.T @ centred).double())[1].flip(1).T.float()


def slow_places(frequencies: Tensor, head: int, most: int) -> list[int]:
    """The places of a head of width `head` whose rotary pairs compare contents, `most` at most, first halves first."""
    slow: list[int] = (frequencies < 1.0 / SLOW).nonzero()[:, 0].tolist()
    slow = slow[max(0, len(slow) - most // 2) :]
    return [*slow, *(pair + head // 2 for pair in slow)]


def widened(rows: Tensor, count: int) -> Tensor:
    """Rows [n, H], or zeros after the n-th: [count, H]."""
    return nn.functional.pad(rows[:count], (0, 0, 0, max(0, count - len(rows))))
