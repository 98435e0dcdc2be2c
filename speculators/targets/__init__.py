"""What is known of a target model: its checkpoint, how its states are read, and whether a server's are its own.

Stages import `fidelity_check` and `checkpoint`; `reference` runs the model by transformers, `gguf` converts one.
"""
