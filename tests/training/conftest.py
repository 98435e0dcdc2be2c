"""Lets the tests here import the small worlds of `tests/drafts`, and gives them a small world to train in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "drafts"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from run_train import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So small a training is faster so, and several threads round otherwise than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
