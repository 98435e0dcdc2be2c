"""Imports point one way, each third-party world has one door, and planning stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "speculators"
HEAVY = {"torch", "transformers", "vllm", "datasets", "ray", "wandb"}
SHARED = [
    {
        "speculators",
        "speculators.errors",
        "speculators.packages",
        "speculators.timeouts",
        "speculators.checkpoint_files",
        "speculators.machine",
        "speculators.answers",
        "speculators.model_card",
        "speculators.tokenizer_files",
        "speculators.config.fields",
        "speculators.config.choices",
    },
    {"speculators.config", "speculators.config.algorithms", "speculators.config.execution"},
    {"speculators.config.schema"},
    {"speculators.job"},
    # `plan` reads the first rows of data files; it imports nothing but the sets above.
    {f"speculators.data.{name}" for name in ("damage", "files", "messages")},
    {f"speculators.data.{name}" for name in ("csv_rows", "json_rows", "tables")},
    {"speculators.data.reading"},
    {"speculators.data.conversations"},
]
"""What both sides of the line may import. Modules of one set may import each other, but not in a circle."""
LEFT = [
    *SHARED,
    {"speculators.runner"},
    {
        f"speculators.runner.planning{name}"
        for name in ("", ".digest_memo", ".graph", ".key", ".derive", ".draft", ".sizes", ".sources")
    },
    {f"speculators.runner.{wing}" for wing in ("store", "servers", "execution", "executors")},
    # What plans are made of looks into the store and at the machine (docs/concepts/decisions.md).
    {
        f"speculators.runner.planning.{name}"
        for name in (
            "checks",
            "reuse",
            "plan",
            "serving",
            "trackers",
            "datasets",
            "explain",
            "workload",
            "durations",
            "estimate",
        )
    },
    {"speculators.runner.planning.lockfile"},
    {"speculators.runner.servers.pool"},
    {"speculators.runner.execution.execute"},
    {f"speculators.runner.{name}" for name in ("doctor", "environment", "history")},
    {"speculators.runner.products"},
    {
        f"speculators.config.{name}"
        for name in (
            "shipped",
            "checks",
            "foreign_names",
            "translation",
            "documentation",
            "recipe_files",
            "compose",
            "composed",
        )
    },
    {"speculators.ui"},
    {"speculators.live"},
    {"speculators.verbs"},
    {"speculators.verbs.run"},
    {"speculators.cli"},
]
RIGHT = [
    *SHARED,
    {"speculators.ops"},
    {"speculators.data", "speculators.features", "speculators.drafts"},
    {"speculators.engine", "speculators.targets"},
    {"speculators.evaluation"},
    {"speculators.training"},
    {"speculators.stages"},
    {"speculators.provenance"},
    {"speculators.worker"},
]
WORKERS = {f"speculators.runner{name}" for name in ("", ".store", ".store.artifacts", ".doctor")}
"""The worker stands on the line: it claims, publishes, and asks the doctor about imports that fail."""
DOORS = {
    "hydra": {"speculators.config.compose"},
    "omegaconf": {f"speculators.config.{name}" for name in ("compose", "recipe_files", "translation")},
    "rich": {"speculators.live"},
    "vllm": {"speculators.engine.connector"},
    "mooncake": {"speculators.engine.mooncake"},
    "huggingface_hub": {"speculators.data.sources", "speculators.runner.planning.sources", "speculators.verbs.publish"},
    "submitit": {"speculators.runner.executors.submitit"},
    "ray": {"speculators.runner.executors.ray"},
    "wandb": {"speculators.training.tracking"},
    "trackio": {"speculators.training.tracking"},
    "mlflow": {"speculators.training.tracking"},
    "tensorboard": {"speculators.training.tracking"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, *, at_load: bool = False) -> set[str]:
    """Absolute names imported; a name imported from a package counts as `package.name` too."""
    names: set[str] = set()
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rank(name: str, side: list[set[str]]) -> int | None:
    """Place in the order of one side: that of the longest listed prefix. What is shared is listed by itself."""
    whole = set().union(*SHARED)
    places = {p: place for place, level in enumerate(side) for p in level}
    fitting = [p for p in places if name == p or (name.startswith(f"{p}.") and p not in whole)]
    return places[max(fitting, key=len)] if fitting else None


MODULES = modules()
OURS = {n: {i for i in imports(t) if i in MODULES} for n, t in MODULES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    for side in (LEFT, RIGHT):
        own = rank(name, side)
        if own is None:
            continue
        for other in OURS[name]:
            if name == "speculators.worker" and other in WORKERS:
                continue
            place = rank(other, side)
            assert place is not None, f"{name} imports {other} across the line"
            assert place <= own, f"{name} imports {other}, which comes after it"


def test_every_module_has_its_place() -> None:
    assert [n for n in MODULES if rank(n, LEFT) is None and rank(n, RIGHT) is None] == []


def test_no_two_modules_import_each_other() -> None:
    circles = [(a, b) for a in OURS for b in OURS[a] if a in OURS[b] and a != b]
    assert circles == []


def test_no_imports_go_in_a_circle() -> None:
    """At load: imports inside functions and for type checkers are not followed."""
    left = {name: {i for i in imports(tree, at_load=True) if i in MODULES} for name, tree in MODULES.items()}
    while free := [name for name, wanted in left.items() if not wanted & (left.keys() - {name})]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.startswith("speculators.stages.")])
def test_a_stage_imports_no_other_stage(name: str) -> None:
    assert [i for i in OURS[name] if i.startswith("speculators.stages.") and i != name] == []


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.startswith("speculators.ops")])
def test_operations_import_nothing_else_of_ours(name: str) -> None:
    assert [i for i in OURS[name] if not i.startswith("speculators.ops")] == []


def test_operations_are_called_by_their_functions_alone() -> None:
    """Which kernels compute them is nobody else's business; the stage notes why there are none (`cpu.missing`)."""
    functions = {"attention", "distillation", "functional", "masks", "muon", "weights"}
    allowed = {"speculators.ops", *(f"speculators.ops.{name}" for name in functions)}
    users = {n: {i for i in OURS[n] if i.startswith("speculators.ops")} - allowed for n in MODULES}
    others = {n: used for n, used in users.items() if used and not n.startswith("speculators.ops")}
    assert others == {"speculators.stages.train": {"speculators.ops.cpu"}}


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.startswith("speculators.drafts.")])
def test_a_draft_imports_no_other_draft(name: str) -> None:
    shared = ("attention", "base", "layers")
    operations = ("ops", "ops.attention", "ops.functional", "ops.masks")
    below = (*operations, "features.batch")  # the last for `PackedBatch`, what a draft is given
    allowed = set().union(*SHARED) | {f"speculators.{n}" for n in (*below, *(f"drafts.{n}" for n in shared))}
    if name == "speculators.drafts.induction":  # which initialises them
        allowed |= {"speculators.drafts.dflash", "speculators.drafts.eagle3"}
    own = ".".join(name.split(".")[:3])
    assert [i for i in OURS[name] if i not in allowed and not i.startswith(own)] == []


