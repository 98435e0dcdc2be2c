"""How many rounds: a few by default, 50 and more in a night (CRASH_ROUNDS=50, CRASH_SEED=1)."""

from __future__ import annotations

import os

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "round_seed" in metafunc.fixturenames:
        first = int(os.environ.get("CRASH_SEED", "0"))
        metafunc.parametrize("round_seed", range(first, first + int(os.environ.get("CRASH_ROUNDS", "3"))))
