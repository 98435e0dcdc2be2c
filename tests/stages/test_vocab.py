from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from speculators.config.schema import Config
from speculators.errors import ContractError
from speculators.stages import vocab
from speculators.stages.vocab import mapping, most_frequent, target_vocabulary
from tests.stages.jobs import make_job


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text('{"vocab_size": 8}')
    return tmp_path / "target"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Supervised: 5 three times, 2 and 7 once. Not supervised: 0 four times."""
    rows = {"input_ids": [[0, 0, 5, 5], [0, 0, 7, 2, 5]], "loss_mask": [[0, 0, 1, 1], [0, 0, 1, 1, 1]]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "tokens")
    return tmp_path / "tokens"


def run(
    tmp_path: Path, target: Path, tokens: Path, size: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    config = Config()
    config.vocab.size = size
    job = make_job("vocab", tmp_path / "w", config, tokens=tokens, target=target)
    vocab.main(job)
    return load_file(job.output / "vocab.safetensors"), json.loads((job.output / "coverage.json").read_text())


def test_the_most_frequent_supervised_tokens_are_taken_and_ties_go_to_the_lower_id(
    tmp_path: Path, target: Path, tokens: Path
) -> None:
    tensors, coverage = run(tmp_path, target, tokens, 2)
    assert tensors["d2t"].dtype == torch.int64
    assert (torch.arange(2) + tensors["d2t"]).tolist() == [2, 5]  # 7 is as frequent as 2
    assert tensors["t2d"].tolist() == [False, False, True, False, False, True, False, False]
    assert coverage["share"] == 4 / 5
    assert coverage["supervised_tokens"] == 5
    assert coverage["distinct_tokens"] == 3


def test_a_vocabulary_larger_than_what_was_seen_is_filled_with_the_lowest_ids(
    tmp_path: Path, target: Path, tokens: Path
) -> None:
    tensors, coverage = run(tmp_path, target, tokens, 5)
    assert (torch.arange(5) + tensors["d2t"]).tolist() == [0, 1, 2, 5, 7]
    assert coverage["never_seen_but_included"] == 2
    assert coverage["share"] == 1


@pytest.mark.parametrize("size", [None, 8, 100])
def test_no_size_or_one_of_the_target_s_or_more_keeps_the_whole_vocabulary(
    tmp_path: Path, target: Path, tokens: Path, size: int | None
) -> None:
    tensors, _ = run(tmp_path, target, tokens, size)
    assert tensors["d2t"].tolist() == [0] * 8
    assert tensors["t2d"].all()


def test_tokens_beyond_the_target_s_vocabulary_do_not_belong_to_it(tmp_path: Path, target: Path, tokens: Path) -> None:
    (target / "config.json").write_text('{"vocab_size": 6}')
    with pytest.raises(ContractError, match="token id 7 exceeds the target's last one, 5"):
        run(tmp_path, target, tokens, 4)


def test_the_text_config_of_a_multimodal_target_counts(target: Path) -> None:
    (target / "config.json").write_text('{"text_config": {"vocab_size": 11}, "vocab_size": 8}')
    assert target_vocabulary(target) == 11


def test_the_mapping_leads_back_from_every_chosen_id() -> None:
    counts = np.array([3, 0, 9, 9, 1, 0])
    chosen = most_frequent(counts, 3)
    assert chosen.tolist() == [0, 2, 3]
    d2t, t2d = mapping(chosen, 6)
    assert d2t.tolist() == [0, 1, 1]
    assert t2d.nonzero().flatten().tolist() == (torch.arange(3) + d2t).tolist()
