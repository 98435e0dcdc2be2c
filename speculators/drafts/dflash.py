"""DFlash (z-lab 2026, arXiv:2602.06036): block diffusion. One forward pass proposes a whole block of tokens.

Idea: a block is the last known token, the anchor, followed by one mask token for each proposal. The draft's few layers
attend to the target's hidden states before the anchor and, in both directions, to the block itself. So all proposals
are made at once, and each depends on the others.

Reads from the target: the hidden states that enter `target_layer_ids` (id i is the input of decoder layer i),
concatenated and projected once for all layers; embeddings and LM head, frozen unless the options train them. Assumes
rotary embeddings over whole heads.

Slot 0 of the block at anchor a is token a. Slot k proposes token a+k, and is trained on the target's distribution at
a+k-1. The block sees hidden states of positions before a only: a server does not have the anchor's own yet when it
proposes. Keys and values of the context are projected by the same matrices as the block's, without the layer's norm.

Any supervised token with a supervised successor can be an anchor. A training step draws some of them from the seed
and the number of the step; validation takes all of them, because a server may propose after any of them.

Compatibility: the package vllm-project/speculators ("upstream") knows causal blocks only in layers with a sliding
window, and vLLM makes every layer causal if `sliding_window_non_causal` is false. So every checkpoint sets it, and a
causal draft without a window gets one of `max_position_embeddings`. vLLM takes trained embeddings and heads from the
checkpoint; upstream still takes the embeddings, and the head unless the vocabulary is reduced, from the target.

Shape suffixes: T tokens of the batch; C context positions; R blocks; B slots, of which L are computed (B, and K in the
last layer); K = B - 1 proposals; A target layers read; H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speculators.config.algorithms import DFlash, Init, Speculator, Weighting
from speculators.drafts.base import (
    LM_HEAD,
    TARGET_MATRICES,
    Draft,
    Predictions,
    Supervision,
    TargetParts,
    TrainState,
    Vocabulary,
    hash_to_int,
    layer_config,
)
from speculators.drafts.layers import MLP, Attention, LayerConfig, Linear, RMSNorm, Rotary
from speculators.errors import ContractError
from speculators.features.batch import PackedBatch
from speculators.ops.attention import anchored_attention
from speculators.ops.functional import apply_rotary
from speculators.ops.masks import AnchorMask, anchor_mask, context_positions

SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """Indices of one batch's anchors, context and predictions; int64 unless a field says otherwise."""

    anchors: Tensor
    """Indices into the batch, ascending [R]."""
    context: Tensor
    """Indices of each document's tokens before its last anchor [C]; masks select from them."""
    position_ids: Tensor
    """Position of every token in its document [T]."""
    target_index: Tensor
    """Index of the position whose distribution a proposal should match [K, R]; arbitrary where not valid."""
    valid: Tensor
    """bool [K, R]: the proposed token is in the same document and supervised."""


