"""Values that nobody types: which layers of the target a draft reads."""

from __future__ import annotations

import pytest

from speculators.config import compose
from speculators.config.algorithms import DFlash, Eagle3, inputs_after
from speculators.errors import RecipeError
from speculators.runner.planning.derive import Facts, derive


def test_the_authors_layers_are_ours_one_higher() -> None:
    # Of a target of 36 layers they read what leaves 1, 9, 17, 25 and 33.
    assert DFlash().default_target_layer_ids(36) == inputs_after([1, 9, 17, 25, 33]) == [2, 10, 18, 26, 34]


@pytest.mark.parametrize(("depth", "count", "layers"), [(30, 5, [2, 9, 15, 21, 28]), (30, 1, [16]), (30, 2, [2, 28])])
def test_layers_of_a_block_draft_are_spread_over_the_depth(depth: int, count: int, layers: list[int]) -> None:
    assert DFlash(target_layers=count).default_target_layer_ids(depth) == layers


@pytest.mark.parametrize("depth", range(1, 12))
def test_a_shallow_target_is_read_at_fewer_layers_that_it_has(depth: int) -> None:
    found = DFlash().default_target_layer_ids(depth)
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] <= depth


def test_eagle3_reads_a_low_a_middle_and_a_high_layer() -> None:
    assert Eagle3().default_target_layer_ids(30) == [2, 15, 27]


@pytest.mark.parametrize("words", [["speculator.num_key_value_heads=4"], ["speculator.num_attention_heads=8"]])
def test_heads_that_cannot_share_keys_are_refused_with_the_targets(words: list[str]) -> None:
    known = Facts(num_hidden_layers=30, hidden_size=576, vocab_size=49152, heads=9, key_value_heads=3)
    with pytest.raises(RecipeError, match=r"speculator\.num_attention_heads=\d+: must be a multiple") as caught:
        derive(compose.compose(["recipe=smollm2_eagle3", *words]), known)
    assert "the target's 9 and 3" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], "everywhere"),  # the demo trains on prompts too
        (["train.train_on_prompts=false"], "answers"),
        (["train.train_on_prompts=false", "extract.last_state=everywhere"], "everywhere"),
    ],
)
def test_the_last_layer_is_kept_where_training_asks_for_it_unless_the_recipe_says_where(
    words: list[str], kept: str
) -> None:
    known = Facts(num_hidden_layers=30, hidden_size=576, vocab_size=49152)
    assert derive(compose.compose(["recipe=smollm2_eagle3", *words]), known)["last_state"] == kept
    with pytest.raises(RecipeError, match="needs last-layer hidden states"):
        derive(compose.compose(["recipe=smollm2_eagle3", "extract.last_state=answers"]), known)
