"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): one decoder layer that goes on from the target's own states.

Idea: the target has already computed what the next tokens depend on, so a single layer, given a low, a middle and a
high state of the target and the token that was sampled, can guess on; training unrolls the draft over its own
outputs (train-time test), because that is what it will be fed when it guesses the second and the third token.

Reads from the target: the states entering `layer_ids`; embeddings and head, frozen unless they are asked to be
trained. Assumes RoPE over whole heads.

Step 0 at place t sees the states of t and token t+1, and predicts the target's distribution at t+1 (token t+2). Step k
sees step k-1's output at t instead of the states, and token t+1+k; it predicts the distribution at t+1+k. Tokens are
the true ones at every step. Step k attends to step 0 of all places up to t, and to its own steps 1 to k.

Attention begins as induction heads (`induction`): the query is the token that was sampled, the key is what a linear
fit reads of a place's own token (and of the one before) in the target's states, the value is the token that came next.
Everything is trained on from there.

Shape suffixes: T tokens of the pack; S sources, places with a successor in their document; R sources that
supervision asks for; A target layers read; H width; K steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speculators.config.algorithms import DraftArch, Eagle3, Speculator
from speculators.drafts.base import Draft, Predictions, Supervision, TargetParts, Vocabulary, draw, layer_config
from speculators.drafts.induction import MATCH, Fit, principal, slow_places, widened
from speculators.drafts.layers import (
    MLP,
    Attention,
    LayerConfig,
    Linear,
    RMSNorm,
    Rotary,
    initialise,
)
from speculators.features.batch import PackedBatch
from speculators.ops.attention import KeyValues, causal_attention
from speculators.ops.functional import apply_rotary
from speculators.ops.masks import CausalMask, causal_mask

SERVED_LAYERS = 3
"""Target layers that vLLM takes for granted where a draft of Llama layers does not say `num_aux_hidden_states`."""


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
    source_mask: CausalMask | None
    """For attention of every source; needed only by layers below the last."""
    asking_mask: CausalMask
    """For attention of the asking ones."""