class DFlashLayer(nn.Module):
    """A decoder layer with normed queries and keys; `window` in tokens, None for all of the document."""

    def __init__(self, config: LayerConfig, window: int | None, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, head_norm=True)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, feeds_matmul=True)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, feeds_matmul=True)
        self.window, self.causal = window, causal

    def finish(self, attention_output: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual and MLP: [R, L, heads * D] and residual [R, L, H] -> [R, L, H]."""
        hidden_states = residual + self.self_attn.o_proj(attention_output)
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class DFlashDraft(Draft):
    """The DFlash draft; the module's docstring describes it. Arguments as in `Draft`.

    Raises:
        ContractError: the checkpoint's anchor proposes a token itself.
    """

    algorithm: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    options: DFlash
    fc_scale: Tensor
    """float32 [A * H]: divides the input of `fc`; fitted by `init=induction` (`drafts.induction`), else ones.
    `save` folds it into the weight of `fc`."""

    def __init__(
        self, config: Mapping[str, Any], options: Speculator, embeddings: Tensor, head: Tensor,
        vocabulary: Vocabulary, stored: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__(config, options, embeddings, head, vocabulary, stored)
        if config.get("sample_from_anchor"):
            raise ContractError(
                "the draft's anchor proposes a token itself (sample_from_anchor), which is not supported",
                "train a draft whose anchor is the last known token",
            )
        layer_dict = config["transformer_layer_config"]
        self.shape = LayerConfig.from_dict(layer_dict)
        self.block_size: int = config["block_size"]
        self.mask_token_id: int = config["mask_token_id"]
        width, eps = self.shape.hidden_size, self.shape.rms_norm_eps
        num_target_layers = len(config["aux_hidden_state_layer_ids"])
        self.fc = Linear(num_target_layers * width, width)
        self.hidden_norm = RMSNorm(width, eps, feeds_matmul=True)
        num_layers = layer_dict["num_hidden_layers"]
        slides = [kind == SLIDING for kind in layer_dict.get("layer_types") or ["full_attention"] * num_layers]
        causal = not config.get("sliding_window_non_causal", False)
        self.layers = nn.ModuleList(
            DFlashLayer(self.shape, layer_dict["sliding_window"] if slide else None, causal=slide and causal)
            for slide in slides
        )
        self.norm = RMSNorm(width, eps)
        self.rotary = Rotary(self.shape)
        self.register_buffer("fc_scale", torch.ones(num_target_layers * width), persistent=False)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, DFlash)
        if options.mask_token_id is None or not 0 <= options.mask_token_id < len(parts.embeddings):
            raise ContractError(
                f"the mask token is {options.mask_token_id}, the target has {len(parts.embeddings)} tokens",
                "set speculator.mask_token_id to a token that answers do not use",
            )
        layer_dict = layer_config(parts, options, "qwen3")
        if options.causal or options.sliding_window:
            layer_dict["layer_types"] = [SLIDING] * options.num_layers
            layer_dict["sliding_window"] = options.sliding_window or layer_dict["max_position_embeddings"]
            layer_dict["use_sliding_window"] = True
        return {
            "aux_hidden_state_layer_ids": layer_ids,
            "block_size": options.block_size,
            "mask_token_id": options.mask_token_id,
            "sample_from_anchor": False,
            "sliding_window_non_causal": not options.causal,
            "transformer_layer_config": layer_dict,
        }

    def omitted_tensors(self) -> set[str]:
        needed = {LM_HEAD} if self.vocabulary.reduced else set()
        return TARGET_MATRICES - needed - self.own_matrices

    def fitted_tensors(self) -> dict[str, Tensor]:
        return {"fc_scale": self.fc_scale} if self.options.init is Init.induction else {}

    def folded(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.options.init is not Init.induction:
            return weights
        return weights | {"fc.weight": weights["fc.weight"] / self.fc_scale.to(weights["fc.weight"])}

    def forward(self, batch: PackedBatch, state: TrainState | None = None) -> Predictions:
        layout = self.layout(batch, state)
        fc_input = self.fc_input(batch.hidden_states[layout.context]).to(self.fc.weight.dtype)
        if self.options.init is Init.induction:
            fc_input /= self.fc_scale
        context = self.hidden_norm(self.fc(fc_input))
        hidden_states_RKH = self.norm(self._run_layers(batch, layout, context))
        count = layout.valid.sum().clamp(min=1)
        share = layout.valid.float() / count
        weight, reweight = share, None
        if self.options.weighting is Weighting.dpace:
            reweight = partial(dpace_weights, share=share, alpha=self.options.dpace_alpha)
        else:
            slots = torch.arange(len(share), device=share.device)
            weight = share * torch.exp(-slots / self.options.decay_gamma)[:, None]
        return Predictions(
            hidden_states=hidden_states_RKH.transpose(0, 1),
            target_index=layout.target_index,
            valid=layout.valid,
            weight=weight,
            count=count.float().expand(len(share)),
            reweight=reweight,
        )

    def supervision(self, batch: PackedBatch, state: TrainState | None = None) -> Supervision:
        layout = self.layout(batch, state)
        source_mask = torch.zeros_like(batch.loss_mask)
        source_mask[layout.anchors] = True
        counts = layout.valid.sum().clamp(min=1).float().expand(len(layout.valid))
        return Supervision(counts=counts, source_mask=source_mask)

    def fc_input(self, hidden_states: Tensor) -> Tensor:
        """The target's hidden states [..., A, H], concatenated [..., A * H]."""
        return hidden_states.flatten(-2)

    def _run_layers(self, batch: PackedBatch, layout: BlockLayout, context: Tensor) -> Tensor:
        """Run the layers over all blocks; projected context [C, H] -> output of the proposing slots [R, K, H]."""
        slots = torch.arange(self.block_size, device=layout.anchors.device)
        position_ids = layout.position_ids[layout.anchors][:, None] + slots
        cos, sin = (each.unflatten(0, position_ids.shape) for each in self.rotary(position_ids.flatten()))
        context_cos, context_sin = self.rotary(layout.position_ids[layout.context])
        tokens = torch.cat([batch.token_ids[layout.anchors], batch.token_ids.new_tensor([self.mask_token_id])])
        hidden_states = nn.functional.embedding(tokens, self.embed_tokens.weight).float()
        masks: dict[int | None, AnchorMask] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DFlashLayer)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden_states)
            q, k, v = attention.queries(normed), attention.keys(normed), attention.values(normed)
            if index == 0:  # every mask token is still the same row, which is projected once
                q, k, v, hidden_states = (self._expand_masks(rows) for rows in (q, k, v, hidden_states))
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            if index == len(self.layers) - 1:  # the anchor proposes nothing
                q, hidden_states = q[:, 1:], hidden_states[:, 1:]
            if layer.window not in masks:
                masks[layer.window] = anchor_mask(batch.documents(), layout.anchors, layer.window)
            context_keys = apply_rotary(attention.keys(context), context_cos, context_sin)
            attention_output = anchored_attention(
                q, (context_keys, attention.values(context)), (k, v), masks[layer.window], layer.causal
            )
            hidden_states = layer.finish(attention_output, hidden_states)
        return hidden_states

    def _expand_masks(self, rows: Tensor) -> Tensor:
        """Rows of the R anchors and of one mask token [R + 1, ...] as blocks [R, B, ...]."""
        masks = rows[-1].expand(len(rows) - 1, self.block_size - 1, *rows.shape[1:])
        return torch.cat([rows[:-1, None], masks], dim=1)

    def layout(self, batch: PackedBatch, state: TrainState | None) -> BlockLayout:
        """Choose the anchors, and compute what their blocks attend to and predict."""
        device, total = batch.token_ids.device, len(batch.token_ids)
        starts_T, ends_T = batch.bounds()
        index_T = torch.arange(total, device=device)
        eligible_T = torch.zeros_like(batch.loss_mask)
        eligible_T[:-1] = batch.loss_mask[:-1] & batch.loss_mask[1:] & (index_T[1:] < ends_T[:-1])
        if batch.anchor_mask is None:
            anchors = self._draw_anchors(eligible_T.nonzero()[:, 0], state)
        else:
            anchors = _at_least_one((eligible_T & batch.anchor_mask).nonzero()[:, 0])
        target_KR = anchors[None, :] + torch.arange(self.block_size - 1, device=device)[:, None]
        inside_KR = target_KR + 1 < ends_T[anchors]
        target_KR = target_KR.clamp(max=total - 1)
        supervised_KR = batch.loss_mask[(target_KR + 1).clamp(max=total - 1)]
        return BlockLayout(
            anchors=anchors,
            context=context_positions(batch.documents(), anchors),
            position_ids=index_T - starts_T,
            target_index=target_KR,
            valid=inside_KR & supervised_KR & eligible_T[anchors],
        )

    def _draw_anchors(self, eligible: Tensor, state: TrainState | None) -> Tensor:
        """The step's anchors, ascending: `max_anchors` of the eligible indices, or all of them without a state."""
        if state is None:
            return eligible
        if not len(eligible):
            return _at_least_one(eligible)
        generator = torch.Generator().manual_seed(hash_to_int(f"anchors {state.seed} {state.step}"))
        drawn = torch.randperm(len(eligible), generator=generator)[: self.options.max_anchors].sort().values
        return eligible[drawn.to(eligible.device)]


