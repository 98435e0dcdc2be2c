"""Operations of training, one public function each, whose implementation follows from the device of its tensors.

- `functional`: RMSNorm, rotary embedding, SiLU-gated product, linear layer.
- `attention`, `masks`: attention over packed batches, causal and at anchors.
- `divergences`, `distillation`: losses with their gradients, and the loss fused with the draft's head.
- `muon`, `weights`: Muon's update, and what changes weights.

`reference` computes each from its formula in plain torch; `tests/ops/test_ops.py` holds every implementation against
it. The implementations are `cpu` (C++), `gpu` (flex attention), `blockwise` and torch's own operations. Drafts,
training and stages import the functions; this package imports nothing of ours but itself.
"""
