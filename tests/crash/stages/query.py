"""query: lines -> lines. A `tally` that asks a server for every line."""

from speculators.stages.tally import main

__all__ = ["main"]
