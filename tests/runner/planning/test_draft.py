"""What a draft's config.json says, and which targets and numbers of tokens that rules out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.config.schema import Config
from speculators.errors import ContractError, RecipeError
from speculators.runner.planning import draft
from speculators.runner.planning.derive import Facts

LAYER = {"hidden_size": 8, "vocab_size": 32}
TARGET = Facts(num_hidden_layers=4, hidden_size=8, vocab_size=32)


def speculators_format(algorithm: str, tokens: int | None, **fields: Any) -> dict[str, Any]:
    """A config.json of this package and of upstream's."""
    methods = [{"proposal_type": "greedy", "speculative_tokens": tokens}] if tokens else []
    config = {"proposal_methods": methods, "verifier": {"name_or_path": "/somewhere"}}
    return {"speculators_model_type": algorithm, "speculators_config": config, "transformer_layer_config": LAYER,
            **fields}  # fmt: skip


def facts(directory: Path, config: Any) -> draft.DraftFacts:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return draft.of_checkpoint(directory)


NATIVE = {"architectures": ["LlamaForCausalLMEagle3"], **LAYER}
KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any], int | None, int | None]] = {
    "eagle3": (speculators_format("eagle3", 5), {"method": "eagle3"}, 5, None),
    "eagle3 for vLLM": (NATIVE, {"method": "eagle3"}, None, None),
    "eagle3 by its vocabulary": (
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 16, **LAYER}, {"method": "eagle3"}, None, None,
    ),
    "dflash": (speculators_format("dflash", 7, block_size=8), {"method": "dflash"}, 7, 7),
    "dflash that was published for fewer": (speculators_format("dflash", 4, block_size=8), {"method": "dflash"}, 4, 7),
    "dflash whose anchor proposes": (
        speculators_format("dflash", 8, block_size=8, sample_from_anchor=True), {"method": "dflash"}, 8, 8,
    ),
    "dflash for vLLM": (
        {"architectures": ["DFlashDraftModel"], "block_size": 16, **LAYER}, {"method": "dflash"}, 15, 15,
    ),
    "peagle": (speculators_format("peagle", 8), {"method": "eagle3", "parallel_drafting": True}, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_method_and_numbers_of_tokens_are_read_from_the_config(tmp_path: Path, name: str) -> None:
    config, method, tokens, longest = KNOWN[name]
    found = facts(tmp_path, config)
    assert (found.method, found.num_speculative_tokens, found.max_tokens) == (method, tokens, longest)
    assert found.shape == LAYER


@pytest.mark.parametrize(
    "config", ["{", "[]", {"architectures": ["LlamaForCausalLM"]}, speculators_format("mtp", 1),
               speculators_format("dflash", 7), {"speculators_model_type": "eagle3", "speculators_config": 3},
               speculators_format("eagle3", 3, transformer_layer_config=None),
               speculators_format("eagle3", 3, transformer_layer_config=LAYER | {"vocab_size": "32"}),
               speculators_format("eagle3", 3, eagle_aux_hidden_state_layer_ids=[-1, 2]),
               speculators_format("eagle3", 3, eagle_aux_hidden_state_layer_ids="all"),
               speculators_format("eagle3", 3, draft_vocab_size=0)],
)  # fmt: skip
def test_a_config_of_no_draft_that_is_known_is_refused_by_its_path(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ContractError) as caught:
        facts(tmp_path, config)
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transformer_layer_config": LAYER | {"hidden_size": 9}}, "hidden states of width 9, and the target has 8"),
        ({"target_hidden_size": 16}, "hidden states of width 16, and the target has 8"),
        ({"transformer_layer_config": LAYER | {"vocab_size": 33}}, "a vocabulary of 33, and the target has 32"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5]}, "layer 5, and the target has 4 layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [6]}}, "layer 6, and the target has 4 layers"),
    ],
)
def test_a_draft_for_another_target_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    good = speculators_format("eagle3", 3, eagle_aux_hidden_state_layer_ids=[0, 4])
    draft.check_fits(Config(), facts(tmp_path, good), TARGET)
    with pytest.raises(RecipeError) as caught:
        draft.check_fits(Config(), facts(tmp_path, good | fields), TARGET)
    assert message in caught.value.message


def test_the_numbers_to_measure_are_the_recipes_without_repetitions_or_the_drafts_own(tmp_path: Path) -> None:
    config, found = Config(), facts(tmp_path, speculators_format("dflash", 4, block_size=8))
    assert draft.tokens_to_measure(config, found) == [4]
    config.evaluate.num_speculative_tokens = [7, 2, 7]
    assert draft.tokens_to_measure(config, found) == [7, 2]
    config.evaluate.num_speculative_tokens = [3, 8]
    with pytest.raises(RecipeError, match=r"\[3, 8\]: must be at most 7") as caught:
        draft.tokens_to_measure(config, found)
    assert caught.value.hint == "evaluate.num_speculative_tokens=[7]"
    config.evaluate.num_speculative_tokens = []
    with pytest.raises(RecipeError, match="names no number of tokens"):
        draft.tokens_to_measure(config, facts(tmp_path, NATIVE))
