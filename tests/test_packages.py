"""Hints about packages: commands that work from a checkout, and from a wheel, as this package is on no index."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path

import pytest

from speculators import packages


@pytest.mark.parametrize("here", [True, False])
def test_extras_are_installed_from_the_checkout(here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "a checkout"
    tree.mkdir()
    (tree / "pyproject.toml").touch()
    monkeypatch.setattr(packages, "SOURCE_TREE", tree)
    monkeypatch.chdir(tree if here else tmp_path)
    words = shlex.split(packages.install_command("wandb", "trackio"))
    assert words[-3:] == ["install", "-e", f"{'.' if here else tree}[wandb,trackio]"]


def test_without_a_checkout_the_packages_of_an_extra_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ["hydra-core<1.4", "submitit>=1.5; extra == 'slurm'", 'sqlalchemy>=2 ; extra == "mlflow"']
    monkeypatch.setattr(packages, "SOURCE_TREE", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    assert shlex.split(packages.install_command("slurm", "mlflow"))[-3:] == [
        "install",
        "submitit>=1.5",
        "sqlalchemy>=2",
    ]
