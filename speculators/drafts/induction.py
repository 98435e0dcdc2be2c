"""Initialise a draft with induction heads: attention that finds where a token occurred before, and what followed it.

`speculator.init=induction`. Small training sets teach a draft which token follows which, but not to look up what
followed the last time: a third to a half of a small target's answers can be copied from where the last one or two
tokens occurred before, and a draft that is trained on 60 000 tokens from random weights does not learn to
(docs/log.md). One attention layer can (Olsson et al. 2022, arXiv:2209.11895), because the hidden states of low layers
at a position encode the token there and, in part, the one before it. A linear fit on a sample of the training data
decodes both, and `initialise` writes it into the weights of queries, keys and values.

The previous token is compared along the directions that the hidden states tell most about: the canonical variables
(Hotelling 1936) of previous token and hidden states. Random directions carry half as much.

Shapes: F size of the input of `fc`; H hidden size of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speculators.drafts.base import Draft
from speculators.drafts.dflash import DFlashDraft, DFlashLayer
from speculators.drafts.eagle3 import Eagle3Draft, Eagle3Layer
from speculators.drafts.layers import Attention
from speculators.features.batch import PackedBatch

SLOW = 75.0
"""Rotary pairs that take more tokens than this per radian compare contents; faster ones encode distance."""
MATCH_LOGIT = 13.0
"""Attention logit of a position that holds the wanted token, among a few hundred others around 0."""
RIDGE = 0.1
"""Ridge penalty of the fit, relative to hidden states of unit variance."""
MIN_VARIANCE = 1e-3
"""Share of the tokens' mean variance below which a direction is not compared."""
ANCHOR_LOGIT = 20.0
"""DFlash: scale of the head with which a mask token attends to its anchor alone, above random weights."""
CONSTANT_SCALE = 6.0
"""DFlash: size of the constant part of the context, relative to what varies in it."""
COMPARED_SCALE = 3.0
"""DFlash: size of the compared dimensions, relative to random weights in the same head."""
NORM_WEIGHT = 0.15
"""DFlash: weight of the final norm. A draft that copies with full confidence before it knows when that is right learns
not to copy at all (docs/log.md)."""


@torch.no_grad()
def initialise(draft: Draft, batches: Iterable[PackedBatch], seed: int) -> None:
    """Overwrite part of a fresh draft's weights with induction heads that are fitted to `batches`.

    A draft whose shape has no room for them (heads without slow rotary pairs, a DFlash of one layer) stays random.
    """
    if isinstance(draft, Eagle3Draft):
        _initialise_eagle3(draft, batches, seed)
    elif isinstance(draft, DFlashDraft):
        _initialise_dflash(draft, batches, seed)
    else:
        raise AssertionError(f"no induction heads for {draft.algorithm}: its schema's `check` has to refuse them")


