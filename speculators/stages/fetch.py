"""fetch: a name -> files. Bring a target or a data set here once, whatever it is named by."""

from __future__ import annotations

import json
from pathlib import Path

from speculators.data import sources
from speculators.errors import SourceError
from speculators.job import Job

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Any one of these makes a tokenizer."""


def main(job: Job) -> None:
    """Fetch `derived["source"]` as a data file or, with a GGUF file dequantised, as a checkpoint directory."""
    source = job.derived["source"]
    job.record["source"] = source
    if job.derived["as"] == "file":
        path = sources.fetch(source, job.output, job.scratch)
        job.record["bytes"] = path.stat().st_size
        return
    if source["file"] is None:
        sources.fetch(source, job.output, job.scratch)
    else:
        _fetch_gguf(job)
    check_checkpoint(job.output)


def _fetch_gguf(job: Job) -> None:
    from speculators.targets.gguf import dequantize_gguf

    if not job.derived["source"]["file"].endswith(".gguf"):
        raise SourceError(
            f"{job.derived['source']['file']} is not a GGUF file, the only single file that a target can be",
            "name a whole repository, or a local checkpoint directory",
        )
    gguf = sources.fetch(job.derived["source"], job.scratch, job.scratch)
    job.record["dequantised"] = {"file": gguf.name, "bytes": gguf.stat().st_size, "to": "bfloat16"}
    dequantize_gguf(gguf, job.output)
    gguf.unlink()


def check_checkpoint(directory: Path) -> None:
    """Raise a SourceError unless `directory` has what a target needs: configuration, weights, tokenizer."""
    config = directory / "config.json"
    if not config.is_file():
        raise SourceError(f"{directory} has no config.json", "name a transformers checkpoint")
    if not any(directory.glob("*.safetensors")):
        raise SourceError(
            f"{directory} has no *.safetensors",
            "name a checkpoint in safetensors; other formats of weights are not read",
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in named if not (directory / name).is_file()):
            raise SourceError(f"{directory} lacks {', '.join(missing)}, which its index names", "fetch it again, whole")
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise SourceError(
            f"{directory} has no tokenizer ({', '.join(TOKENIZERS)})",
            "save the tokenizer beside the weights: AutoTokenizer.from_pretrained(ID).save_pretrained(DIRECTORY)",
        )
