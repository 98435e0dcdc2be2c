"""Estimates the memory that servers of the target, the draft and its training need, before anything is loaded.

Weights come from the headers of the checkpoint's files, else from `target.num_parameters`, else from the target's
shape. Everything else is a rough formula, made to refuse only what cannot work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from speculators.checkpoint_files import read_header
from speculators.config.schema import Config
from speculators.errors import SourceError
from speculators.runner.hardware import GIB
from speculators.runner.planning.derive import Facts

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SERVER_BYTES = 2 * GIB
"""Memory of a server on each GPU besides weights and KV cache: CUDA's context, activations, CUDA graphs."""
TRAINING_BYTES = 2 * GIB
"""Memory of a training process besides weights and activations: CUDA's context, chunks of logits."""
BYTES_PER_TRAINED = 18
"""Float32 weight, gradient and two moments, and the weight rounded to bfloat16."""
BYTES_PER_SHARDED = 16
"""Of these, the bytes that FSDP shards."""
BYTES_PER_MOVING_AVERAGE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is known of a target and its draft. Values of 0 or None are unknown."""

    parameters: int = 0
    """Parameters of the target that are served in the format of the server."""
    fixed_bytes: int = 0
    """Bytes of weights that keep their format, such as quantized ones."""
    heads: int | None = None
    """Query heads of the target."""
    key_value_heads: int | None = None
    """Its key and value heads; None: as many as query heads, or unknown."""
    cache_values: int = 0
    """Values in the KV cache of one sequence of the longest length."""
    trained: int = 0
    """Parameters of the draft that are trained, and stored in its checkpoint."""
    frozen_bytes: int = 0
    """Bytes of the target's embeddings and head in a training process."""
    activation_bytes: int = 0
    """Bytes of the activations of one optimizer step, over all its parts."""

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the target's weights in a server; 0 if unknown."""
        return self.parameters * DTYPE_BYTES[dtype] + self.fixed_bytes

    def server_bytes(self, dtype: str, tensor: int, pipeline: int, *, draft: bool) -> int:
        """Bytes that a server needs at least on each of its GPUs; 0 if unknown."""
        weights = self.weight_bytes(dtype)
        if not weights:
            return 0
        total = weights + (self.trained + self.cache_values if draft else self.cache_values) * DTYPE_BYTES[dtype]
        return math.ceil(total / (tensor * pipeline)) + SERVER_BYTES

    def training_bytes(self, config: Config, processes: int, *, fsdp: bool) -> int:
        """Bytes that each of the processes of a training needs on its GPU; 0 if unknown."""
        if not self.trained:
            return 0
        per_parameter = BYTES_PER_TRAINED + (BYTES_PER_MOVING_AVERAGE if config.train.ema else 0)
        weights = self.trained * per_parameter
        if fsdp and processes > 1:
            weights -= self.trained * BYTES_PER_SHARDED * (processes - 1) // processes
        micro_batches = processes * config.train.gradient_accumulation_steps
        return weights + self.frozen_bytes + self.activation_bytes // micro_batches + TRAINING_BYTES


def sizes_of(config: Config, facts: Facts | None, checkpoint: Path | None, longest: int) -> Sizes:
    """Estimate sizes from the recipe, the target's shape and, if it is fetched, its checkpoint.

    `longest` is the length of the longest sequence that is served, in tokens.
    """
    if checkpoint is not None:
        parameters, fixed_bytes = stored_weights(checkpoint)
    else:
        parameters, fixed_bytes = config.target.num_parameters or 0, 0
    if facts is None:
        return Sizes(parameters=parameters, fixed_bytes=fixed_bytes)
    depth, width = facts.num_hidden_layers, facts.hidden_size
    if not parameters + fixed_bytes:
        # Of a layer, 4 width^2 for attention and 8 width^2 for the MLP; embeddings and head apart.
        parameters = 12 * depth * width**2 + 2 * facts.vocab_size * width
    key_width = (facts.key_value_heads or 1) * facts.head_dim if facts.head_dim else width // 4
    windowed_positions = min(facts.sliding_window or longest, longest) * facts.windowed_layers
    draft = config.speculator
    inner = draft.intermediate_size or facts.intermediate_size or 4 * width
    read_layers = len(draft.target_layer_ids or draft.default_target_layer_ids(depth))
    matrices = draft.num_layers * (4 * width**2 + 3 * width * inner) + read_layers * width**2
    head = (config.vocab.size or facts.vocab_size) * width
    vocabulary_sized = (head if draft.train_lm_head else 0) + (
        facts.vocab_size * width if draft.embed_requires_grad else 0
    )
    steps = getattr(draft, "ttt_steps", 1)
    # Quarters of the MLP's width that a layer keeps for the backward pass; checkpointing computes the others again.
    saved = 4 if config.train.activation_checkpointing else 10
    return Sizes(
        parameters=parameters,
        fixed_bytes=fixed_bytes,
        heads=facts.heads,
        key_value_heads=facts.key_value_heads,
        cache_values=2 * key_width * (windowed_positions + longest * (depth - facts.windowed_layers)),
        trained=matrices + vocabulary_sized,
        frozen_bytes=2 * facts.vocab_size * width + 4 * head,
        activation_bytes=config.train.batch_tokens * steps * draft.num_layers * 2 * (10 * width + saved * inner // 4),
    )


def stored_weights(checkpoint: Path) -> tuple[int, int]:
    """Number of floating-point parameters of 16 or 32 bits in a checkpoint, and bytes of all other tensors.

    Files that have no readable header count as 16-bit parameters.
    """
    parameters = other = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            tensors = read_header(file)
        except SourceError:
            parameters += file.stat().st_size // 2
            continue
        for tensor in tensors.values():
            count = math.prod(tensor["shape"])
            if tensor["dtype"] in ("F32", "F16", "BF16"):
                parameters += count
            else:
                begin, end = tensor["data_offsets"]
                other += end - begin
    return parameters, other


def heads_divide(sizes: Sizes, tensor: int) -> bool:
    """Whether vLLM can split the attention of the target over `tensor` GPUs; true while its heads are unknown."""
    if sizes.heads is None:
        return True
    groups = sizes.key_value_heads or sizes.heads
    return sizes.heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)