@pytest.mark.parametrize(("library", "doors"), DOORS.items(), ids=DOORS)
def test_each_library_has_one_door(library: str, doors: set[str]) -> None:
    users = {n for n, t in MODULES.items() if any(i.split(".")[0] == library for i in imports(t))}
    assert users <= doors


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if rank(n, LEFT) is not None])
def test_the_runner_imports_nothing_heavy(name: str) -> None:
    own = {library for library in HEAVY if name in DOORS.get(library, ())}  # which a door imports when it is used
    assert not {i.split(".")[0] for i in imports(MODULES[name])} & (HEAVY - own)
    assert not {i.split(".")[0] for i in imports(MODULES[name], at_load=True)} & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["plan", "recipe=smollm2_eagle3"]], ids=["help", "plan"])
def test_help_and_plan_load_no_heavy_library(words: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv[1:] = {words!r}\n"
        "from speculators.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        f"print('loaded:', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    env = {**os.environ, "SPECULATORS_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert done.stderr.endswith("loaded: []\n")


def test_stage_docstrings_open_with_their_place() -> None:
    for name, tree in MODULES.items():
        if name.startswith("speculators.stages."):
            first = (ast.get_docstring(tree) or "").splitlines()[0]
            assert first.startswith(f"{name.rsplit('.', 1)[1]}: "), name
            assert " -> " in first, name
