"""Training a draft: loss, optimisers, the loop, and the state that a killed run goes on from.

The stage `train` imports `loop`, `losses`, `ranks`, `tracking` and `live_features`; the other modules serve the loop.
"""
