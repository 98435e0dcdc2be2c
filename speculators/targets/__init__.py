"""Target models: their checkpoints, and whether a server's hidden states are those of a checkpoint.

Stages import `fidelity_check` and `checkpoint`; `reference` runs the model with transformers, `gguf` converts one.
"""
