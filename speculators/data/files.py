"""The files of a dataset: of a directory, a pattern or a repository, those of one subset and one split."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from speculators.errors import SourceError

SELECTED = "selected.json"
"""Names of the files of a dataset that was fetched, next to them, if they are several."""
_OTHER = (
    *("README*", "LICENSE*", "NOTICE*", "*.md", "*.txt", "*.py", "*.ipynb", "*.yaml", "*.yml", "*.toml", "*.sh"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.lock", "cache-*.arrow", SELECTED),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"),
)
"""What lies next to data files."""
_SHARD = re.compile(r"(?P<split>[\w.]+?)-\d{5}-of-\d{5}")
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Words in names of files -> the split that they are of, as the library `datasets` understands them."""
PATTERN = re.compile(r"[*?\[]")
"""A name with one of these characters is a pattern."""


def data_files(path: Path, subset: str | None = None, split: str | None = None) -> list[tuple[str, Path]]:
    """List the files of a dataset, each with its name below the dataset; empty for a single file.

    Args:
        path: a file, a directory, or a pattern, of which no subset is selected.

    Raises:
        SourceError: there are none, or it is open which subset or split.
    """
    if path.is_file():
        return [("", path)]
    if not path.is_dir():
        base = pattern_base(path)
        files = sorted(p for p in base.glob(str(path.relative_to(base))) if p.is_file()) if base.is_dir() else []
        if not files:
            raise SourceError(f"no file matches {path}", "check the pattern: ** stands for any directories")
        return [(file.relative_to(base).as_posix(), file) for file in files]
    if (path / SELECTED).is_file():
        names = json.loads((path / SELECTED).read_text())
    else:
        names = choose_files([p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()], subset, split)
    return [("" if len(names) == 1 else name, path / name) for name in names]


def pattern_base(path: Path) -> Path:
    """The directory before the first part of a path that is a pattern."""
    parts = path.parts
    return Path(*parts[: next((i for i, part in enumerate(parts) if PATTERN.search(part)), len(parts) - 1)])


def choose_files(
    names: Iterable[str], subset: str | None, split: str | None, card: Mapping[str, Any] | None = None
) -> list[str]:
    """Choose the data files of a subset and a split, sorted.

    The card, metadata of a repository's README.md, lists them (`configs`); else a subset is a directory, and a split
    follows from names: `train-00000-of-00002.parquet`, `test.jsonl`. Without a choice it is the only subset or the
    default one, and the only split or `train`.

    Raises:
        SourceError: there are none, or several of which none was chosen.
    """
    files = sorted(name for name in names if is_data(name))
    if not files:
        raise SourceError("there are no data files", "name a file, or a directory with JSON, CSV, Parquet or Arrow")
    configs = [config for config in (card or {}).get("configs") or [] if config.get("data_files")]
    if configs:
        return _of_config(files, configs, subset, split)
    subsets = sorted({PurePosixPath(name).parts[0] for name in files if "/" in name})
    if subset is not None:
        files = [name for name in files if subset in PurePosixPath(name).parts[:-1]]
        if not files:
            raise _no_choice("subset", subset, subsets)
    splits: dict[str, list[str]] = {}
    for name in files:
        splits.setdefault(split_of(name) or "train", []).append(name)
    return splits[_chosen("split", split, list(splits), "train")]


def is_data(name: str) -> bool:
    """Whether a file may have rows, by its name."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and not any(fnmatch.fnmatch(parts[-1], pattern) for pattern in _OTHER)


def split_of(name: str) -> str | None:
    """The split that a file is of, by its name; None if that does not show it."""
    *directories, file = PurePosixPath(name).parts
    if (shard := _SHARD.match(file)) and shard["split"] not in ("data", "part"):
        return shard["split"]
    if directories and re.fullmatch(r"\d{4,5}\.parquet", file):
        return directories[-1]
    terms = [term for part in (file, *reversed(directories)) for term in re.split(r"[^a-z]+", part.lower())]
    return next((_KEYWORDS[term] for term in terms if term in _KEYWORDS), None)


def _of_config(files: Sequence[str], configs: list[Any], subset: str | None, split: str | None) -> list[str]:
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    default = next((name for name, config in by_name.items() if config.get("default")), "default")
    data = by_name[_chosen("subset", subset, list(by_name), default)]["data_files"]
    entries = data if isinstance(data, list) and all(isinstance(entry, Mapping) for entry in data) else [{"path": data}]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        paths = entry.get("path") or []
        patterns.setdefault(entry.get("split", "train"), []).extend([paths] if isinstance(paths, str) else paths)
    split = _chosen("split", split, list(patterns), "train")
    chosen = [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in patterns[split])]
    if not chosen:
        raise SourceError(f"split {split} has no files: {', '.join(patterns[split])}", "name a file or a pattern")
    return chosen


def _chosen(what: str, name: str | None, names: list[str], default: str) -> str:
    if name is None:
        name = names[0] if len(names) == 1 else default
    if name not in names:
        raise _no_choice(what, name if name != default else None, names)
    return name


def _no_choice(what: str, name: str | None, names: Sequence[str]) -> SourceError:
    some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    problem = f"there is no {what} `{name}`" if name is not None else f"there are several {what}s"
    return SourceError(f"{problem}: {some or 'none'}", f"{what}: {names[0]}" if names else f"leave {what} out")
