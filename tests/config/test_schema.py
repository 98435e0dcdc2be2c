"""The schema: policies, selection, and the round trip through JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.config import algorithms, schema
from speculators.config.algorithms import SPECULATORS, Eagle3
from speculators.config.choices import Dtype
from speculators.config.fields import identity, iter_options, select, to_builtins
from speculators.config.foreign_names import CHANGED_MEANING, RENAMED, hint
from speculators.config.schema import Config, Train, from_builtins
from speculators.runner.planning.graph import KINDS

NEUTRALS = Path(__file__).parents[1] / "goldens" / "neutrals.json"


def test_a_recipe_survives_json(config: Config) -> None:
    assert from_builtins(Config, json.loads(json.dumps(to_builtins(config)))) == config


def test_the_speculator_keeps_its_algorithms_type_through_json(config: Config) -> None:
    assert isinstance(from_builtins(Config, to_builtins(config)).speculator, Eagle3)


def test_select_cuts_out_what_is_named_and_reading_more_fails(config: Config) -> None:
    part = from_builtins(Config, select(config, ("vocab", "max_seq_len")))
    assert part.max_seq_len == config.max_seq_len
    assert part.vocab == config.vocab
    with pytest.raises(AttributeError):
        _ = part.train.lr
    with pytest.raises(AttributeError):
        _ = part.extract


def test_identity_holds_semantic_fields_only() -> None:
    config = Config(train=Train(lr=0.5, log_every_steps=3))
    found = identity(config, ("train",))
    assert found["train.lr"] == 0.5
    assert "train.log_every_steps" not in found


def test_a_prefix_of_a_name_is_not_the_name() -> None:
    assert set(identity(Config(), ("train.lr",))) == {"train.lr"}


def test_an_if_set_field_enters_only_when_set(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Train.__dataclass_fields__["max_grad_norm"]
    monkeypatch.setattr(field, "metadata", {"policy": "if_set"})
    assert "train.max_grad_norm" not in identity(Config(), ("train.max_grad_norm",))
    assert identity(Config(train=Train(max_grad_norm=2.0)), ("train.max_grad_norm",)) == {"train.max_grad_norm": 2.0}


def neutral_values() -> dict[str, object]:
    """Of every `if_set` option, in each algorithm, the value with which it is left out of keys."""
    configs = [Config(speculator=speculator()) for speculator in SPECULATORS.values()]
    options = [option for config in configs for option in iter_options(config)]
    return {name: to_builtins(default) for name, _, policy, default in options if policy == "if_set"}


def test_a_neutral_value_does_not_change_or_old_keys_would_stand_for_it() -> None:
    changed = "raise the version of the stages that read it, then: python -m tests.goldens.update neutrals"
    assert neutral_values() == json.loads(NEUTRALS.read_text()), changed


def test_no_path_and_no_secret_is_semantic() -> None:
    suspicious = ("source", "python", "url", "dir", "store", "port", "api_key_env")
    semantic = [name for name, _, policy, _ in iter_options(Config()) if policy == "semantic"]
    assert [n for n in semantic if n.rsplit(".", 1)[-1] in suspicious] == []


def test_enums_are_written_by_name() -> None:
    assert to_builtins(Train(precision=Dtype.float32))["precision"] == "float32"


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_every_option_that_a_stage_declares_exists(stage: str, config: Config) -> None:
    names = {name for name, *_ in iter_options(config)}
    for declared in KINDS[stage].reads:
        assert any(f"{name}.".startswith(f"{declared}.") for name in names), declared


def test_every_field_is_documented() -> None:
    import ast
    import inspect

    modules = [ast.parse(inspect.getsource(module)) for module in (algorithms, schema)]
    bare = []
    for item in (n for tree in modules for n in tree.body if isinstance(n, ast.ClassDef) and n.name != "Config"):
        for field, after in zip(item.body, [*item.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            overrides = isinstance(field, ast.AnnAssign) and field.target.id == "algorithm"
            if isinstance(field, ast.AnnAssign) and not documented and not overrides:
                bare.append(f"{item.name}.{field.target.id}")
    assert bare == []


def test_a_config_can_be_printed_and_says_which_option_a_stage_did_not_declare() -> None:
    part = from_builtins(Config, select(Config(train=Train(lr=0.5)), ("train.lr", "vocab")))
    assert repr(part) == "Config(vocab=Vocab(executor=None, size=32000), train=Train(lr=0.5))"
    with pytest.raises(AttributeError, match=r"`train\.epochs` is not among the options that this stage declares"):
        _ = part.train.epochs
    with pytest.raises(AttributeError, match=r"`max_seq_len` is not among"):
        _ = part.max_seq_len
    with pytest.raises(AttributeError, match="`Train` has no attribute `epoch`"):
        _ = part.train.epoch  # type: ignore[attr-defined]


def test_names_of_other_tools_lead_to_options_that_exist() -> None:
    known = {name for name, *_ in iter_options(Config())}
    known |= {f"speculator.{name}" for schema in SPECULATORS.values() for name, *_ in iter_options(schema())}
    assert set(RENAMED.values()) <= known
    assert set(CHANGED_MEANING) <= set(RENAMED.values())
    assert hint("train.clip") == hint("max-grad-norm") == "the option is `train.max_grad_norm`"
    assert hint("train.lr") is None
