"""The connector's own parts, where vLLM is installed: reading the paged cache, and files whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="vLLM is not installed here")

from vllm.v1.kv_cache_interface import FullAttentionSpec, HiddenStateCacheSpec

from speculators.engine import connector
from speculators.features.encoding import dequantize


def test_tokens_are_read_out_of_a_paged_cache() -> None:
    blocks, layers, size, width = 7, 3, 4, 5
    cache = torch.arange(blocks * layers * size * width, dtype=torch.float32).view(blocks, layers, size, width)
    owned, tokens = [5, 2, 6], 10
    position = torch.arange(tokens)
    rows = connector._gather_tokens(cache, torch.tensor(owned)[position // size], position % size)
    assert rows.shape == (tokens, layers, width)
    assert rows.is_contiguous()
    for token in range(tokens):
        for layer in range(layers):
            assert torch.equal(rows[token, layer], cache[owned[token // size], layer, token % size])


def test_rows_are_a_copy_so_that_blocks_can_be_used_again() -> None:
    cache = torch.ones(2, 1, 4, 3)
    rows = connector._gather_tokens(cache, torch.tensor([1, 1]), torch.tensor([0, 1]))
    cache.zero_()
    assert bool((rows == 1).all())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    states = torch.randn(3, 2, 4)
    connector._write(tmp_path / "x.safetensors", {"hidden_states": states}, [7, 8, 9], None)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors["hidden_states"], states)
    assert tensors["token_ids"].dtype == torch.int64
    assert tensors["token_ids"].tolist() == [7, 8, 9]


def test_a_failed_write_leaves_the_reason_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(connector, "save_file", full)
    with caplog.at_level(logging.ERROR):
        connector._write(tmp_path / "x.safetensors", {"hidden_states": torch.zeros(1, 1, 1)}, [7], None)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.error"]
    assert "No space left on device" in (tmp_path / "x.safetensors.error").read_text()


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_states_leave_in_float8_and_their_type_with_the_scales(computed: torch.dtype) -> None:
    states = torch.randn(5, 3, 16).to(computed)
    assert connector._should_quantize("float8_e4m3fn", computed)
    leaving = connector._encode(states, True)
    assert leaving["hidden_states"].dtype is torch.float8_e4m3fn
    assert dequantize(leaving["hidden_states"], leaving["scales"]).dtype is computed
    assert torch.equal(connector._encode(states, False)["hidden_states"], states)


def test_a_type_that_states_cannot_leave_in_is_refused() -> None:
    assert not connector._should_quantize(None, torch.float16)
    for wanted, computed in (("float8_e4m3fn", torch.float16), ("int8", torch.bfloat16)):
        with pytest.raises(ValueError, match=f"dtype is {wanted} and the target computes in {computed}"):
            connector._should_quantize(wanted, computed)


@pytest.mark.parametrize(("kinds", "group"), [(("full", "states"), 1), (("states", "full"), 0), (("full",), 0)])
def test_the_group_of_the_states_is_found(kinds: tuple[str, ...], group: int) -> None:
    assert connector._hidden_states_group(groups(*kinds)) == group


@pytest.mark.parametrize("kinds", [("full", "full"), ("states", "states")])
def test_an_ambiguous_group_is_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="KV cache groups hold hidden states, expected 1"):
        connector._hidden_states_group(groups(*kinds))


@pytest.mark.parametrize(
    ("layers", "tensor_rank", "last_stage", "writes"),
    [(["a"], 0, True, True), (["a"], 1, True, False), ([], 0, False, False), ([], 1, False, False)],
)
def test_one_rank_writes_the_first_of_the_last_stage(
    layers: list[str], tensor_rank: int, last_stage: bool, writes: bool
) -> None:
    assert connector._writes(layers, tensor_rank, last_stage) is writes


@pytest.mark.parametrize(("layers", "last_stage"), [([], True), (["a", "b"], True), (["a"], False)])
def test_a_cache_of_states_on_the_wrong_stage_is_refused(layers: list[str], last_stage: bool) -> None:
    with pytest.raises(ValueError, match=f"{int(last_stage)} layers should keep hidden states on "):
        connector._writes(layers, 0, last_stage)


def test_stages_that_do_not_hand_their_states_on_are_refused() -> None:
    connector._check_pipeline_parallelism(1, False)
    connector._check_pipeline_parallelism(4, True)
    with pytest.raises(ValueError, match=r"4 stages\) need vLLM's model runner V2"):
        connector._check_pipeline_parallelism(4, False)


def groups(*kinds: str) -> SimpleNamespace:
    specs = {"full": FullAttentionSpec, "states": HiddenStateCacheSpec}
    made = [object.__new__(specs[kind]) for kind in kinds]
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in made])
