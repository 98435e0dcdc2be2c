"""The tree in docs/contributing.md has every folder and module at the top of the package, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tree_lists_the_package() -> None:
    tree = (ROOT / "docs/contributing.md").read_text().split("## The tree")[1].split("\n## ")[0]
    listed = re.findall(r"^      (\w+(?:/|\.py))\s", tree, re.MULTILINE)
    entries = [path for path in (ROOT / "speculators").iterdir() if not path.name.startswith(("_", "."))]
    assert sorted(listed) == sorted(f"{path.name}/" if path.is_dir() else path.name for path in entries)
    for folder in re.findall(r"^    (\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()
