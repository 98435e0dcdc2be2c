"""Keys: canonical, pinned, and moved by what they should be moved by."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from speculators.config import compose, shipped
from speculators.config.fields import iter_options
from speculators.runner.planning import key
from speculators.runner.planning.graph import KINDS
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import external
from speculators.runner.store.artifacts import Store
from tests.conftest import OF_CHECKPOINT

GOLDEN = Path(__file__).parents[2] / "goldens" / "keys.json"
RECIPES = sorted(path.stem for path in shipped.RECIPES.glob("*.yaml"))
COMMIT = {"gemma4_dflash": f"target.source=hub:google/gemma-4-31B-it@{'0' * 40}"}
"""What the hub would be asked for: recipes that name a model there without a commit get this one."""
FACTS = ["target.num_hidden_layers=60", "target.hidden_size=5376", "target.vocab_size=262144"]
"""Of a target that is not here, for keys that its depth enters."""


def words(name: str) -> list[str]:
    """How the golden keys of a shipped recipe are asked for."""
    return [f"recipe={name}", *([COMMIT[name], *FACTS] if name in COMMIT else [])]


def image(**changes: object) -> dict[str, object]:
    whole = {"config": {"train.lr": 0.1}, "inputs": {"tokens": "a"}, "packages": {}, "service": {}} | changes
    return key.preimage("train", 1, **whole)  # type: ignore[arg-type]


def keys(planner: Planner) -> dict[str, str]:
    """Each node's key when every input's digest is the input's own name."""
    planner.engine = "1.2.3"
    planner.packages = dict.fromkeys(planner.packages, "1.2.3")
    names = {name: name for name in planner.graph}
    return {name: planner.step(name, names).key for name in planner.graph}


def test_the_canonical_text_is_pinned() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"z": "\u00e9", "y": 1e-3}}
    assert key.canonical(value) == '{"a":{"y":0.001,"z":"\u00e9"},"b":[1,2.5,null,true]}'
    assert key.digest(value) == "3a47d1dde2f20a1617adb4c89e823f53edbe00e77dea715f3da5e8535547f65f"


def test_tuples_and_lists_are_one() -> None:
    assert key.digest({"a": (1, 2)}) == key.digest({"a": [1, 2]})


def test_a_number_that_is_none_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key.digest({"a": float("nan")})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"config": {"train.lr": 0.2}}, "train.lr"),
        ({"inputs": {"tokens": "b"}}, "input tokens"),
        ({"packages": {"torch": "3"}}, "package torch"),
        ({"service": {"engine": "4"}}, "service engine"),
    ],
)
def test_a_difference_is_named_as_a_person_writes_it(change: dict[str, object], name: str) -> None:
    assert [n for n, _, _ in key.preimage_differences(image(), image(**change))] == [name]
    assert key.digest(image()) != key.digest(image(**change))


@pytest.mark.parametrize("name", RECIPES)
def test_keys_are_the_golden_ones(name: str, store: Store) -> None:
    """A key that moves invalidates everyone's artifacts: `python -m tests.goldens.update keys` makes that a diff."""
    assert keys(Planner(compose.compose(words(name)), store)) == json.loads(GOLDEN.read_text())[name]


KEYS_OF_ALL = """
import json, pathlib, sys
from speculators.config import compose
from speculators.runner.planning.plan import Planner
from speculators.runner.store.artifacts import Store
found = {}
for name, words in json.loads(sys.argv[2]).items():
    p = Planner(compose.compose(words), Store(pathlib.Path(sys.argv[1])))
    p.engine = "1.2.3"
    p.packages = dict.fromkeys(p.packages, "1.2.3")
    names = {x: x for x in p.graph}
    found[name] = {x: p.step(x, names).key for x in p.graph}
print(json.dumps(found))
"""


@pytest.mark.parametrize("seed", range(10))
def test_keys_do_not_depend_on_directory_locale_user_store_or_hash_seed(seed: int, tmp_path: Path) -> None:
    directory = tmp_path / ("here", "elsewhere")[seed % 2]
    directory.mkdir()
    env = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "LC_ALL": ("C", "C.UTF-8")[seed // 2 % 2],
        "HOME": str(directory),
        "USER": f"user-{seed}",
    }
    asked = json.dumps({name: words(name) for name in RECIPES})
    command = [sys.executable, "-c", KEYS_OF_ALL, f"store-{seed}", asked]
    done = subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(GOLDEN.read_text())


def _reversed(value: Any) -> Any:
    """The same mapping with its keys written in the other order, at every depth."""
    return {k: _reversed(value[k]) for k in reversed(value)} if isinstance(value, dict) else value


def test_keys_do_not_depend_on_the_order_in_which_a_recipe_is_written(tmp_path: Path, store: Store) -> None:
    text = (shipped.RECIPES / "smollm2_eagle3.yaml").read_text()
    plain = _reversed(yaml.safe_load(text))
    (tmp_path / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(plain, sort_keys=False))
    words = ["train.epochs=2", "train.lr=0.5", f"recipe={tmp_path}/mine.yaml"]
    one = keys(Planner(compose.compose(words), store))
    assert one == keys(Planner(compose.compose(["recipe=smollm2_eagle3", *reversed(words[:2])]), store))


