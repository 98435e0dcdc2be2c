"""What the output of each stage follows from: its version, and the source of every module right of the line behind it.

A digest leaves out comments, docstrings and layout, so that only code moves it.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speculators.runner.planning.graph import KINDS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("stages.txt")
SHARED = tuple(f"speculators.{name}" for name in ("errors", "job", "config", "provenance", "runner", "timeouts"))
"""Left of the line, or both sides': options enter keys by their values, and no output depends on a timeout."""
COUNTED = ("speculators.config.algorithms",)
"""Of the shared modules, those that compute something of what comes out."""
COMMAND = "python -m tests.goldens.update stages"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Versions of stages, and of each module its digest and why it was recorded."""

    versions: dict[str, int]
    modules: dict[str, tuple[str, str]]


def digest(source: str) -> str:
    """Of Python source, in 16 hex digits; the same under every Python that the package supports."""
    return hashlib.sha256("\n".join(_dump(ast.parse(source))).encode()).hexdigest()[:16]


def _dump(node: object) -> Iterator[str]:
    """A tree as lines, without strings that stand alone (docstrings) and without fields that are empty."""
    if isinstance(node, list):
        for each in node:
            if not (
                isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) and each.value.value is not ...
            ):
                yield from _dump(each)
        yield "]"
    elif isinstance(node, ast.Constant):
        yield f"{type(node.value).__name__} {node.value!r}"
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name != "ctx" and value is not None and value != []:
                yield f".{name}"
                yield from _dump(value)
        yield ")"
    else:
        yield repr(node)


def digest_of_cpp(source: str) -> str:
    """The same of C++."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()[:16]


def _file(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


def _counts(module: str) -> bool:
    shared = any(module == name or module.startswith(f"{name}.") for name in SHARED)
    return module.startswith("speculators.") and (not shared or module in COUNTED)


def _imports(source: str) -> Iterator[str]:
    """The modules that a source names, in functions too; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def behind(module: str) -> set[str]:
    """A module and all of ours right of the line that it imports, the packages around them included."""
    found: set[str] = set()
    unseen = [module]
    while unseen:
        name = unseen.pop()
        file = _file(name)
        if name in found or file is None or not _counts(name):
            continue
        found.add(name)
        unseen += [name.rpartition(".")[0], *_imports(file.read_text())]
    return found


def sources(stage: str) -> dict[str, str]:
    """Digest of every source behind a stage, by module; C++ by its path."""
    modules = {name: file for name in behind(f"speculators.stages.{stage}") if (file := _file(name))}
    found = {name: digest(file.read_text()) for name, file in modules.items()}
    for directory in {file.parent for file in modules.values()}:
        for file in (*directory.glob("*.cpp"), *directory.glob("*.h")):
            found[str(file.relative_to(ROOT))] = digest_of_cpp(file.read_text())
    return found


def recorded() -> Recorded:
    """What the golden file says; of a line that a merge has left twice the last one counts."""
    versions, modules = {}, {}
    for line in GOLDEN.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name == "stage":
            stage, version = rest.split()
            versions[stage] = int(version)
        elif name.startswith("speculators"):
            own, _, why = rest.partition(" ")
            modules[name] = (own, why)
    return Recorded(versions, modules)


def moved(stage: str, golden: Recorded) -> list[str]:
    """The modules behind a stage whose source is another than the recorded one."""
    return sorted(name for name, own in sources(stage).items() if golden.modules.get(name, ("",))[0] != own)


def update(why: str) -> str:
    """Record sources and versions as they are now. Gives what is wrong, if that is refused, else nothing.

    Args:
        why: the output is the same, for every stage whose version was not raised.
    """
    golden = recorded() if GOLDEN.exists() else Recorded({}, {})
    now: dict[str, tuple[str, str]] = {}
    for stage, kind in KINDS.items():
        changed = moved(stage, golden)
        raised = kind.version != golden.versions.get(stage)
        if changed and not raised and not why:
            return (
                f"{', '.join(changed)} changed, version {kind.version} of `{stage}` did not: raise it in "
                f'runner/planning/graph.py, or run `{COMMAND} --same-output "WHY"`'
            )
        for name, own in sources(stage).items():
            reason = why or f"{stage} {kind.version}"
            now[name] = (own, reason) if name in changed else golden.modules[name]
    lines = [f"stage {stage} {KINDS[stage].version}" for stage in sorted(KINDS)]
    lines += [f"{name} {own} {reason}" for name, (own, reason) in sorted(now.items())]
    GOLDEN.write_text("\n".join(lines) + "\n")
    return ""
