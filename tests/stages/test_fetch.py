from __future__ import annotations

import json
from pathlib import Path

import pytest

from speculators.errors import SourceError
from speculators.stages.fetch import check_checkpoint

WHOLE = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}


def directory(tmp_path: Path, **files: str) -> Path:
    for name, content in (WHOLE | files).items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_checkpoint_with_configuration_weights_and_tokenizer_passes(tmp_path: Path) -> None:
    check_checkpoint(directory(tmp_path))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("model.safetensors", r"has no \*\.safetensors"),
        ("tokenizer.json", r"has no tokenizer"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused_by_name(tmp_path: Path, missing: str, message: str) -> None:
    path = directory(tmp_path)
    (path / missing).unlink()
    with pytest.raises(SourceError, match=message):
        check_checkpoint(path)


def test_a_missing_tokenizer_comes_with_the_way_to_save_one(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(SourceError) as caught:
        check_checkpoint(path)
    assert "save_pretrained" in caught.value.hint


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    path = directory(tmp_path, **{"model.safetensors.index.json": json.dumps(index)})
    with pytest.raises(SourceError, match=r"lacks model-00002\.safetensors"):
        check_checkpoint(path)