@pytest.mark.parametrize(
    "spellings",
    [
        ["train.lr=3e-4", "train.lr=0.0003", "train.lr=.0003", "train.lr=3.0E-04", "train.lr=+3e-4", "train.lr='3e-4'"],
        ["train.max_grad_norm=2", "train.max_grad_norm=2.0", "train.max_grad_norm=2e0"],
        ["train.epochs=10", "train.epochs=+10", "train.epochs=1_0"],
        ["vocab.size=null", "vocab.size=NULL"],
        ["evaluate.concurrency=[1,8]", "evaluate.concurrency=[1, 8]"],
    ],
)
def test_keys_do_not_depend_on_the_spelling_of_a_value(spellings: list[str], store: Store) -> None:
    found = [keys(Planner(compose.compose(["recipe=smollm2_eagle3", word]), store)) for word in spellings]
    assert all(each == found[0] for each in found)
    assert found[0] != keys(Planner(compose.compose(["recipe=smollm2_eagle3"]), store))


def test_a_target_moves_keys_by_its_content_and_not_by_its_place(
    checkpoint: Path, tmp_path: Path, store: Store
) -> None:
    def own(path: Path) -> str:
        planner = Planner(compose.compose(["recipe=smollm2_eagle3", *OF_CHECKPOINT, f"target.source={path}"]), store)
        return planner.step("target", {}).key

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert own(copy) == own(checkpoint)
    with (copy / "model.safetensors").open("ab") as weights:
        weights.write(b"more")
    assert own(copy) != own(checkpoint)


@pytest.mark.parametrize("named", ["smollm2_eagle3", "smollm2_dflash"])
def test_every_operational_field_moves_no_key_and_every_semantic_one_moves_some(
    named: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "fingerprint", lambda *_: {"engine": "1.2.3"})
    config = compose.compose([f"recipe={named}"])
    planner = Planner(config, store)
    before = keys(planner)
    read = tuple(f"{name}." for kind in KINDS.values() for name in kind.reads)
    for name, value, policy, _ in list(iter_options(config)):
        if (
            # A number of speculative tokens enters keys as a derived value: see the cases below.
            name.endswith((".source", ".num_speculative_tokens"))
            # Nobody can ask such a server which draft it has, so that evaluations have other keys.
            or name in ("serve.baseline_url", "serve.speculative_url")
            or name.startswith("pipeline")
            or (policy == "semantic" and not f"{name}.".startswith(read))
        ):
            continue
        owner: object = config
        *parents, leaf = name.split(".")
        for parent in parents:
            owner = owner[parent] if isinstance(owner, dict) else getattr(owner, parent)
        other = _other(value)
        assert other != value or len(type(value)) == 1, f"{name} was not changed"
        setattr(owner, leaf, other)
        moved = keys(planner) != before
        setattr(owner, leaf, value)
        assert moved == (policy in ("semantic", "if_set")), name


@pytest.mark.parametrize(
    ("recipe", "words", "moved"),
    [
        ("smollm2_eagle3", ["speculator.num_speculative_tokens=5"], {"evaluate"}),
        ("smollm2_eagle3", ["evaluate.num_speculative_tokens=[3,5]"], {"evaluate"}),
        ("smollm2_eagle3", ["speculator.num_speculative_tokens=3"], set()),
        ("smollm2_eagle3", ["evaluate.num_speculative_tokens=[3,3]"], set()),
        ("smollm2_eagle3", ["speculator.ttt_steps=5"], {"train", "evaluate"}),
        ("smollm2_dflash", ["speculator.num_speculative_tokens=5"], {"evaluate"}),
        ("smollm2_dflash", ["evaluate.num_speculative_tokens=[7]"], set()),
        ("smollm2_dflash", ["speculator.block_size=9", "evaluate.num_speculative_tokens=[7]"], {"train"}),
    ],
)
def test_tokens_that_are_served_move_no_key_but_that_of_evaluate(
    recipe: str, words: list[str], moved: set[str], store: Store
) -> None:
    before = keys(Planner(compose.compose([f"recipe={recipe}"]), store))
    after = keys(Planner(compose.compose([f"recipe={recipe}", *words]), store))
    assert {name for name in before if before[name] != after[name]} == moved


def test_no_semantic_field_is_read_by_nobody() -> None:
    config = compose.compose(["recipe=smollm2_eagle3"])
    read = tuple(f"{name}." for kind in KINDS.values() for name in kind.reads)
    unread = [n for n, _, policy, _ in iter_options(config) if policy == "semantic" and not f"{n}.".startswith(read)]
    # Wiring enters keys by the digests of what is wired, layer ids by what is derived from them, and
    # trust_remote_code changes who may run, not what comes out.
    assert [n for n in unread if not n.startswith("pipeline")] == ["target.trust_remote_code"]


def _other(value: object) -> object:
    if hasattr(value, "name"):
        return next(m for m in type(value) if m is not value) if len(type(value)) > 1 else value  # type: ignore[arg-type, var-annotated]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, value[0] if value else "x"]
    if isinstance(value, dict):
        return {**value, "train": {"retries": 1.0}}
    return 3 if value is None else value
