"""One algorithm, one place: its schema class and its file in `drafts/`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from speculators.config.algorithms import SPECULATORS

PACKAGE = Path(__file__).parents[2] / "speculators"
OWN = {PACKAGE / "config/algorithms.py"}
NAMES = re.compile("|".join([*SPECULATORS, *(schema.__name__ for schema in SPECULATORS.values())]))


def code_of(path: Path) -> list[str]:
    """Names and strings of a module, docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.alias):
            found.append(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
    return found


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.rglob("*.py")) if p not in OWN and p.parent != PACKAGE / "drafts"], ids=str
)
def test_no_other_module_names_an_algorithm(path: Path) -> None:
    assert [text for text in code_of(path) if NAMES.fullmatch(text)] == []


@pytest.mark.parametrize("name", SPECULATORS)
def test_every_algorithm_says_what_the_package_asks_of_it(name: str) -> None:
    options = SPECULATORS[name]()
    assert options.algorithm == name
    for depth in (1, 2, 4, 12, 80):
        layer_ids = options.default_target_layer_ids(depth)
        assert layer_ids == sorted(set(layer_ids))
        assert all(0 <= layer <= depth for layer in layer_ids)
    assert options.step_decay() > 0
    assert options.vllm_method()
    assert options.needs_mask_token() in (True, False)
