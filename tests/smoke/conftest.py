"""The world of all stories."""

from tests.smoke.world import world

__all__ = ["world"]
