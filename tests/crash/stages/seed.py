"""seed: nothing -> lines. A `tally` without inputs."""

from speculators.stages.tally import main

__all__ = ["main"]
