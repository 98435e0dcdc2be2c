"""One name is one thing: no class and no public top-level function of the package shares its name with another."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "speculators"
REFERENCE = PACKAGE / "ops/reference.py"
"""Gives the formulas of the functions of `ops` under their names."""


def definitions() -> dict[str, list[str]]:
    """Modules by the class, at any depth, or public top-level function that they define; `main` is an entry point."""
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(set(PACKAGE.rglob("*.py")) - {REFERENCE}):
        module, tree = str(path.relative_to(PACKAGE.parent)), ast.parse(path.read_text())
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        names += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for name in names:
            if name != "main" and (name[0] != "_" or name[1:2].isupper()):
                modules[name].append(module)
    return modules


def test_no_name_is_defined_twice() -> None:
    repeated = {name: modules for name, modules in definitions().items() if len(modules) > 1}
    assert repeated == {}
