"""The disk cache: keeps hidden states up to its budget, and a later attempt reads those of complete directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speculators.features import disk_cache as module
from speculators.features.contract import feature_contract
from speculators.features.disk_cache import HiddenStatesCache
from speculators.features.encoding import encode, split_last_layer

CONTRACT = feature_contract(
    target="t", tokens="k", dtype="bfloat16", compute_dtype="float32", layer_ids=[1, 3], hidden_size=8
)
TOKENS = 10
ROW = TOKENS * (2 * 8 * 2 + 8) + module.ROW_BYTES
EVERYWHERE = torch.ones(TOKENS, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SET_TOKENS", 3 * TOKENS)


def states(row: int) -> torch.Tensor:
    return torch.full((TOKENS, 2, 8), float(row)).bfloat16()


def fill(cache: HiddenStatesCache, rows: range) -> list[int]:
    """The rows that were kept."""

    def add(row: int) -> bool:
        sifted = split_last_layer(encode("row", states(row), "bfloat16"), EVERYWHERE)
        return cache.add(row, torch.arange(TOKENS), sifted, EVERYWHERE)

    return [row for row in rows if add(row)]


def kept(cache: HiddenStatesCache, row: int, tokens: int = TOKENS) -> torch.Tensor:
    found = {
        "states": torch.empty(tokens, 1, 8, dtype=torch.bfloat16),
        "last": torch.empty(tokens, 8, dtype=torch.bfloat16),
    }
    cache.fill(row, found)
    return torch.cat([found["states"], found["last"][:, None]], 1)


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_rows_are_read_before_and_after_they_are_sealed(tmp_path: Path) -> None:
    cache = HiddenStatesCache(tmp_path, CONTRACT, 10**6)
    assert fill(cache, range(4)) == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 2, "one set is sealed, one is begun"
    assert 4 not in cache
    assert all(row in cache and torch.equal(kept(cache, row), states(row)) for row in range(4))
    assert torch.equal(kept(cache, 3, tokens=4), states(3)[:4])
    cache.seal()
    assert torch.equal(kept(cache, 3), states(3))
    assert cache.bytes == on_disk(tmp_path)


def test_the_budget_is_kept_to_and_what_fits_is_sealed_when_it_is_used_up(tmp_path: Path) -> None:
    budget = on_disk_of(tmp_path / "three", 3) + module.SET_BYTES + 2 * ROW
    cache = HiddenStatesCache(tmp_path / "cache", CONTRACT, budget)
    assert fill(cache, range(10)) == [0, 1, 2, 3, 4]
    assert cache.bytes == on_disk(tmp_path / "cache") <= budget
    again = HiddenStatesCache(tmp_path / "cache", CONTRACT, budget)
    assert (again.rows_reused, len(again)) == (5, 5)
    assert fill(again, range(10, 12)) == []


def on_disk_of(directory: Path, rows: int) -> int:
    fill(HiddenStatesCache(directory, CONTRACT, 10**6), range(rows))
    return on_disk(directory)


def test_an_earlier_attempt_leaves_what_it_sealed_and_nothing_else(tmp_path: Path) -> None:
    fill(HiddenStatesCache(tmp_path, CONTRACT, 10**6), range(7))
    shard = tmp_path / "00001" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    again = HiddenStatesCache(tmp_path, CONTRACT, 10**6)
    assert [row for row in range(7) if row in again] == [0, 1, 2], "one set was cut off, one was not sealed"
    assert again.bytes == on_disk(tmp_path)
    assert fill(again, range(3, 7)) == [3, 4, 5, 6]
    assert all(torch.equal(kept(again, row), states(row)) for row in range(7))


@pytest.mark.parametrize("field", ["target", "tokens", "layer_ids"])
def test_states_of_something_else_are_not_taken_over(tmp_path: Path, field: str) -> None:
    fill(HiddenStatesCache(tmp_path, CONTRACT, 10**6), range(3))
    other = HiddenStatesCache(tmp_path, {**CONTRACT, field: [1, 4] if field == "layer_ids" else "other"}, 10**6)
    assert len(other) == 0
    assert list(tmp_path.iterdir()) == []
