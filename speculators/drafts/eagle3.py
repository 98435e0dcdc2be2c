"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): one decoder layer that goes on from the target's own states.

Idea: the target has already computed what the next tokens depend on, so a single layer, given a low, a middle and a
high state of the target and the token that was sampled, can guess on; training unrolls the draft over its own
outputs (train-time test), because that is what it will be fed when it guesses the second and the third token.

Reads from the target: the states entering `layer_ids`; embeddings and head, frozen. Assumes RoPE over whole heads.

Step 0 at place t sees the states of t and token t+1, and predicts the target's distribution at t+1 (token t+2). Step k
sees step k-1's output at t instead of the states, and token t+1+k; it predicts the distribution at t+1+k. Tokens are
the true ones at every step. Step k attends to step 0 of all places up to t, and to its own steps 1 to k.

Shape suffixes: T tokens of the pack; S sources, places with a successor in their document; R sources that
supervision asks for; A target layers read; H width; K steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speculators.config import Eagle3, Speculator
from speculators.drafts.base import Draft, Pack, Predictions, TargetParts, Vocabulary, layer_config
from speculators.drafts.layers import (
    MLP,
    Attention,
    Block,
    KeyValues,
    LayerConfig,
    RMSNorm,
    Rotary,
    causal_blocks,
    initialise,
    rotate,
    unrolled_attention,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things are in one pack; all places int64."""

    sources: Tensor
    """Places in the pack [S]."""
    positions: Tensor
    """Place of each source's own token in its document, from 0 [S]."""
    asking: Tensor
    """Indices into the sources [R]."""
    tokens: Tensor
    """Token that step k sees [K, R]."""
    target: Tensor
    """Place whose distribution step k predicts [K, R]; anything where it is not valid."""
    valid: Tensor
    """bool [K, R]: that place is in the same document and supervised."""
    source_blocks: list[Block]
    """For attention of every source; needed only by layers below the last."""
    asking_blocks: list[Block]
    """For attention of the asking ones."""


class Layer(nn.Module):
    """A decoder layer; the first one also takes the token's embedding and is twice as wide where it attends."""

    def __init__(self, config: LayerConfig, first: bool, norm_before_residual: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(config, 2 * width if first else width)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps) if first else None
        self.norm_before_residual = norm_before_residual

    def attend_to(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, and the stream that its output is added to."""
        if self.hidden_norm is None:
            return self.input_layernorm(state), state
        normed = self.hidden_norm(state)
        read = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        return read, normed if self.norm_before_residual else state

    def finish(self, attended: Tensor, stream: Tensor) -> Tensor:
        """Everything after attention, [R, H]."""
        stream = stream + self.self_attn.o_proj(attended)
        out: Tensor = stream + self.mlp(self.post_attention_layernorm(stream))
        return out


class Eagle3Draft(Draft):
    """See the module."""

    algorithm: ClassVar[str] = "eagle3"
    architecture: ClassVar[str] = "Eagle3DraftModel"

    def __init__(self, config: Mapping[str, Any], embeddings: Tensor, head: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(config, embeddings, head, vocabulary)
        plain = config["transformer_layer_config"]
        shape = LayerConfig.from_plain(plain)
        self.shape = shape
        self.steps: int = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        self.step_decay = 1.0
        self.norm_output = bool(config["norm_output"])
        width, read = shape.hidden_size, len(config["eagle_aux_hidden_state_layer_ids"])
        self.input_norm = RMSNorm(read * width, shape.rms_norm_eps) if config["norm_before_fc"] else None
        self.fc = nn.Linear(read * width, width, bias=False)
        self.layers = nn.ModuleList(
            Layer(shape, first=i == 0, norm_before_residual=config["norm_before_residual"])
            for i in range(plain["num_hidden_layers"])
        )
        self.norm = RMSNorm(width, shape.rms_norm_eps)
        self.rotary = Rotary(shape)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, Eagle3)
        return {
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": options.norm_output,
            "fc_norm": False,
            "embed_requires_grad": False,
            "transformer_layer_config": layer_config(parts, options.num_layers),
        }

    def initialise(self, seed: int) -> None:
        initialise(self, self.shape.initializer_range, torch.Generator().manual_seed(seed))

    def configure(self, options: Speculator) -> None:
        assert isinstance(options, Eagle3)
        self.steps, self.step_decay = options.ttt_steps, options.ttt_step_decay

    def forward(self, pack: Pack) -> Predictions:
        at = self.layout(pack)
        features = pack.states[at.sources, :-1].flatten(1).to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        state = self.fc(features)
        tokens = pack.token_ids[at.sources + 1]
        caches: list[KeyValues] = []
        hidden = []
        for step in range(self.steps):
            state = self._step(step, state, tokens, at, caches)
            normed = self.norm(state)
            hidden.append(normed)
            state = normed if self.norm_output else state
            tokens = at.tokens[min(step + 1, self.steps - 1)]
        valid = at.valid.float()
        decay = self.step_decay ** torch.arange(self.steps, device=valid.device)[:, None]
        weight = decay * valid / valid.sum(1, keepdim=True).clamp(min=1.0)
        return Predictions(hidden=torch.stack(hidden), target=at.target, valid=at.valid, weight=weight)

    def _step(self, step: int, state: Tensor, tokens: Tensor, at: Layout, caches: list[KeyValues]) -> Tensor:
        """Run the layers once. Step 0 takes every source and gives the asking ones, later steps have only those."""
        embedded = nn.functional.embedding(tokens, self.embed_tokens.weight)
        positions = at.positions + 1
        if step > 0:
            positions = positions[at.asking] + step
        turn = self.rotary(positions)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            attention = layer.self_attn
            read, stream = layer.attend_to(embedded, state)
            keys = rotate(attention.heads(attention.k_proj, read), turn)
            values = attention.heads(attention.v_proj, read)
            blocks, asked_turn = at.asking_blocks, turn
            if step > 0:
                caches[index].own.append((keys, values))
            else:
                caches.append(KeyValues(keys, values, []))
                if index < len(self.layers) - 1:
                    blocks = at.source_blocks
                else:  # nobody attends to this layer's output: only the rows that supervision asks for go on
                    read, stream = read.index_select(0, at.asking), stream.index_select(0, at.asking)
                    asked_turn = (turn[0][at.asking], turn[1][at.asking])
            queries = rotate(attention.heads(attention.q_proj, read), asked_turn)
            state = layer.finish(unrolled_attention(queries, caches[index], blocks), stream)
        return state

    def layout(self, pack: Pack) -> Layout:
        """Work out sources, asking rows, and what each step sees and predicts."""
        device = pack.token_ids.device
        total = len(pack.token_ids)
        lengths = torch.tensor(pack.lengths, device=device)
        ends_T = torch.repeat_interleave(lengths.cumsum(0), lengths)  # first place after the token's document
        places_T = torch.arange(total, device=device)
        sources = (places_T + 1 < ends_T).nonzero()[:, 0]
        target_KS = sources[None, :] + 1 + torch.arange(self.steps, device=device)[:, None]
        inside_KS = target_KS < ends_T[sources]
        target_KS = target_KS.clamp(max=total - 1)
        valid_KS = inside_KS & pack.loss_mask[target_KS]
        asking = valid_KS.any(0).nonzero()[:, 0]
        starts_T = ends_T - torch.repeat_interleave(lengths, lengths)
        everyone = torch.arange(len(sources), device=device)
        documents, first = [], 0
        for length in pack.lengths:
            documents.append((first, length - 1))
            first += length - 1
        return Layout(
            sources=sources,
            positions=(places_T - starts_T)[sources],
            asking=asking,
            tokens=pack.token_ids[target_KS[:, asking]],
            target=target_KS[:, asking],
            valid=valid_KS[:, asking],
            source_blocks=causal_blocks(documents, everyone) if len(self.layers) > 1 else [],
            asking_blocks=causal_blocks(documents, asking),
        )
