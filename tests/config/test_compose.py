"""Composition, and what a person is told about each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speculators.config import compose, shipped
from speculators.config.algorithms import SPECULATORS, Eagle3
from speculators.config.choices import DataFormat, Dtype
from speculators.config.schema import Dataset
from speculators.errors import RecipeError
from speculators.runner.planning.graph import build

RECIPES = sorted(shipped.RECIPES.glob("*.yaml"))
DEMO = "recipe=smollm2_eagle3"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_composes_and_wires(path: Path) -> None:
    config = compose.compose([f"recipe={path.stem}"])
    assert config.recipe == path.stem
    assert build(config)


def test_an_override_goes_before_the_recipe() -> None:
    assert compose.compose([DEMO, "train.lr=5e-4"]).train.lr == 5e-4


def test_the_recipe_goes_before_the_schema() -> None:
    assert compose.compose([DEMO]).prompts.num_conversations == 384


def test_an_algorithms_own_option_can_be_set() -> None:
    speculator = compose.compose([DEMO, "speculator.ttt_steps=5"]).speculator
    assert isinstance(speculator, Eagle3)
    assert speculator.ttt_steps == 5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("speculator.loss_fn=kl", "speculator.weighting=dpace: needs a loss"),
        ("speculator.max_anchors=0", "speculator.max_anchors=0: must be positive"),
        ("speculator.decay_gamma=0", "speculator.decay_gamma=0.0: must be positive"),
        ("speculator.dpace_alpha=1.5", "speculator.dpace_alpha=1.5: must be between 0 and 1"),
        ("speculator.target_layers=0", "speculator.target_layers=0: must be positive"),
        ("speculator.sliding_window=0", "speculator.sliding_window=0: must be positive"),
    ],
)
def test_what_a_block_draft_cannot_be_trained_with_is_said_before_anything_starts(word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compose.compose(["recipe=smollm2_dflash", word])


def test_a_processor_that_multiplies_bfloat16_is_one_word_and_changes_the_format_of_products_alone() -> None:
    plain, fast = (
        compose.compose(["recipe=smollm2_dflash"]),
        compose.compose(["recipe=smollm2_dflash", "hardware=cpu_bf16"]),
    )
    assert (plain.train.precision, fast.train.precision) == (Dtype.float32, Dtype.bfloat16)
    fast.train.precision = plain.train.precision
    assert fast == plain


def test_a_recipe_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text().replace(": 384", ": 7")
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert compose.compose(["recipe=mine"]).prompts.num_conversations == 7


def test_a_recipe_by_path_is_found(tmp_path: Path) -> None:
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text().replace(": 384", ": 8")
    path = tmp_path / "elsewhere.yaml"
    path.write_text(text)
    config = compose.compose([f"recipe={path}"])
    assert (config.recipe, config.prompts.num_conversations) == ("elsewhere", 8)


def test_a_set_that_is_also_trained_on_is_the_same_data_set() -> None:
    config = compose.compose([DEMO, "data.sharegpt.max_chars=100"])
    assert config.evaluate.datasets["sharegpt"] == config.data["sharegpt"]
    assert config.evaluate.datasets["human_eval"].id_field == "task_id"


@pytest.mark.parametrize(
    "written",
    [
        "[sharegpt, {mine: {source: mine.jsonl, format: prompts}}]",
        "{sharegpt: null, mine: {source: mine.jsonl, format: prompts}}",
    ],
    ids=["list", "mapping"],
)
def test_a_recipe_brings_data_sets_of_its_own_to_be_evaluated_with(tmp_path: Path, written: str) -> None:
    path = tmp_path / "mine.yaml"
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text()
    path.write_text(re.sub(r"\[human_eval, sharegpt\]", written, text))
    config = compose.compose([f"recipe={path}"])
    assert list(config.evaluate.datasets) == ["sharegpt", "mine"]
    source = str(tmp_path / "mine.jsonl")  # relative to the recipe
    assert config.evaluate.datasets["mine"] == Dataset(source=source, format=DataFormat.prompts)
    assert config.evaluate.datasets["sharegpt"] == config.data["sharegpt"]
    assert list(compose.compose([f"recipe={path}", "evaluate.datasets=[human_eval]"]).evaluate.datasets) == [
        "human_eval"
    ]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("[human]", "evaluate.datasets: there is no dataset `human`", "human_eval"),
        ("{mine: {sourc: x}}", "there is no option `evaluate.datasets.mine.sourc`", "did you mean `source`?"),
        ("{mine: {source: x, format: nope}}", "evaluate.datasets.mine.format: Invalid value 'nope'", "type"),
        ("[{mine: file.jsonl}]", "evaluate.datasets.mine is 'file.jsonl'", "{source: FILE, format: prompts}"),
        ("{mine: {format: prompts}}", "`evaluate.datasets.mine.source` has no value", "set it in the recipe"),
    ],
)
def test_a_data_set_that_is_measured_on_is_checked_like_one_that_is_trained_on(
    words: str, message: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        compose.compose([DEMO, f"evaluate.datasets={words}"])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_the_hub_is_one_override_away() -> None:
    config = compose.compose([DEMO, "target.source=hub:HuggingFaceTB/SmolLM2-135M-Instruct@" + "a" * 40])
    assert config.target.source.startswith("hub:HuggingFaceTB")


def test_schemas_choices_and_algorithms_are_one_list() -> None:
    from speculators.drafts import DRAFTS

    assert set(SPECULATORS) == set(DRAFTS) == {p.stem for p in (shipped.CONF / "speculator").glob("*.yaml")}


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["recipe=smollm_eagle3"], "no recipe named `smollm_eagle3`", "did you mean `smollm2_eagle3`?"),
        ([], "no recipe is named", "smollm2_eagle3"),
        ([DEMO, "train.lrr=3"], "there is no option `train.lrr`", "did you mean `train.lr`?"),
        (
            [DEMO, "speculator=dflash"],
            "the chosen `speculator` has no option `speculator.ttt_warmup_ratio`, which the recipe or the command line",
            "choose the algorithm that has it, or a recipe that does not set it",
        ),
        ([DEMO, "qq=3"], "there is no option `qq`", "evaluate, executor, extract, force, from, hardware"),
        ([DEMO, "train.lr=abc"], "train.lr: Value 'abc' of type 'str' could not be converted to Float", "type"),
        ([DEMO, "train.precision=fp4"], "train.precision: Invalid value 'fp4'", "type"),
        ([DEMO, "+train.x=1"], "`+train.x`: options cannot be added", "train"),
        ([DEMO, "~train.lr"], "`~train.lr`: options cannot be removed", "default"),
        ([DEMO, "target=smollm2"], "no choice for target named `smollm2`", "smollm2_135m"),
        ([DEMO, "train.lr=1,2"], "`train.lr` has several values", "-m"),
        ([DEMO, "train.epochs=0"], "train.epochs=0: must be positive", "train.epochs=6"),
        ([DEMO, "regenerate.max_tokens=1024"], "regenerate.max_tokens=1024: leaves no room", "max_seq_len=2048"),
        ([DEMO, "learning_rate=1e-3"], "there is no option `learning_rate`", "the option is `train.lr`"),
        ([DEMO, "train.bf16=true"], "there is no option `train.bf16`", "`train.precision` (bfloat16,"),
        ([DEMO, "foo bar=1"], "cannot read an override", "quote"),
        ([DEMO, "data.sharegpt.maxchars=3"], "there is no option `data.sharegpt.maxchars`", "max_chars"),
        (["recipe=nowhere/mine.yaml"], "no recipe at `nowhere/mine.yaml`", "smollm2_eagle3"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_a_mistake_gets_one_error_and_one_hint(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose.compose(words)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_a_misspelt_key_in_a_recipe_file_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text((shipped.RECIPES / "smollm2_eagle3.yaml").read_text() + "\ntokenize: {min_supervized: 3}\n")
    with pytest.raises(RecipeError, match=r"there is no option `tokenize\.min_supervized`") as caught:
        compose.compose([f"recipe={path}"])
    assert caught.value.hint == "did you mean `tokenize.min_supervised`?"


def test_a_recipe_without_a_target_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("# @package _global_\ndefaults:\n  - override /data: [sharegpt]\n")
    with pytest.raises(RecipeError, match="names no target") as caught:
        compose.compose([f"recipe={path}"])
    assert "ORG/NAME" in caught.value.hint
    assert "smollm2_135m" in caught.value.hint


OWN = """
target: {source: ./target}
data: {mine: {source: rows.jsonl, format: messages}}
evaluate: {datasets: [mine, {ev: {source: ../ev.jsonl, format: prompts}}]}
"""


def test_own_target_and_own_data_need_no_choice_and_lie_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "mine.yaml"
    path.write_text(OWN)
    config = compose.compose([f"recipe={path}"])
    assert config.target.source == str(tmp_path / "here" / "target")
    assert {name: data.source for name, data in config.data.items()} == {"mine": str(tmp_path / "here" / "rows.jsonl")}
    assert config.evaluate.datasets["mine"] == config.data["mine"]
    assert config.evaluate.datasets["ev"].source == str(tmp_path / "ev.jsonl")
    assert config.speculator.algorithm == "eagle3"
    words = [f"recipe={path}", "target.source=./other", "data.mine.source=x.jsonl"]
    config = compose.compose(words)
    assert (config.target.source, config.data["mine"].source) == ("./other", "x.jsonl"), "of the working directory"


@pytest.mark.parametrize("source", ["Qwen/Qwen3-8B", "Qwen/Qwen3-8B@main", "hub:Qwen/Qwen3-8B", "/a/b", "~/a"])
def test_what_is_no_relative_path_stays_as_it_is_written(tmp_path: Path, source: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"target: {{source: {source}}}")
    assert compose.compose([f"recipe={path}"]).target.source == source


def test_choices_of_the_working_directory_are_found_and_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for group, text in (("target", "source: hub:a/b"), ("data", "notes: {source: n.jsonl, format: prompts}")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "notes.yaml").write_text(text)
    (tmp_path / "conf" / "config.yaml").write_text("of: another program")
    config = compose.compose([DEMO, "target=notes", "data=[sharegpt,notes]", "evaluate.datasets=[notes]"])
    assert (config.target.source, list(config.data)) == ("hub:a/b", ["sharegpt", "notes"])
    assert compose.compose([DEMO, "evaluate.datasets=[notes]"]).evaluate.datasets["notes"].source == "n.jsonl"
    with pytest.raises(RecipeError, match="no choice for target named `note`") as caught:
        compose.compose([DEMO, "target=note"])
    assert caught.value.hint == "did you mean `notes`?"
    (tmp_path / "conf" / "target" / "smollm2_135m.yaml").write_text("source: hub:c/d")
    with pytest.raises(RecipeError, match=r"conf/target/smollm2_135m\.yaml: there is a shipped choice of this name"):
        compose.compose([DEMO])


@pytest.mark.parametrize("base", ["/recipe/smollm2_eagle3", "smollm2_eagle3", "/recipe/sibling", "sibling"])
def test_a_recipe_builds_on_another(tmp_path: Path, base: str) -> None:
    (tmp_path / "sibling.yaml").write_text("defaults: [/recipe/smollm2_eagle3, _self_]\ntrain: {epochs: 7}")
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [{base}, override /pipeline: online, _self_]\ntrain: {{lr: 1e-4}}")
    config = compose.compose([f"recipe={path}"])
    assert (config.recipe, config.train.lr, config.train.max_steps) == ("mine", 1e-4, 2000)
    assert config.train.epochs == (7 if "sibling" in base else 2)
    assert config.pipeline["train"]["target"] == "serve", "its own choice goes before the base's"


def test_a_base_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [/recipe/smollm_eagle3, _self_]")
    with pytest.raises(RecipeError, match="no choice for recipe named `smollm_eagle3`") as caught:
        compose.compose([f"recipe={path}"])
    assert caught.value.hint == "did you mean `smollm2_eagle3`?"


@pytest.mark.parametrize(
    ("written", "node", "inputs"),
    [
        ("{tokenize: {conversations: regenerate}}", "tokenize", {"conversations": "regenerate"}),
        ("{tokenize: {conversations: prompts}}", "tokenize", {"conversations": "prompts"}),
        ("{train: {states: null, more: vocab}}", "train", {"tokens": "tokenize", "features": "extract",
                                                            "vocab": "vocab", "more": "vocab"}),
        ("{evaluate: null}", "evaluate", None),
        ("{again: {uses: evaluate, speculator: train}}", "again", {"uses": "evaluate", "speculator": "train"}),
    ],
)  # fmt: skip
def test_a_node_of_the_shipped_pipeline_is_restated(
    tmp_path: Path, written: str, node: str, inputs: dict[str, str] | None
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [/recipe/smollm2_eagle3, _self_]\npipeline: {written}")
    assert compose.compose([f"recipe={path}"]).pipeline.get(node) == inputs
    name, _, value = written[1:-1].partition(": ")
    assert compose.compose([DEMO, f"pipeline.{name}={value}"]).pipeline.get(node) == inputs


@pytest.mark.parametrize("written", ["{tokenize: regenerate}", "{tokenize: {conversations: [regenerate]}}"])
def test_a_node_that_is_no_mapping_of_names_is_one_error(written: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [/recipe/smollm2_eagle3, _self_]\npipeline: {written}")
    with pytest.raises(RecipeError, match=r"pipeline\.tokenize"):
        compose.compose([f"recipe={path}"])


def test_a_recipe_that_is_no_mapping_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml is not a YAML mapping"):
        compose.compose([f"recipe={path}"])


@pytest.mark.parametrize(
    "words",
    [
        ["target.chat_template_kwargs={enable_thinking: false}"],
        ["target.chat_template_kwargs.enable_thinking=false"],
        ["target.chat_template_kwargs={}", "target.chat_template_kwargs.enable_thinking=false"],
    ],
)
def test_variables_of_the_chat_template_have_any_name(words: list[str]) -> None:
    assert compose.compose([DEMO, *words]).target.chat_template_kwargs == {"enable_thinking": False}
