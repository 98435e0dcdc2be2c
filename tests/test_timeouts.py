"""Timeouts and polling intervals are defined in `speculators/timeouts.py` and nowhere else, each with its unit."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "speculators"
TIMEOUTS = ast.parse((PACKAGE / "timeouts.py").read_text())
# `environment` sets up the virtual environment that the package needs; `guard` is the script of an isolated
# interpreter that must start in a few ms. Both import the standard library only, so they have constants of their own.
EXEMPT = ("timeouts.py", "runner/environment.py", "runner/servers/guard.py")
NAMES = re.compile("_SECONDS|TIMEOUT|GRACE|INTERVAL|DEADLINE|HEARTBEAT|POLL|PATIENCE|PROBE|BACKOFF")
COUNTS = ("TOKENS_PER_TIMEOUT", "_MAX_POLLS", "IMPORT_SECONDS")
"""Numbers of something else than seconds, or seconds that nobody waits."""
WAITS = ("sleep", "wait", "join", "poll", "timeout", "wait_for")
"""Functions whose first or last argument is a time."""


def assigned(tree: ast.AST) -> Iterator[str]:
    """Constants of a module and of its classes."""
    for body in [node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef))]:
        for node in (node for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value not in (0, True)


def definitions(tree: ast.AST) -> list[str]:
    """Constants whose name is a timeout's, and numbers of seconds in calls."""
    bad = [name for name in assigned(tree) if name.isupper() and NAMES.search(name) and name not in COUNTS]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout" and literal(node.value):
            bad.append(f"line {node.value.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            bad += [f"line {node.lineno}: {ast.unparse(node)}"] if any(map(literal, node.args)) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("timedelta"):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            bad += [f"line {node.lineno}: {ast.unparse(node)}"] if any(map(literal, values)) else []
    return bad


def test_no_other_module_defines_a_timeout() -> None:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    assert set(EXEMPT) <= paths.keys()
    bad = {name: definitions(ast.parse(path.read_text())) for name, path in paths.items() if name not in EXEMPT}
    assert {name: found for name, found in bad.items() if found} == {}


def test_a_timeout_elsewhere_is_noticed() -> None:
    sources = ["POLL_SECONDS = 2.0", "class A:\n    GRACE: float = 1.0", "time.sleep(0.1)", "f(timeout=20)"]
    sources += ["PATIENCE = g()", "child.join(5.0)", "asyncio.timeout(3)", "timedelta(minutes=30)"]
    assert [source for source in sources if not definitions(ast.parse(source))] == []
    good = "time.sleep(delay)\nf(timeout=0)\nwait(timeout=LIMIT)\n_MAX_POLLS = 3\n', '.join(names)\ndone_seconds = 3\n"
    assert definitions(ast.parse(good)) == []


def test_each_timeout_is_in_seconds_and_has_a_docstring() -> None:
    names = list(assigned(TIMEOUTS))
    assert [name for name in names if not name.endswith("_SECONDS")] == []
    assert len(names) == len(set(names))
    for node, after in zip(TIMEOUTS.body[1:], [*TIMEOUTS.body[2:], None], strict=True):
        if isinstance(node, ast.Assign):
            assert isinstance(after, ast.Expr), ast.unparse(node)
            assert isinstance(after.value, ast.Constant), ast.unparse(node)
