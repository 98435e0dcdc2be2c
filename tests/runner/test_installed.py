"""What is installed is what importlib.metadata says, without it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from speculators.runner.installed import installed


def test_versions_are_those_of_importlib_metadata() -> None:
    found = installed()
    assert {"torch", "hydra-core", "speculators-run"} <= set(found)
    assert {name: found[name] for name in found} == {name: importlib.metadata.version(name) for name in found}


def test_names_are_normal_and_the_first_place_counts(tmp_path: Path) -> None:
    for name in ("a/Zope.Deep_name-1.0+cpu.dist-info", "b/zope_deep.name-2.0.dist-info", "b/old-3-py3.11.egg-info"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/no.dist-info").touch()
    places = [str(tmp_path / name) for name in ("missing", "a", "b")]
    assert installed(places) == {"zope-deep-name": "1.0+cpu", "old": "3"}
