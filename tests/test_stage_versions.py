"""A stage of which any source changed either has a new version, or somebody said that its output is the same.

`tests/goldens/stages.txt` has a line for every module right of the line: its digest, and why it was recorded.
"""

from __future__ import annotations

import pytest

from speculators.runner.planning.graph import KINDS
from tests.goldens.stages import COMMAND, behind, digest, digest_of_cpp, moved, recorded, sources


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_a_stage_whose_source_changed_has_a_new_version_or_a_word_that_its_output_is_the_same(stage: str) -> None:
    golden, version = recorded(), KINDS[stage].version
    changed = moved(stage, golden)
    assert not changed, (
        f"{', '.join(changed)}: changed, and `{stage}` computes with it. If its output differs, raise the version of "
        f"`{stage}` in runner/planning/graph.py (now {version}) and run `{COMMAND}`; if it does not, run "
        f'`{COMMAND} --same-output "WHY"`'
    )
    assert golden.versions[stage] == version, f"the version of `{stage}` changed: run `{COMMAND}`"


def test_all_that_a_stage_computes_with_is_behind_it() -> None:
    found = sources("train")
    expected = {"training.loop", "training.optim", "training.losses", "drafts.eagle3", "drafts.dflash", "data.packing"}
    assert {f"speculators.{name}" for name in (*expected, "features.shards", "config.algorithms")} <= found.keys()
    assert "speculators/ops/attention.cpp" in found
    assert not [name for name in behind("speculators.stages.tokenize") if "training" in name or "drafts" in name]
    assert not [name for name in found if ".runner" in name or name == "speculators.job"]


def test_code_moves_a_digest_and_words_about_it_do_not() -> None:
    code = 'RATE = 0.95\n\n\ndef f(x: int) -> int:\n    return x * 2 if x else {"a": None}\n'
    said = '"""What."""\n\nRATE = 0.95\n"""Of it."""\n\n\ndef f(x: int) -> int:\n    """Doc."""\n    # why\n'
    said += '    return x * 2 if x else {\n        "a": None,\n    }\n'
    assert digest(code) == digest(said)
    for old, new in (("0.95", "0.5"), ("x * 2", "x + 2"), ("None", "False"), ('"a"', '"b"'), ("if x", "if not x")):
        assert digest(code) != digest(code.replace(old, new)), new
    assert digest("b[a[1:]:2]") != digest("b[a[1:2]:]"), "the end of a node counts"
    assert digest_of_cpp("int a = 1;  // one\n") == digest_of_cpp("int a =\n  1; /* it\nis */")
    assert digest_of_cpp("int a = 1;") != digest_of_cpp("int a = 2;")
