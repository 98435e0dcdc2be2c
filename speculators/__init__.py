"""Train, measure and serve draft models for speculative decoding, by one command."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