def _at_least_one(anchors: Tensor) -> Tensor:
    """The anchors, or index 0 if there is none: a step needs gradients, even if its block is not supervised."""
    return anchors if len(anchors) else anchors.new_zeros(1)


def dpace_weights(divergence: Tensor, share: Tensor, alpha: float) -> Tensor:
    """D-PACE: weight each proposal by how many accepted tokens depend on it.

    A proposal passes with probability exp(-divergence), mixed with 1 by `alpha`; one that is not supervised passes for
    certain. It is accepted with the cumulative product of these up to it, and its weight is the sum of that over itself
    and all later supervised proposals, times `share`.

    Args:
        divergence: loss of each proposal, a negative log-probability (`ce` or `nla`); 0 where not valid [K, R].
        share: weight of a proposal whose later ones all pass, 0 where not supervised [K, R].
        alpha: 0 to 1.

    Returns: [K, R].
    """
    supervised = share > 0
    passed = torch.where(supervised, (1.0 - alpha) * torch.exp(-divergence) + alpha, 1.0)
    accepted = torch.cumprod(passed, dim=0) * supervised
    weights, later = torch.empty_like(share), torch.zeros_like(share[0])
    for k in reversed(range(len(share))):  # a cumulative sum has no deterministic kernel on a GPU
        later = later + accepted[k]
        weights[k] = later * share[k]
    return weights
