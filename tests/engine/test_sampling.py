"""Sampling options of requests: of the recipe, of the target, drawn by conversations; and what the template gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from speculators.config import compose
from speculators.config.choices import Sampling
from speculators.config.schema import Regenerate
from speculators.engine.sampling import model_sampling, request_seed, sampling_fields
from speculators.errors import RecipeError, StageError
from speculators.tokenizer_files import date_variable

MODEL = Regenerate(sampling=Sampling.model)


def test_the_models_sampling_is_that_of_its_generation_config_with_vllms_defaults(tmp_path: Path) -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 9, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    expected = {
        "temperature": 0.6, "top_k": 20, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    assert sampling_fields(MODEL, tmp_path, "d") == model_sampling(tmp_path) == expected
    (tmp_path / "generation_config.json").write_text("{}")
    assert model_sampling(tmp_path)["temperature"] == 1.0


def test_a_target_without_a_generation_config_says_nothing_about_sampling(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"the target has no generation_config\.json"):
        model_sampling(tmp_path)


def test_a_conversation_draws_its_temperature_by_weight_and_the_same_again() -> None:
    config = Regenerate(temperatures=[0.0, 0.7, 1.0], temperature_weights=[1.0, 2.0, 1.0])
    drawn = [sampling_fields(config, None, f"{number}")["temperature"] for number in range(4000)]
    assert drawn == [sampling_fields(config, None, f"{number}")["temperature"] for number in range(4000)]
    counts = Counter(drawn)
    assert counts[0.7] == pytest.approx(2000, rel=0.1)
    assert counts[0.0] == pytest.approx(1000, rel=0.1)
    equal = Regenerate(temperatures=[0.0, 1.0])
    drawn = [sampling_fields(equal, None, f"{number}")["temperature"] for number in range(2000)]
    assert drawn.count(1.0) == pytest.approx(1000, rel=0.1)


def test_seeds_differ_by_turn_sample_and_the_recipes_seed() -> None:
    assert len({request_seed(s, "d", t, n) for s in range(3) for t in range(3) for n in range(3)}) == 27


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["regenerate.temperature_weights=[1]"], r"temperature_weights=\[1\.0\]: there are 0 temperatures"),
        (["regenerate.temperatures=[0.7]", "regenerate.temperature=1"], "regenerate.temperatures takes its place"),
        (["regenerate.sampling=model", "regenerate.top_p=0.9"], "regenerate.sampling=model takes it from the target"),
        (["evaluate.sampling=model", "evaluate.temperature=1"], "evaluate.sampling=model takes it from the target"),
        (["regenerate.temperatures=[-1]"], "must not be negative"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        compose.compose(["recipe=smollm2_eagle3", *words])
    assert error.value.hint


GUARDED = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2020" %}
    {%- endif %}
{%- endif %}"""


@pytest.mark.parametrize(
    ("template", "variable"),
    [
        (GUARDED, ("date_string", "%d %b %Y")),
        ("{%- set today = strftime_now('%d %B %Y') -%}", None),
        ("{{ messages }}", None),
    ],
)
def test_the_variable_in_place_of_todays_date_is_found(template: str, variable: tuple[str, str] | None) -> None:
    assert date_variable(template) == variable
