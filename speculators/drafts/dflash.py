"""DFlash (z-lab 2026, arXiv:2602.06036): block diffusion. One forward pass fills in a whole block of proposals.

Idea: a block is the last token that is known, the anchor, and a mask for each token that is proposed. Its few layers
attend to the target's own states of everything before the anchor and to the block itself, in both directions, so that
all proposals are made at once, and each place knows what the others are about.

Reads from the target: the states entering `layer_ids`, concatenated and projected once for all layers; embeddings and
head, frozen unless they are asked to be trained. Assumes RoPE over whole heads.

Slot 0 of the block at anchor a is token a; slot k is asked for token a+k, and learns the target's distribution at
a+k-1. The block sees states of places before a only: the anchor's own is not there yet when a server proposes. Keys and
values of the context come from the projected states by the same matrices as the block's, but without the layer's norm.

Any supervised token with a supervised one after it can be an anchor. A training step draws some of them, from the seed
and the number of the step alone; validation takes all of them, because a server may propose after any of them.

Where a checkpoint is read: upstream knows a causal block only in layers with a sliding window, and vLLM makes all
blocks causal unless `sliding_window_non_causal` says otherwise. So every draft of ours that is not causal says so, and
a causal one without a window has one as long as its positions. Embeddings and head that were trained are in the
checkpoint, and vLLM takes them from there; upstream's package takes its embeddings, and the head of a whole
vocabulary, from the target even then.

Shape suffixes: T tokens of the pack; C context places; R blocks; B slots; K = B - 1 proposals; H width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speculators.config.algorithms import DFlash, Speculator, Weighting
from speculators.drafts.base import (
    TARGETS,
    Draft,
    Predictions,
    Supervision,
    TargetParts,
    Vocabulary,
    draw,
    layer_config,
)
from speculators.drafts.induction import MATCH, Fit, principal, slow_places
from speculators.drafts.layers import (
    MLP,
    Attention,
    LayerConfig,
    Linear,
    RMSNorm,
    Rotary,
    initialise,
)
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch
from speculators.ops.attention import anchored_attention
from speculators.ops.functional import apply_rotary
from speculators.ops.masks import AnchorMask, anchor_mask, context_positions

SLIDING = "sliding_attention"
ALONE = 20.0
"""Of a head that looks at one thing: how far what it is told by stands above what was drawn."""
CONSTANT = 6.0
"""Of what is constant in the context, against what varies there."""
LOUD = 3.0
"""Of what is compared, against what was drawn in the same head."""
QUIET = 0.15
"""The final norm's weight where a draft begins by copying: one that is certain before it knows when it is right learns
first of all not to copy (docs/log.md)."""
READ_SIZE = "fc.size"
"""Of `measured`: how large each dimension is that `fc` reads [A * H]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things are in one pack; all places int64."""

    anchors: Tensor
    """Places in the pack, ascending [R]."""
    context: Tensor
    """Places that some block sees [C]."""
    positions: Tensor
    """Place of every token in its own document, from 0 [T]."""
    target: Tensor
    """Place whose distribution a proposal should match [K, R]; anything where it is not valid."""
    valid: Tensor
    """bool [K, R]: the proposed token is in the same document and supervised."""


class Layer(nn.Module):
    """A decoder layer with normed queries and keys."""

    def __init__(self, config: LayerConfig, window: int | None, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, head_norm=True)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, feeds_matmul=True)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, feeds_matmul=True)
        self.window, self.causal = window, causal

    def finish(self, attended: Tensor, stream: Tensor) -> Tensor:
        """Everything after attention, [R, L, H]."""
        stream = stream + self.self_attn.o_proj(attended)
        out: Tensor = stream + self.mlp(self.post_attention_layernorm(stream))
        return out


class DFlashDraft(Draft):
    """See the module."""

    algorithm: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"

    def __init__(self, config: Mapping[str, Any], embeddings: Tensor, head: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(config, embeddings, head, vocabulary)
        plain = config["transformer_layer_config"]
        if config.get("sample_from_anchor"):
            raise ContractError(
                "the draft's anchor proposes a token itself (sample_from_anchor)",
                "such drafts are not known here; train one whose anchor is the last token that is known",
            )
        shape = LayerConfig.from_plain(plain)
        self.shape = shape
        self.slots: int = config["block_size"]
        self.mask_token_id: int = config["mask_token_id"]
        self.anchors, self.seed = 512, 0
        self.visit: int | None = None
        """The step that is trained on; None where all anchors are wanted."""
        self.options = DFlash()
        width, read = shape.hidden_size, len(config["aux_hidden_state_layer_ids"])
        self.fc = Linear(read * width, width)
        self.hidden_norm = RMSNorm(width, shape.rms_norm_eps, feeds_matmul=True)
        count = plain["num_hidden_layers"]
        slides = [kind == SLIDING for kind in plain.get("layer_types") or ["full_attention"] * count]
        causal = not config.get("sliding_window_non_causal", False)
        self.layers = nn.ModuleList(
            Layer(shape, plain["sliding_window"] if slide else None, causal=slide and causal) for slide in slides
        )
        self.norm = RMSNorm(width, shape.rms_norm_eps)
        self.rotary = Rotary(shape)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, DFlash)
        if options.mask_token_id is None or not 0 <= options.mask_token_id < len(parts.embeddings):
            raise ContractError(
                f"the mask token is {options.mask_token_id}, the target has {len(parts.embeddings)} tokens",
                "set speculator.mask_token_id to a token that answers do not use",
            )
        shape = layer_config(parts, options, "qwen3")
        if options.causal or options.sliding_window:
            shape["layer_types"] = [SLIDING] * options.num_layers
            shape["sliding_window"] = options.sliding_window or shape["max_position_embeddings"]
            shape["use_sliding_window"] = True
        return {
            "aux_hidden_state_layer_ids": layer_ids,
            "block_size": options.num_speculative_tokens + 1,
            "mask_token_id": options.mask_token_id,
            "sample_from_anchor": False,
            "sliding_window_non_causal": not options.causal,
            "transformer_layer_config": shape,
        }

    def left_out(self) -> set[str]:
        kept = {"lm_head.weight"} if self.vocabulary.reduced else set()
        return TARGETS - kept - self.own

    def initialise(self, seed: int) -> None:
        self.seed = seed
        initialise(self, self.shape.initializer_range, torch.Generator().manual_seed(seed))

    def configure(self, options: Speculator) -> None:
        assert isinstance(options, DFlash)
        self.options, self.anchors = options, options.max_anchors

    @torch.no_grad()
    def prepare(self, packs: Iterable[PackedBatch], seed: int) -> None:
        """Let the second layer look for where the anchor stood before, once the first has told the masks what it is.

        The context is laid out along a basis: something constant, in which it is told from anchors; the token before;
        the token itself; and what was drawn.

        From here on `fc` is trained over states of which each dimension has unit size. Some are hundreds of times
        larger than others, and no norm comes before `fc`: a step that hardly moves it in the small ones would undo in
        the large ones what is prepared here.
        """
        if not self.options.induction or len(self.layers) < 2:
            return
        fit = Fit.of(packs, self._read, self._token)
        head, width, groups = self.shape.head_dim, self.shape.hidden_size, self.shape.num_key_value_heads
        shared = self.shape.num_attention_heads // groups
        places = slow_places(self.rotary.frequencies, head, width // 3)
        size = len(places)
        # What is copied is where tokens differ most; the anchor is written down where they differ least.
        principals = principal(self.embed_tokens.weight[self.vocabulary.tokens].cpu().float())
        copied = principals[: min((groups if shared > 1 else (groups + 1) // 2) * head, width // 2)]
        told = principals[-size:]
        deviation = fit.deviation(copied.double())
        scale = deviation.square().mean().sqrt()
        mask = self._token(torch.tensor([self.mask_token_id], device=self.fc.weight.device))[0].cpu()
        apart = fit.apart_from(mask.double())
        drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn[:, 0] = -apart
        basis = torch.linalg.qr(drawn)[0]
        basis[:, 0] = -apart / apart.norm()
        read = fit.size()
        look = fit.directions(size)
        readers = torch.cat(
            [
                fit.readers(look, before=True),
                fit.readers(copied.double()) * (deviation / scale)[:, None],
                self.fc.weight.cpu().double()[1 + size + len(copied) :] / read,
            ]
        )
        readers[size + len(copied) :] /= fit.spread(readers[size + len(copied) :])[:, None]
        laid = torch.cat([CONSTANT * fit.constant()[None], fit.centred(readers)])
        self.fc.weight.copy_((basis @ laid * read).float())
        self.measured[READ_SIZE] = read.float().to(self.fc.weight.device)
        self.norm.weight.fill_(QUIET)
        basis = basis.float().to(self.fc.weight.device)
        self._tell_anchor(mask, apart.float(), look.float(), told)
        attention, before = self._attention(1), basis[:, 1 : 1 + size].T
        assert attention.q_norm is not None
        attention.q_norm.weight.fill_(MATCH / math.sqrt(head))
        values = basis[:, 1 + size : 1 + size + len(copied)].T
        attention.v_proj.weight[: len(copied)].copy_(values)
        for group, part in enumerate((copied * scale.float()).split(head)):
            attention.k_proj.weight[[group * head + place for place in places]] = LOUD * before
            query = group * shared
            attention.q_proj.weight[[query * head + place for place in places]] = LOUD * told.to(before)
            attention.o_proj.weight[:, query * head : query * head + len(part)] = part.T.to(before)

    def folded(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if READ_SIZE not in self.measured:
            return weights
        return weights | {"fc.weight": weights["fc.weight"] / self.measured[READ_SIZE].to(weights["fc.weight"])}

    def _tell_anchor(self, mask: Tensor, apart: Tensor, look: Tensor, told: Tensor) -> None:
        """Let the first layer's last head, of every mask, look at the anchor alone, and write down what it is.

        Args:
            mask: what is read of the mask's embedding [H].
            apart: reads 1 of an anchor, and -1 of a mask and of the context [H].
            look: what is to be told of the anchor [n, H].
            told: the directions in which it is written down [n, H].
        """
        attention, head = self._attention(0), self.shape.head_dim
        slowest = head // 2 - 1
        query = (self.shape.num_attention_heads - 1) * head
        group = (self.shape.num_key_value_heads - 1) * head
        attention.q_proj.weight[query + slowest].copy_(ALONE * mask / mask.square().sum())
        attention.k_proj.weight[group + slowest].copy_(ALONE * apart)
        attention.v_proj.weight[group : group + len(look)].copy_(look)
        attention.o_proj.weight[:, query : query + len(look)].copy_(told.T)

    def _attention(self, index: int) -> Attention:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer.self_attn

    def _read(self, pack: PackedBatch) -> Tensor:
        """What `fc` reads at every place [T, A * H]."""
        return pack.hidden_states.flatten(1).float()

    def _token(self, token_ids: Tensor) -> Tensor:
        """What the first layer reads of tokens at the beginning [T, H]."""
        embedded = nn.functional.embedding(token_ids, self.embed_tokens.weight).float()
        return nn.functional.rms_norm(embedded, (self.shape.hidden_size,), eps=self.shape.rms_norm_eps)

    def advance(self, step: int, total: int) -> None:
        self.visit = step if step < total else None

    def forward(self, pack: PackedBatch) -> Predictions:
        at = self.layout(pack)
        features = pack.hidden_states[at.context].flatten(1).to(self.fc.weight.dtype)
        if READ_SIZE in self.measured:
            features /= self.measured[READ_SIZE]
        context = self.hidden_norm(self.fc(features))
        hidden_RKH = self.norm(self._blocks(pack, at, context))
        count = at.valid.sum().clamp(min=1)
        share = at.valid.float() / count
        weight, reweigh = share, None
        if self.options.weighting is Weighting.dpace:
            reweigh = partial(reach, share=share, alpha=self.options.dpace_alpha)
        else:
            weight = (
                share * torch.exp(-torch.arange(len(share), device=share.device) / self.options.decay_gamma)[:, None]
            )
        return Predictions(
            hidden=hidden_RKH.transpose(0, 1),
            target=at.target,
            valid=at.valid,
            weight=weight,
            count=count.float().expand(len(share)),
            reweigh=reweigh,
        )

    def supervision(self, whole: PackedBatch) -> Supervision:
        at = self.layout(whole)
        chosen = torch.zeros_like(whole.loss_mask)
        chosen[at.anchors] = True
        return Supervision(counts=at.valid.sum().clamp(min=1).float().expand(len(at.valid)), chosen=chosen)

    def _blocks(self, pack: PackedBatch, at: Layout, context: Tensor) -> Tensor:
        """Run the layers over all blocks: what leaves them at the places that propose [R, K, H]."""
        positions = at.positions[at.anchors][:, None] + torch.arange(self.slots, device=at.anchors.device)
        cosine, sine = (x.unflatten(0, positions.shape) for x in self.rotary(positions.flatten()))
        context_turn = self.rotary(at.positions[at.context])
        rows = torch.cat([pack.token_ids[at.anchors], pack.token_ids.new_tensor([self.mask_token_id])])
        stream = nn.functional.embedding(rows, self.embed_tokens.weight).float()
        over: dict[int | None, AnchorMask] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            read = layer.input_layernorm(stream)
            attention = layer.self_attn
            q, k, v = attention.queries(read), attention.keys(read), attention.values(read)
            if index == 0:  # all masks are still the same row, which is projected once
                q, k, v, stream = (self._laid_out(x) for x in (q, k, v, stream))
            q, k = apply_rotary(q, cosine, sine), apply_rotary(k, cosine, sine)
            if index == len(self.layers) - 1:  # the anchor proposes nothing
                q, stream = q[:, 1:], stream[:, 1:]
            if layer.window not in over:
                over[layer.window] = anchor_mask(pack.documents(), at.anchors, layer.window)
            seen = (apply_rotary(attention.keys(context), *context_turn), attention.values(context))
            stream = layer.finish(anchored_attention(q, seen, (k, v), over[layer.window], layer.causal), stream)
        return stream

    def _laid_out(self, rows: Tensor) -> Tensor:
        """Rows of the anchors and of a mask [R + 1, ...] as blocks [R, B, ...]."""
        masks = rows[-1].expand(len(rows) - 1, self.slots - 1, *rows.shape[1:])
        return torch.cat([rows[:-1, None], masks], dim=1)

    def layout(self, pack: PackedBatch) -> Layout:
        """Choose anchors, and work out what their blocks see and what they are asked for."""
        device, total = pack.token_ids.device, len(pack.token_ids)
        starts_T, ends_T = pack.bounds()
        places_T = torch.arange(total, device=device)
        asked_T = torch.zeros_like(pack.loss_mask)
        asked_T[:-1] = pack.loss_mask[:-1] & pack.loss_mask[1:] & (places_T[1:] < ends_T[:-1])
        if pack.anchor_mask is None:
            anchors = self._drawn(asked_T.nonzero()[:, 0])
        else:
            anchors = _one_at_least((asked_T & pack.anchor_mask).nonzero()[:, 0])
        target_KR = anchors[None, :] + torch.arange(self.slots - 1, device=device)[:, None]
        inside_KR = target_KR + 1 < ends_T[anchors]
        target_KR = target_KR.clamp(max=total - 1)
        return Layout(
            anchors=anchors,
            context=context_positions(pack.documents(), anchors),
            positions=places_T - starts_T,
            target=target_KR,
            valid=inside_KR & pack.loss_mask[(target_KR + 1).clamp(max=total - 1)] & asked_T[anchors],
        )

    def _drawn(self, places: Tensor) -> Tensor:
        """The anchors of this step, of all `places` where one could be; ascending."""
        if self.visit is None:
            return places
        if not len(places):
            return _one_at_least(places)
        generator = torch.Generator().manual_seed(draw(f"anchors {self.seed} {self.visit}"))
        picked = torch.randperm(len(places), generator=generator)[: self.anchors].sort().values
        return places[picked.to(places.device)]


def _one_at_least(places: Tensor) -> Tensor:
    """A step needs gradients, if only zeros: one block where there is none, and nothing of it is supervised."""
    return places if len(places) else places.new_zeros(1)


def reach(divergence: Tensor, share: Tensor, alpha: float) -> Tensor:
    """D-PACE: the weight of a place is the sum, over it and all later ones, of how likely each of them is reached.

    A place is passed with the probability that the draft gives the wanted token, mixed with 1 by `alpha`; one that is
    not supervised is passed for certain and weighs nothing.

    Args:
        divergence: cross-entropy [K, R].
        share: what a place weighs where all are reached for certain, 0 where it is not supervised [K, R].
        alpha: 0 to 1.

    Returns: [K, R].
    """
    supervised = share > 0
    passed = torch.where(supervised, (1.0 - alpha) * torch.exp(-divergence) + alpha, 1.0)
    reached = torch.cumprod(passed, dim=0) * supervised
    weights, after = torch.empty_like(share), torch.zeros_like(share[0])
    for k in reversed(range(len(share))):  # a cumulative sum has no deterministic kernel on a GPU
        after = after + reached[k]
        weights[k] = after * share[k]
    return weights
