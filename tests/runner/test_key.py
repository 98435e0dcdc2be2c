"""Keys: canonical, pinned, and moved by what they should be moved by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speculators import recipe
from speculators.fields import leaves
from speculators.runner import key
from speculators.runner.graph import KINDS
from speculators.runner.plan import Planner
from speculators.runner.store import Store

GOLDEN = Path(__file__).parent.parent / "goldens" / "keys.json"
RECIPES = sorted(path.stem for path in recipe.RECIPES.glob("*.yaml"))


def image(**changes: object) -> dict[str, object]:
    whole = {"config": {"train.lr": 0.1}, "inputs": {"tokens": "a"}, "packages": {}, "service": {}} | changes
    return key.preimage("train", 1, **whole)  # type: ignore[arg-type]


def keys(planner: Planner) -> dict[str, str]:
    """Each node's key when every input's digest is the input's own name."""
    planner.engine = "1.2.3"
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
    assert [n for n, _, _ in key.differences(image(), image(**change))] == [name]
    assert key.digest(image()) != key.digest(image(**change))


@pytest.mark.parametrize("name", RECIPES)
def test_keys_are_the_golden_ones(name: str, store: Store) -> None:
    """A key that moves invalidates everyone's artifacts: `python tests/goldens/update.py` makes that a diff."""
    assert keys(Planner(recipe.compose([f"recipe={name}"]), store)) == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize(("seed", "locale"), [("0", "C"), ("1", "C.UTF-8"), ("77", "POSIX")])
def test_keys_do_not_depend_on_directory_locale_or_hash_seed(seed: str, locale: str, tmp_path: Path) -> None:
    code = (
        "import json, pathlib; from speculators import recipe; from speculators.runner.plan import Planner;"
        "from speculators.runner.store import Store;"
        "p = Planner(recipe.compose(['recipe=smollm2_eagle3']), Store(pathlib.Path('s')));"
        "p.engine = '1.2.3'; n = {x: x for x in p.graph}; print(json.dumps({x: p.step(x, n).key for x in p.graph}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(GOLDEN.read_text())["smollm2_eagle3"]


def test_every_operational_field_moves_no_key_and_every_semantic_one_moves_some(store: Store) -> None:
    config = recipe.compose(["recipe=smollm2_eagle3"])
    planner = Planner(config, store)
    before = keys(planner)
    read = tuple(f"{name}." for kind in KINDS.values() for name in kind.reads)
    for name, value, policy, _ in list(leaves(config)):
        if (
            name.endswith(".source")
            or name.startswith("pipeline")
            or (policy == "semantic" and not f"{name}.".startswith(read))
        ):
            continue
        owner: object = config
        *parents, leaf = name.split(".")
        for parent in parents:
            owner = owner[parent] if isinstance(owner, dict) else getattr(owner, parent)
        setattr(owner, leaf, _other(value))
        moved = keys(planner) != before
        setattr(owner, leaf, value)
        assert moved == (policy == "semantic"), name


def test_no_semantic_field_is_read_by_nobody() -> None:
    config = recipe.compose(["recipe=smollm2_eagle3"])
    read = tuple(f"{name}." for kind in KINDS.values() for name in kind.reads)
    unread = [n for n, _, policy, _ in leaves(config) if policy == "semantic" and not f"{n}.".startswith(read)]
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
    return 3 if value is None else value