class Layer(nn.Module):
    """A decoder layer; the first one also takes the token's embedding and is twice as wide where it attends."""

    def __init__(self, config: LayerConfig, first: bool, norm_before_residual: bool, head_norm: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(config, 2 * width if first else width, head_norm)
        self.mlp = MLP(config)
        # What becomes the stream stays in float32, and what lies beside it there too.
        short = not (first and norm_before_residual)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=short)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=True)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps, feeds_matmul=short) if first else None
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
        self.unrolled: int = self.steps
        self.step_decay, self.one_step_share, self.induction = 1.0, 0.0, False
        self.drawn, self.seed = False, 0
        self.norm_output = bool(config["norm_output"])
        width, read = shape.hidden_size, len(config["eagle_aux_hidden_state_layer_ids"])
        norm = partial(RMSNorm, eps=shape.rms_norm_eps, feeds_matmul=True)
        self.input_norm = norm(read * width) if config["norm_before_fc"] else None
        every = (norm(width) for _ in range(read))
        self.fc_norm = nn.ModuleList(every) if config.get("fc_norm") else None
        self.fc = Linear(read * width, width)
        self.layers = nn.ModuleList(
            Layer(shape, i == 0, config["norm_before_residual"], plain["model_type"] == DraftArch.qwen3.name)
            for i in range(plain["num_hidden_layers"])
        )
        self.norm = RMSNorm(width, shape.rms_norm_eps)
        self.rotary = Rotary(shape)

    @classmethod
    def describe(cls, parts: TargetParts, options: Speculator, layer_ids: list[int]) -> dict[str, Any]:
        assert isinstance(options, Eagle3)
        shape = layer_config(parts, options, options.draft_arch.name)
        if len(layer_ids) != SERVED_LAYERS:
            shape["num_aux_hidden_states"] = len(layer_ids)
        return {
            "eagle_aux_hidden_state_layer_ids": layer_ids,
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": options.norm_output,
            "fc_norm": options.fc_norm,
            "embed_requires_grad": options.embed_requires_grad,
            "transformer_layer_config": shape,
        }

    def initialise(self, seed: int) -> None:
        self.seed = seed
        initialise(self, self.shape.initializer_range, torch.Generator().manual_seed(seed))

    def configure(self, options: Speculator) -> None:
        assert isinstance(options, Eagle3)
        self.steps = self.unrolled = options.ttt_steps
        self.step_decay = options.ttt_step_decay
        self.one_step_share, self.induction = options.ttt_warmup_ratio, options.induction
        self.drawn = options.ttt_random_steps

    def advance(self, step: int, total: int) -> None:
        self.unrolled = self.steps
        if step / total < self.one_step_share:
            self.unrolled = 1
        elif self.drawn and step < total:
            self.unrolled = 1 + draw(f"steps {self.seed} {step}") % self.steps

    @torch.no_grad()
    def prepare(self, packs: Iterable[PackedBatch], seed: int) -> None:
        """Set half of the first layer's query heads, the keys and values that they see, and some rows of `fc`."""
        layer, width = self.layers[0], self.shape.hidden_size
        assert isinstance(layer, Layer)
        groups, head = self.shape.num_key_value_heads, self.shape.head_dim
        per_group = self.shape.num_attention_heads // groups
        if per_group == 1:
            groups = (groups + 1) // 2
        # The fit is given at most half of what `fc` puts out.
        places = slow_places(self.rotary.frequencies, head, width // (3 * groups))
        if not self.induction or not places:
            return
        size, half = len(places), len(places) // 2
        fit = Fit.of(packs, self._read, self._token)
        drawn = fit.random(groups * size - half, torch.Generator().manual_seed(seed))
        look = torch.cat([fit.directions(half), drawn])
        own, before = fit.readers(look).float(), fit.readers(look[:half], before=True).float()
        look = look.float()
        self.fc.weight.mul_(1.0 / fit.spread(self.fc.weight.cpu().double()).pow(2).mean().sqrt())
        self.fc.weight[: len(own)].copy_(own)
        self.fc.weight[len(own) : len(own) + half].copy_(before)
        values = widened(principal(self.embed_tokens.weight[self.vocabulary.tokens].cpu().float()), groups * head)
        sharp = MATCH * math.sqrt(head) / size
        attention = layer.self_attn
        if attention.q_norm is not None:  # the norm takes the size of a query away, and gives back what it is told
            attention.q_norm.weight.fill_(MATCH / math.sqrt(head))
        seen = attention.v_proj.weight[: groups * head].zero_()
        seen[:, :width].copy_(values.view(head, groups, width).transpose(0, 1).flatten(0, 1))
        for group in range(groups):
            keys = attention.k_proj.weight[group * head : (group + 1) * head]
            written = attention.v_proj.weight[group * head : (group + 1) * head, :width].T
            # The first group looks for the token alone, the others for the token and the one before it.
            single = size if group == 0 else size - half
            rows = [width + group * size + j for j in range(single)] + [width + len(own) + j for j in range(half)]
            keys[places] = 0.0
            keys[places, rows[:size]] = 1.0
            for query in range(group * per_group, group * per_group + (per_group + 1) // 2):
                asks = attention.q_proj.weight[query * head : (query + 1) * head]
                asks[places] = 0.0
                scale = sharp * math.sqrt(size / single)
                asks[places[:single], :width] = scale * look[group * size : group * size + single].to(asks)
                asks[places[single:], [width + j for j in range(size - single)]] = scale
                attention.o_proj.weight[:, query * head : (query + 1) * head] = written

    def _read(self, pack: PackedBatch) -> Tensor:
        """What `fc` reads at every place [T, A * H]."""
        return self._normed(pack.hidden_states.float())

    def _normed(self, states: Tensor) -> Tensor:
        """States of the target's layers [..., A, H] as `fc` reads them [..., A * H]."""
        if self.fc_norm is not None:
            return torch.cat([norm(x) for norm, x in zip(self.fc_norm, states.unbind(-2), strict=True)], dim=-1)
        return states.flatten(-2) if self.input_norm is None else self.input_norm(states.flatten(-2))

    def _token(self, token_ids: Tensor) -> Tensor:
        """What the first layer reads of tokens at the beginning [T, H]."""
        embedded = nn.functional.embedding(token_ids, self.embed_tokens.weight).float()
        return nn.functional.rms_norm(embedded, (self.shape.hidden_size,), eps=self.shape.rms_norm_eps)

    def forward(self, pack: PackedBatch) -> Predictions:
        at = self.layout(pack)
        state = self.fc(self._normed(pack.hidden_states[at.sources].to(self.fc.weight.dtype)))
        tokens = pack.token_ids[at.sources + 1]
        caches: list[KeyValues] = []
        hidden = []
        for step in range(self.unrolled):
            state = self._step(step, state, tokens, at, caches)
            normed = self.norm(state)
            hidden.append(normed)
            state = normed if self.norm_output else state
            tokens = at.tokens[min(step + 1, self.unrolled - 1)]
        valid = at.valid.float()
        decay = self.step_decay ** torch.arange(self.unrolled, device=valid.device)[:, None]
        count = valid.sum(1).clamp(min=1.0)
        weight = decay * valid / count[:, None]
        return Predictions(hidden=torch.stack(hidden), target=at.target, valid=at.valid, weight=weight, count=count)

    def supervision(self, whole: PackedBatch) -> Supervision:
        counts = self.layout(whole).valid.sum(1).float().clamp(min=1.0)
        return Supervision(counts=counts, chosen=torch.ones_like(whole.loss_mask))

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
            keys, values = apply_rotary(attention.keys(read), *turn), attention.values(read)
            mask, asked_turn = at.asking_mask, turn
            if step > 0:
                caches[index].later_steps.append((keys, values))
            else:
                caches.append(KeyValues(keys, values, []))
                if index < len(self.layers) - 1:
                    assert at.source_mask is not None
                    mask = at.source_mask
                else:  # nobody attends to this layer's output: only the rows that supervision asks for go on
                    read, stream = read.index_select(0, at.asking), stream.index_select(0, at.asking)
                    asked_turn = (turn[0][at.asking], turn[1][at.asking])
            queries = apply_rotary(attention.queries(read), *asked_turn)
            state = layer.finish(causal_attention(queries, caches[index], mask), stream)
        return state

    def layout(self, pack: PackedBatch) -> Layout:
        """Work out sources, asking rows, and what each step sees and predicts."""
        device = pack.token_ids.device
        total = len(pack.token_ids)
        starts_T, ends_T = pack.bounds()
        places_T = torch.arange(total, device=device)
        sources = (places_T + 1 < ends_T).nonzero()[:, 0]
        target_KS = sources[None, :] + 1 + torch.arange(self.unrolled, device=device)[:, None]
        inside_KS = target_KS < ends_T[sources]
        target_KS = target_KS.clamp(max=total - 1)
        valid_KS = inside_KS & pack.loss_mask[target_KS]
        asking = valid_KS.any(0).nonzero()[:, 0]
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
            source_mask=causal_mask(documents, everyone) if len(self.layers) > 1 else None,
            asking_mask=causal_mask(documents, asking),
        )
