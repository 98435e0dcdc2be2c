"""extract: states that are not those of the row that was sent never reach a shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from speculators.errors import ContractError, StageError
from speculators.features.writer import check_hidden_states, hidden_size


def test_states_of_the_row_that_was_sent_pass() -> None:
    check_hidden_states("row 3", [5, 6], torch.tensor([5, 6]), torch.randn(2, 4, 8), torch.float32)


def test_other_tokens_than_were_sent_are_refused() -> None:
    with pytest.raises(ContractError, match="row 3: the server exported the hidden states of other tokens"):
        check_hidden_states("row 3", [5, 6], torch.tensor([5, 7]), torch.randn(2, 4, 8), torch.float32)
    with pytest.raises(ContractError, match="other tokens"):
        check_hidden_states("row 3", [5, 6], torch.tensor([5]), torch.randn(1, 4, 8), torch.float32)


def test_another_dtype_than_the_recipe_says_is_refused() -> None:
    with pytest.raises(ContractError, match=r"computes in torch.bfloat16, `target.dtype` is torch.float32"):
        check_hidden_states("row 3", [5], torch.tensor([5]), torch.randn(1, 4, 8, dtype=torch.bfloat16), torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_with_their_layers(bad: float) -> None:
    states = torch.zeros(2, 4, 8)
    states[1, 2, 5] = bad
    with pytest.raises(StageError, match=r"row 3: .* not finite \(captured layers number \[2\]\)"):
        check_hidden_states("row 3", [5, 6], torch.tensor([5, 6]), states, torch.float32)


def test_the_width_is_found_in_plain_and_in_multimodal_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 576}))
    assert hidden_size(tmp_path) == 576
    nested = {"vision_config": {"hidden_size": 1}, "text_config": {"hidden_size": 5376}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert hidden_size(tmp_path) == 5376
