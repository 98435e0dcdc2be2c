"""Paths of the recipes and of the choices of their config groups; finding them needs no Hydra."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def _shipped(name: str) -> Path:
    """`conf` or `recipes`: inside the package if it was installed from a wheel, next to it in a checkout."""
    in_wheel = _PACKAGE / name
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / name


CONF = _shipped("conf")
RECIPES = _shipped("recipes")


def own_conf() -> Path | None:
    """`conf/` in the working directory, whose choices are added to the shipped ones; None if there is none."""
    path = Path.cwd() / "conf"
    return path if path.is_dir() and path.resolve() != CONF.resolve() else None


def choices(group: str) -> dict[str, Path]:
    """The choices of a config group by name, the shipped ones and those of `own_conf`."""
    folders = (own_conf(), CONF)
    return {path.stem: path for folder in folders if folder for path in sorted((folder / group).glob("*.yaml"))}


def available() -> dict[str, Path]:
    """All recipes by name; one in `./recipes` takes precedence over a shipped one."""
    folders = (RECIPES, Path.cwd() / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def first_comment(path: Path) -> str:
    """The first comment line of a recipe, which describes it; empty if there is none."""
    comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((comment for comment in comments if not comment.startswith("@")), "")
