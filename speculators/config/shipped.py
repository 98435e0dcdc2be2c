"""Where recipes and the choices that they are made of lie. Looking there needs no Hydra."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def _shipped(name: str) -> Path:
    """`conf` or `recipes`: inside the package when it was installed from a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONF = _shipped("conf")
RECIPES = _shipped("recipes")


def available() -> dict[str, Path]:
    """Every recipe by name; one in `./recipes` goes before a shipped one of that name."""
    folders = (RECIPES, Path.cwd() / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
