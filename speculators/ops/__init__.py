"""Operations of training, one public function each, whose implementation is chosen by the device of its tensors.

`functional` has RMSNorm, rotary embedding, SiLU-gated product and linear layer; `attention` and `masks` have attention
over packed batches; `weights` changes weights and keeps rounded copies of them. Behind them are `cpu` (C++), `gpu`
(flex attention) and `blockwise` (plain torch). Drafts, training and stages import the functions; this package imports
nothing of ours but `config.algorithms`.
"""
