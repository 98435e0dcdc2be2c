"""Measuring a draft: `acceptance` counts what a server would accept of it, without one; `lossless` compares answers.

The training loop and the stage `evaluate` import from here; it knows the engine's client and nothing of training.
"""
