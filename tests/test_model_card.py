"""The model card: what the hub reads of it, and that its numbers are those of the files."""

from __future__ import annotations

from pathlib import Path

import yaml

from speculators.model_card import model_card, stated_license
from tests.conftest import EVALUATION

CONFIG = {
    "draft_vocab_size": 12000,
    "speculators_config": {
        "algorithm": "eagle3",
        "proposal_methods": [{"speculative_tokens": 3}],
        "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
    },
}
TRAINING = {"steps": 2000, "tokens": 98765, "parameters": 123, "validation_rows": 12, "validation": {}}
MEASURED = {**EVALUATION, "dtype": "float32", "temperature": 0.0, "max_tokens": 128}


def test_the_card_names_target_license_and_command_and_has_the_evaluations_numbers() -> None:
    training = {**TRAINING, "validation": {"acceptance_length": 1.625}}
    text = model_card(
        CONFIG, model="me/draft", revision="abc", license={"license": "apache-2.0"}, training=training,
        evaluation=MEASURED, origin="Made by this.",
    )  # fmt: skip
    _, front_matter, body = text.split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "base_model": "org/target",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["speculators", "speculative-decoding", "eagle3", "vllm"],
    }
    assert "| human_eval | 3 | 1 | 1.500 | 0.300 | 0.150 | 0.050 | 31.2 | 31.2 | 1.00x |" in body
    for words in ("vllm serve me/draft", "revision `abc`", "2,000 steps", "1.625", "64 of 64", "Made by this."):
        assert words in body


def test_a_target_that_is_a_path_is_no_base_model_and_unknown_numbers_are_left_out() -> None:
    config = {**CONFIG, "speculators_config": {**CONFIG["speculators_config"], "verifier": {"name_or_path": "/a/b"}}}  # type: ignore[dict-item]
    text = model_card(config, model="DIRECTORY", license={}, training=TRAINING)
    assert "base_model" not in text
    assert "Evaluation" not in text
    assert "validation split" not in text


def test_the_license_is_that_of_the_targets_own_card(tmp_path: Path) -> None:
    assert stated_license(tmp_path) == {}
    card = '---\nlanguage:\n- en\nlicense: other\nlicense_name: "qwen"\n---\n# Model\nlicense: mit\n'
    (tmp_path / "README.md").write_text(card)
    assert stated_license(tmp_path) == {"license": "other", "license_name": "qwen"}