def _initialise_eagle3(draft: Eagle3Draft, batches: Iterable[PackedBatch], seed: int) -> None:
    """Set half of the first layer's query heads, the keys and values that they attend to, and some rows of `fc`."""
    layer, width = draft.layers[0], draft.shape.hidden_size
    assert isinstance(layer, Eagle3Layer)
    groups, head_dim = draft.shape.num_key_value_heads, draft.shape.head_dim
    heads_per_group = draft.shape.num_attention_heads // groups
    if heads_per_group == 1:
        groups = (groups + 1) // 2
    # The fit gets at most half of the outputs of `fc`.
    dims = slow_dimensions(draft.rotary.frequencies, head_dim, width // (3 * groups))
    if not dims:
        return
    size, half = len(dims), len(dims) // 2
    fit = Fit.of(draft, batches)
    random = fit.random_directions(groups * size - half, torch.Generator().manual_seed(seed))
    directions = torch.cat([fit.best_directions(half), random])
    current = fit.decoders(directions).float()
    previous = fit.decoders(directions[:half], previous=True).float()
    directions = directions.float()
    draft.fc.weight.mul_(1.0 / fit.deviation(draft.fc.weight.cpu().double()).pow(2).mean().sqrt())
    draft.fc.weight[: len(current)].copy_(current)
    draft.fc.weight[len(current) : len(current) + half].copy_(previous)
    vocabulary_embeddings = draft.embed_tokens.weight[draft.vocabulary.tokens].cpu().float()
    copied = padded(principal_directions(vocabulary_embeddings), groups * head_dim)
    scale = MATCH_LOGIT * math.sqrt(head_dim) / size
    attention = layer.self_attn
    if attention.q_norm is not None:  # the norm removes the size of a query; its weight restores it
        attention.q_norm.weight.fill_(MATCH_LOGIT / math.sqrt(head_dim))
    value_rows = attention.v_proj.weight[: groups * head_dim].zero_()
    value_rows[:, :width].copy_(copied.view(head_dim, groups, width).transpose(0, 1).flatten(0, 1))
    for group in range(groups):
        key_rows = attention.k_proj.weight[group * head_dim : (group + 1) * head_dim]
        output = attention.v_proj.weight[group * head_dim : (group + 1) * head_dim, :width].T
        # The first group looks for the token alone, the others for the token and the one before it.
        num_current = size if group == 0 else size - half
        columns = [width + group * size + j for j in range(num_current)]
        columns += [width + len(current) + j for j in range(half)]
        key_rows[dims] = 0.0
        key_rows[dims, columns[:size]] = 1.0
        for query in range(group * heads_per_group, group * heads_per_group + (heads_per_group + 1) // 2):
            query_rows = attention.q_proj.weight[query * head_dim : (query + 1) * head_dim]
            query_rows[dims] = 0.0
            query_scale = scale * math.sqrt(size / num_current)
            compared = directions[group * size : group * size + num_current].to(query_rows)
            query_rows[dims[:num_current], :width] = query_scale * compared
            query_rows[dims[num_current:], [width + j for j in range(size - num_current)]] = query_scale
            attention.o_proj.weight[:, query * head_dim : (query + 1) * head_dim] = output


def _initialise_dflash(draft: DFlashDraft, batches: Iterable[PackedBatch], seed: int) -> None:
    """Let the second layer look for the anchor's earlier occurrences; the first writes the anchor into the mask tokens.

    The context is expressed in a basis: a constant, by which it is distinguished from anchors; the previous token; the
    current token; and random directions.

    `fc` is trained on hidden states that are scaled to unit size in every dimension (`fc_scale`). Some dimensions are
    hundreds of times larger than others, and no norm precedes `fc`: a step that hardly moves it in the small ones
    would destroy these weights in the large ones.
    """
    if len(draft.layers) < 2:
        return
    fit = Fit.of(draft, batches)
    head_dim, width, groups = draft.shape.head_dim, draft.shape.hidden_size, draft.shape.num_key_value_heads
    heads_per_group = draft.shape.num_attention_heads // groups
    dims = slow_dimensions(draft.rotary.frequencies, head_dim, width // 3)
    size = len(dims)
    # Copy where tokens differ most; write the anchor where they differ least.
    principal = principal_directions(draft.embed_tokens.weight[draft.vocabulary.tokens].cpu().float())
    num_copied = min((groups if heads_per_group > 1 else (groups + 1) // 2) * head_dim, width // 2)
    copied, anchor_directions = principal[:num_copied], principal[-size:]
    token_deviation = fit.token_deviation(copied.double())
    scale = token_deviation.square().mean().sqrt()
    mask = embedded(draft, torch.tensor([draft.mask_token_id], device=draft.fc.weight.device))[0].cpu()
    not_mask = fit.discriminant(mask.double())
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis[:, 0] = -not_mask
    basis = torch.linalg.qr(basis)[0]
    basis[:, 0] = -not_mask / not_mask.norm()
    fc_scale = fit.root_mean_square()
    directions = fit.best_directions(size)
    decoders = torch.cat(
        [
            fit.decoders(directions, previous=True),
            fit.decoders(copied.double()) * (token_deviation / scale)[:, None],
            draft.fc.weight.cpu().double()[1 + size + num_copied :] / fc_scale,
        ]
    )
    decoders[size + num_copied :] /= fit.deviation(decoders[size + num_copied :])[:, None]
    context = torch.cat([CONSTANT_SCALE * fit.constant()[None], fit.centred(decoders)])
    draft.fc.weight.copy_((basis @ context * fc_scale).float())
    draft.fc_scale.copy_(fc_scale)
    draft.norm.weight.fill_(NORM_WEIGHT)
    basis = basis.float().to(draft.fc.weight.device)
    _attend_to_anchor(draft, mask, not_mask.float(), directions.float(), anchor_directions)
    attention, previous = _attention(draft, 1), basis[:, 1 : 1 + size].T
    assert attention.q_norm is not None
    attention.q_norm.weight.fill_(MATCH_LOGIT / math.sqrt(head_dim))
    attention.v_proj.weight[:num_copied].copy_(basis[:, 1 + size : 1 + size + num_copied].T)
    for group, output in enumerate((copied * scale.float()).split(head_dim)):
        attention.k_proj.weight[[group * head_dim + dim for dim in dims]] = COMPARED_SCALE * previous
        query = group * heads_per_group
        query_rows = [query * head_dim + dim for dim in dims]
        attention.q_proj.weight[query_rows] = COMPARED_SCALE * anchor_directions.to(previous)
        attention.o_proj.weight[:, query * head_dim : query * head_dim + len(output)] = output.T.to(previous)


def _attend_to_anchor(
    draft: DFlashDraft, mask: Tensor, not_mask: Tensor, directions: Tensor, anchor_directions: Tensor
) -> None:
    """Let the first layer's last head, at every mask token, attend to the anchor alone, and write which token it is.

    Args:
        mask: the mask token's normed embedding [H].
        not_mask: its product is 1 with an anchor's embedding, and -1 with the mask's and the context [H].
        directions: which components of the anchor's embedding are written [n, H].
        anchor_directions: where they are written to [n, H].
    """
    attention, head_dim = _attention(draft, 0), draft.shape.head_dim
    slowest = head_dim // 2 - 1
    query = (draft.shape.num_attention_heads - 1) * head_dim
    group = (draft.shape.num_key_value_heads - 1) * head_dim
    attention.q_proj.weight[query + slowest].copy_(ANCHOR_LOGIT * mask / mask.square().sum())
    attention.k_proj.weight[group + slowest].copy_(ANCHOR_LOGIT * not_mask)
    attention.v_proj.weight[group : group + len(directions)].copy_(directions)
    attention.o_proj.weight[:, query : query + len(directions)].copy_(anchor_directions.T)


def _attention(draft: DFlashDraft, index: int) -> Attention:
    layer = draft.layers[index]
    assert isinstance(layer, DFlashLayer)
    return layer.self_attn


def embedded(draft: Eagle3Draft | DFlashDraft, token_ids: Tensor) -> Tensor:
    """The first layer's input for tokens [T] before training: their embeddings, RMS-normed, float32 [T, H]."""
    embeddings = nn.functional.embedding(token_ids, draft.embed_tokens.weight).float()
    return nn.functional.rms_norm(embeddings, (draft.shape.hidden_size,), eps=draft.shape.rms_norm_eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Second moments of the inputs of `fc` and of token embeddings, and the linear fits that follow from them.

    All float64, on the CPU; sums over positions.
    """

    count: int
    """Positions."""
    inputs: Tensor
    """Sum of inputs [F]."""
    input_products: Tensor
    """Sum of inputs' outer products [F, F]."""
    tokens: Tensor
    """Sum of the tokens' embeddings [H]."""
    token_products: Tensor
    """Sum of their outer products [H, H]."""
    current: Tensor
    """Sum of input times embedding of the position's token [F, H]."""
    previous: Tensor
    """The same with the embedding of the token before [F, H]."""

    @classmethod
    def of(cls, draft: Eagle3Draft | DFlashDraft, batches: Iterable[PackedBatch]) -> Fit:
        """Sum over all positions of the batches but the first of each document."""
        totals: list[Tensor] = []
        count = 0
        for batch in batches:
            has_previous = torch.ones(len(batch.token_ids), dtype=torch.bool, device=batch.token_ids.device)
            has_previous[[start for start, _ in batch.documents()]] = False
            f = draft.fc_input(batch.hidden_states.float())[has_previous]
            embeddings = embedded(draft, batch.token_ids)
            current, previous = embeddings[has_previous], embeddings[:-1][has_previous[1:]]
            terms = [f.sum(0), f.T @ f, current.sum(0), current.T @ current, f.T @ current, f.T @ previous]
            count += len(f)
            totals = [term.cpu().double() + (totals[i] if totals else 0.0) for i, term in enumerate(terms)]
        return cls(count=count, **dict(zip(cls.__slots__[1:], totals, strict=True)))

    def root_mean_square(self) -> Tensor:
        """Root mean square of each input dimension [F]."""
        return (self.input_products.diagonal() / self.count).clamp(min=1e-12).sqrt()

    def deviation(self, rows: Tensor) -> Tensor:
        """Standard deviation of the products of rows [n, F] with inputs [n]."""
        mean = rows @ self.inputs / self.count
        return ((rows @ self.input_products * rows).sum(1) / self.count - mean.square()).clamp(min=1e-12).sqrt()

    def best_directions(self, count: int) -> Tensor:
        """Directions in which inputs tell most of the previous token, best first; unit token variance [count, H].

        The mean embedding is left out: it distinguishes no token from another.
        """
        covariance = self._token_covariance()
        explained = self._without_mean(self._previous_covariance().T @ self._ridge(self._previous_covariance()))
        covariance.diagonal().add_(MIN_VARIANCE * covariance.diagonal().mean())
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance))
        directions = torch.linalg.eigh(whitening @ explained @ whitening.T)[1].flip(1).T[:count] @ whitening
        directions -= (directions @ self._mean_direction())[:, None] * self._mean_direction()
        return directions / self.token_deviation(directions)[:, None]

    def random_directions(self, count: int, generator: torch.Generator) -> Tensor:
        """Random directions of unit token variance, without the mean embedding [count, H]."""
        drawn = torch.randn(len(self.tokens), count, generator=generator, dtype=torch.float64)
        drawn -= self._mean_direction()[:, None] * (self._mean_direction() @ drawn)
        directions = torch.linalg.qr(drawn)[0].T
        return directions / self.token_deviation(directions)[:, None]

    def decoders(self, directions: Tensor, previous: bool = False) -> Tensor:
        """Rows whose product with an input estimates the token's, or the previous token's, components [n, H] -> [n, F].

        The estimates have unit variance.
        """
        current = self.current - self.inputs[:, None] * self.tokens / self.count
        rows = self._ridge((self._previous_covariance() if previous else current) @ directions.T).T
        return rows / self.deviation(rows)[:, None]

    def constant(self) -> Tensor:
        """A row whose product with an input is 1 on average, with little variance [F]."""
        gram, scale = self._gram()
        row = torch.linalg.solve(gram, self.inputs / self.count / scale) / scale
        return row / (row @ self.inputs / self.count)

    def centred(self, rows: Tensor) -> Tensor:
        """Rows [n, F] shifted so that their products with inputs are 0 on average."""
        return rows - (rows @ self.inputs / self.count)[:, None] * self.constant()

    def discriminant(self, embedding: Tensor) -> Tensor:
        """A vector [H] whose product is about 1 with tokens and -1 with one embedding [H]: least squares."""
        products = self.token_products / self.count + torch.outer(embedding, embedding)
        products.diagonal().add_(MIN_VARIANCE * products.diagonal().mean())
        return torch.linalg.solve(products, self.tokens / self.count - embedding)

    def token_deviation(self, directions: Tensor) -> Tensor:
        """Standard deviation of tokens' components along directions [n, H]: [n]."""
        return (directions @ self._token_covariance() * directions).sum(1).clamp(min=1e-12).sqrt()

    def _previous_covariance(self) -> Tensor:
        return self.previous - self.inputs[:, None] * self.tokens / self.count

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Products of inputs of unit size, with the ridge penalty [F, F]; and the sizes [F]."""
        scale = self.root_mean_square()
        gram = self.input_products / self.count / scale[:, None] / scale
        gram.diagonal().add_(RIDGE)
        return gram, scale

    def _ridge(self, covariance: Tensor) -> Tensor:
        """Ridge regression on the inputs, given their covariance with targets [F, n]: [F, n]."""
        gram, scale = self._gram()
        return torch.linalg.solve(gram, covariance / self.count / scale[:, None]) / scale[:, None]

    def _mean_direction(self) -> Tensor:
        mean = self.tokens / self.count
        return mean / mean.norm().clamp(min=1e-12)

    def _without_mean(self, products: Tensor) -> Tensor:
        """Products of embeddings [H, H], projected onto what is orthogonal to their mean."""
        projection = torch.eye(len(products), dtype=products.dtype)
        projection = projection - self._mean_direction()[:, None] * self._mean_direction()
        return projection @ products @ projection

    def _token_covariance(self) -> Tensor:
        mean = self.tokens / self.count
        return self._without_mean(self.token_products / self.count - mean[:, None] * mean)


def principal_directions(rows: Tensor) -> Tensor:
    """The principal directions of rows [n, H], largest variance first [H, H]."""
    centred = rows - rows.mean(0)
    return torch.linalg.eigh((centred.T @ centred).double())[1].flip(1).T.float()


def slow_dimensions(frequencies: Tensor, head_dim: int, limit: int) -> list[int]:
    """Dimensions of a head whose rotary pairs compare contents, at most `limit`: first halves, then second halves."""
    slow: list[int] = (frequencies < 1.0 / SLOW).nonzero()[:, 0].tolist()
    slow = slow[max(0, len(slow) - limit // 2) :]
    return [*slow, *(pair + head_dim // 2 for pair in slow)]


def padded(rows: Tensor, count: int) -> Tensor:
    """The first `count` of rows [n, H], zeros after the n-th [count, H]."""
    return nn.functional.pad(rows[:count], (0, 0, 0, max(0, count - len(rows))))
