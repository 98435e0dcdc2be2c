"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): one decoder layer that continues from the target's hidden states.

Idea: the target's hidden states already hold what the next tokens depend on. So a single decoder layer can propose
tokens when it reads the hidden states of a low, a middle and a high target layer and the embedding of the sampled
token. In training, the draft is unrolled over its own outputs (training-time test, TTT), because those are its input
when it proposes the second and the third token.

Reads from the target: the hidden states that enter `target_layer_ids` (id i is the input of decoder layer i);
embeddings and LM head, frozen unless the options train them. Assumes rotary embeddings over whole heads.

TTT step 0 at position t reads the hidden states of t and the embedding of token t+1, and predicts the target's
distribution at t+1, that is, token t+2. Step k reads, in place of the target's hidden states, step k-1's output at t,
and token t+1+k; it predicts the distribution at t+1+k. Tokens are always those of the row, never the draft's. Step k
attends to the keys of step 0 at all positions up to t, and to its own of steps 1 to k at t. A prediction is supervised
where the loss mask is set at the position whose distribution it predicts.

Shape suffixes: T tokens of the batch; S sources, positions with a successor in their document; R sources with a
supervised prediction; A target layers read; H hidden size; K TTT steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speculators.config.algorithms import DraftArch, Eagle3, Speculator
from speculators.drafts.base import (
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
from speculators.features.batch import PackedBatch
from speculators.ops.attention import KeyValues, causal_attention
from speculators.ops.functional import apply_rotary
from speculators.ops.masks import CausalMask, causal_mask

VLLM_DEFAULT_LAYERS = 3
"""Number of target layers that vLLM assumes for a draft of Llama layers without `num_aux_hidden_states`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TTTLayout:
    """Indices of one batch's sources, tokens and predictions; int64 unless a field says otherwise."""

    sources: Tensor
    """Indices into the batch [S]."""
    position_ids: Tensor
    """Position of each source's token in its document [S]."""
    query_index: Tensor
    """Indices into the sources: those with a supervised prediction [R]."""
    tokens: Tensor
    """Token ids that step k reads, for k >= 1 [K, R]; row 0 is not read."""
    target_index: Tensor
    """Index in the batch of the position whose distribution step k predicts [K, R]; arbitrary where not valid."""
    valid: Tensor
    """bool [K, R]: that position is in the same document and supervised."""
    source_mask: CausalMask | None
    """Causal mask of all sources; None for a single layer, which does not need it."""
    query_mask: CausalMask
    """Causal mask of the sources in `query_index`."""


class Eagle3Layer(nn.Module):
    """A decoder layer. The first one also reads the token's embedding, so its attention input is 2 H wide."""

    def __init__(self, config: LayerConfig, is_first: bool, norm_before_residual: bool, head_norm: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(config, 2 * width if is_first else width, head_norm)
        self.mlp = MLP(config)
        # float32 if the output of hidden_norm is the residual stream, and then for input_layernorm too: both are
        # concatenated.
        feeds_matmul = not (is_first and norm_before_residual)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=feeds_matmul)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=True)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=feeds_matmul) if is_first else None
        self.norm_before_residual = norm_before_residual

    def attention_input(self, embeddings: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the attention's projections [R, H or 2 H], and the residual [R, H]."""
        if self.hidden_norm is None:
            return self.input_layernorm(hidden_states), hidden_states
        normed = self.hidden_norm(hidden_states)
        attention_input = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        return attention_input, normed if self.norm_before_residual else hidden_states

    def finish(self, attention_output: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual and MLP: [R, heads * D] and residual [R, H] -> [R, H]."""
        hidden_states = residual + self.self_attn.o_proj(attention_output)
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class Eagle3Draft(Draft):
    """The EAGLE-3 draft; the module's docstring describes it. Arguments as in `Draft`."""

    algorithm: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "Eagle3DraftModel"
    options: Eagle3

    def __init__(
        self, config: Mapping[str, Any], options: Speculator, embeddings: Tensor, head: Tensor,
        vocabulary: Vocabulary, stored: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__(config, options, embeddings, head, vocabulary, stored)
        layer_dict = config["transformer_layer_config"]
        self.shape = LayerConfig.from_dict(layer_dict)
        width, eps = self.shape.hidden_size, self.shape.rms_norm_eps
        num_target_layers = len(config["eagle_aux_hidden_state_layer_ids"])
        norm = partial(RMSNorm, eps=eps, feeds_matmul=True)
        self.input_norm = norm(num_target_layers * width) if config["norm_before_fc"] else None
        layer_norms = (norm(width) for _ in range(num_target_layers))
        self.fc_norm = nn.ModuleList(layer_norms) if config.get("fc_norm") else None
        self.fc = Linear(num_target_layers * width, width)
        head_norm = layer_dict["model_type"] == DraftArch.qwen3.name
        self.layers = nn.ModuleList(
            Eagle3Layer(self.shape, index == 0, config["norm_before_residual"], head_norm)
            for index in range(layer_dict["num_hidden_layers"])
        )
        self.norm = RMSNorm(width, eps)
        self.rotary = Rotary(self.shape)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, Eagle3)
        layer_dict = layer_config(parts, options, options.draft_arch.name)
        if len(layer_ids) != VLLM_DEFAULT_LAYERS:
            layer_dict["num_aux_hidden_states"] = len(layer_ids)
        return {
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": options.norm_output,
            "fc_norm": options.fc_norm,
            "embed_requires_grad": options.embed_requires_grad,
            "transformer_layer_config": layer_dict,
        }

    def forward(self, batch: PackedBatch, state: TrainState | None = None) -> Predictions:
        steps = self.unrolled_steps(state)
        layout = self.layout(batch, steps)
        target_hidden_states = batch.hidden_states[layout.sources].to(self.fc.weight.dtype)
        hidden_states = self.fc(self.fc_input(target_hidden_states))
        tokens = batch.token_ids[layout.sources + 1]
        caches: list[KeyValues] = []
        outputs = []
        for step in range(steps):
            hidden_states = self._step(step, hidden_states, tokens, layout, caches)
            normed = self.norm(hidden_states)
            outputs.append(normed)
            if self.config["norm_output"]:
                hidden_states = normed
            tokens = layout.tokens[min(step + 1, steps - 1)]  # not read after the last step
        valid = layout.valid.float()
        step_weights = self.options.ttt_step_decay ** torch.arange(steps, device=valid.device)[:, None]
        count = valid.sum(1).clamp(min=1.0)
        return Predictions(
            hidden_states=torch.stack(outputs),
            target_index=layout.target_index,
            valid=layout.valid,
            weight=step_weights * valid / count[:, None],
            count=count,
        )

    def supervision(self, batch: PackedBatch, state: TrainState | None = None) -> Supervision:
        counts = self.layout(batch, self.unrolled_steps(state)).valid.sum(1).float().clamp(min=1.0)
        return Supervision(counts=counts, source_mask=torch.ones_like(batch.loss_mask))  # no source is drawn

    def unrolled_steps(self, state: TrainState | None) -> int:
        """How many TTT steps this optimizer step unrolls, 1 to `ttt_steps`."""
        if state is None:
            return self.options.ttt_steps
        if state.step / state.total_steps < self.options.ttt_warmup_ratio:
            return 1
        if self.options.ttt_random_steps:
            return 1 + hash_to_int(f"steps {state.seed} {state.step}") % self.options.ttt_steps
        return self.options.ttt_steps

    def fc_input(self, hidden_states: Tensor) -> Tensor:
        """The target's hidden states [..., A, H], normed as the options say and concatenated [..., A * H]."""
        if self.fc_norm is not None:
            layers = zip(self.fc_norm, hidden_states.unbind(-2), strict=True)
            return torch.cat([norm(layer) for norm, layer in layers], dim=-1)
        concatenated = hidden_states.flatten(-2)
        return concatenated if self.input_norm is None else self.input_norm(concatenated)

    def _step(
        self, step: int, hidden_states: Tensor, tokens: Tensor, layout: TTTLayout, caches: list[KeyValues]
    ) -> Tensor:
        """Run the layers for one TTT step, and append its keys and values to `caches`, one a layer.

        `hidden_states` [S, H] and `tokens` [S] in step 0, [R, H] and [R] after it -> [R, H].
        """
        embeddings = nn.functional.embedding(tokens, self.embed_tokens.weight)
        position_ids = layout.position_ids + 1  # of the token that is read
        if step > 0:
            position_ids = position_ids[layout.query_index] + step
        cos, sin = self.rotary(position_ids)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Eagle3Layer)
            attention = layer.self_attn
            attention_input, residual = layer.attention_input(embeddings, hidden_states)
            key_states = apply_rotary(attention.keys(attention_input), cos, sin)
            value_states = attention.values(attention_input)
            mask, query_cos, query_sin = layout.query_mask, cos, sin
            if step > 0:
                caches[index].later_steps.append((key_states, value_states))
            else:
                caches.append(KeyValues(key_states, value_states, []))
                if index < len(self.layers) - 1:
                    assert layout.source_mask is not None
                    mask = layout.source_mask
                else:  # nothing attends to the last layer's output: only rows with a supervised prediction go on
                    rows = layout.query_index
                    attention_input, residual = attention_input.index_select(0, rows), residual.index_select(0, rows)
                    query_cos, query_sin = cos[rows], sin[rows]
            query_states = apply_rotary(attention.queries(attention_input), query_cos, query_sin)
            hidden_states = layer.finish(causal_attention(query_states, caches[index], mask), residual)
        return hidden_states

    def layout(self, batch: PackedBatch, steps: int) -> TTTLayout:
        """Compute which positions are sources, and what each of `steps` TTT steps reads and predicts."""
        device, total = batch.token_ids.device, len(batch.token_ids)
        starts_T, ends_T = batch.bounds()
        index_T = torch.arange(total, device=device)
        sources = (index_T + 1 < ends_T).nonzero()[:, 0]
        target_KS = sources[None, :] + 1 + torch.arange(steps, device=device)[:, None]
        inside_KS = target_KS < ends_T[sources]
        target_KS = target_KS.clamp(max=total - 1)
        valid_KS = inside_KS & batch.loss_mask[target_KS]
        query_index = valid_KS.any(0).nonzero()[:, 0]
        documents, first = [], 0
        for length in batch.lengths:
            documents.append((first, length - 1))
            first += length - 1
        every_source = torch.arange(len(sources), device=device)
        return TTTLayout(
            sources=sources,
            position_ids=(index_T - starts_T)[sources],
            query_index=query_index,
            tokens=batch.token_ids[target_KS[:, query_index]],
            target_index=target_KS[:, query_index],
            valid=valid_KS[:, query_index],
            source_mask=causal_mask(documents, every_source) if len(self.layers) > 1 else None,
            query_mask=causal_mask(documents, query_index),
        )
