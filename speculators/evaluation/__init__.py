"""Measures drafts: `acceptance` counts what a server would accept, `lossless` compares answers with and without one.

The training loop and the stage `evaluate` import from here; it imports the engine's client and nothing of training.
"""
