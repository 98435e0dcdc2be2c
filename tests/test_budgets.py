"""Sizes are numbers that a diff has to raise."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "speculators").rglob("*.py"))
MODULE_LINES = 500
FUNCTION_LINES = 60
# 350 lines more than before are runner/environment.py: nine lines of Makefile did not load on most machines.
# 200 more: planning/checks.py, which refuses in `plan` what failed after an hour.
# 800 more: hardware.py, execution/placement.py and planning/sizes.py, which find GPUs and decide what fits on them.
# 100 more: stages by name and kind, and what they dropped, for `show`.
# 450 more: planning/workload.py and durations.py, what a plan will take in tokens, bytes and hours.
# 80 more: checks of cores, directories and names of nodes.
# 200 more: planning/draft.py, which reads how a draft that is only measured is served, and for which target.
# 170 more: planning/trackers.py and digest_memo.py, so that a plan refuses early and hashes once.
# 350 more: planning/reuse.py finds rows of earlier runs; servers/external.py asks running servers what they are.
# 300 more: products.py, which finds the draft of a run and says what to do with it; vLLM's command line for users.
# 250 more: hub sources without a hub, lengths of servers, and the target's tensors before it is served.
# 60 more: ranks that a CPU cannot serve, and estimates by settings and reused rows.
# 60 more: parsers of servers, and the sampling and the date of requests.
# 60 more: datasets of several files, and which of a repository.
# 20 more: estimates of rows of token ids, and the name of one draft of several.
# 20 more: a directory that is no draft, and sizes in a draft's config.json that are none.
# 40 more: sampling that vLLM's CPU build cannot do.
RUNNER_LINES = 10_100
# 600 more: constraints beside the fields, and the names that other tools have for options.
# 550 more: the reference of each operation in ops/; shapes, formats and papers in the docstrings; typed rows.
# 950 more: what fits on which GPUs (see the runner).
# 1 150 more: help and arguments of every verb, documentation of options, tab completion, the live table's bars.
# 450 more: how long a plan will take (see the runner).
# 200 more: bounds of seeds, URLs and names, and errors of composing that name the option and the file.
# 350 more: measuring given drafts, and several numbers of tokens.
# 50 more: servers that have a phase each are measured in turn.
# 850 more: answers have an identity of their own, so that no conversation is answered twice.
# 800 more: serve, publish and the model card.
# 650 more: what a target's files show, whatever its family calls things; own sources, choices and bases of recipes.
# 120 more: errors of composing that name the option and the file.
# 1 400 more: datasets of every common form and container, with tools; damage that is skipped, counted and located.
# 820 more: exact masks for whatever a template does, tokenized on all cores, and shown.
# 50 more: checks of data files, of tokenizers and of what the kernels are given.
# 380 more: plans of sweeps, lines wrapped to the terminal, and commands that install extras.
# 700 more: answers that are cut, loop, are empty or call tools, are sampled, and are kept on the disk only.
# 800 more: containers of data files, hub repositories, subsets and splits.
# 150 more: `show tokens`.
# 80 more: estimates of token rows and of recorded answers, hub ids told from paths.
# 40 more: sampling that vLLM's CPU build cannot do.
# 30 more: thoughts that a prompt has closed, and rows of tables and CSV that Python reads otherwise.
# 40 more: rows of token ids refused where a stage needs prompts; servers of other directories told apart.
PACKAGE_LINES = 32_590


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_module_is_too_long() -> None:
    assert {str(p.relative_to(ROOT)): lines(p) for p in SOURCES if lines(p) > MODULE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def test_the_runner_and_the_package_keep_their_size() -> None:
    runner = sum(lines(p) for p in SOURCES if "runner" in p.parts)
    package = sum(lines(p) for p in SOURCES)
    print(f"runner {runner} of {RUNNER_LINES} lines, package {package} of {PACKAGE_LINES}, {len(SOURCES)} modules")
    assert runner <= RUNNER_LINES
    assert package <= PACKAGE_LINES


def test_there_is_no_utils_module() -> None:
    assert [p.name for p in SOURCES if p.stem in ("utils", "helpers", "common", "misc")] == []
