"""The way of hidden states from a server to a stage: whole or not yet there, wherever their directory is mounted."""

from __future__ import annotations

import asyncio
import fcntl
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speculators.engine.transfer import FileTransfer, announced_transfer
from speculators.errors import ServiceError, StageError


def written(path: Path, **more: torch.Tensor) -> None:
    save_file({"hidden_states": torch.ones(2, 1, 4), "token_ids": torch.tensor([1, 2]), **more}, path)


def test_a_file_under_a_lock_is_there_when_the_lock_is_given_back_and_both_go_when_it_is_taken(tmp_path: Path) -> None:
    file = announced_transfer({"hidden_states_path": "/server/cmpl-1.safetensors"}, tmp_path, None, "row 3")
    assert isinstance(file, FileTransfer)
    assert file.path == tmp_path / "cmpl-1.safetensors"
    assert not asyncio.run(file.complete()), "neither the file nor its lock can be seen yet"
    with Path(f"{file.path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.path.write_bytes(b"half of it")
        assert not asyncio.run(file.complete())
        written(file.path)
    assert asyncio.run(file.complete())
    ids, states = file.load()
    assert (ids.tolist(), states.shape) == ([1, 2], (2, 1, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_given_back_without_a_file_is_a_failure_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "x.lock").touch()
    with pytest.raises(StageError, match="could not write the hidden states of row 3"):
        asyncio.run(FileTransfer(tmp_path / "x", "row 3", tmp_path / "x.lock").complete())
    assert list(tmp_path.iterdir()) == []


def test_float8_with_one_scale_over_all_layers_is_read_as_bfloat16(tmp_path: Path) -> None:
    scales = torch.tensor([0.5, 4.0]).view(2, 1, 1)
    save_file(
        {
            "hidden_states": torch.ones(2, 3, 4).to(torch.float8_e4m3fn),
            "hidden_states_scales": scales,
            "token_ids": torch.tensor([1, 2]),
        },
        tmp_path / "x",
    )
    _, states = FileTransfer(tmp_path / "x").load()
    assert states.dtype is torch.bfloat16
    assert torch.equal(states, scales.expand(2, 3, 4).bfloat16())


def test_the_path_that_a_server_says_counts_only_where_nobody_says_what_its_directory_is_called_here(
    tmp_path: Path,
) -> None:
    said = {"hidden_states_path": "/server/x.safetensors"}
    elsewhere = announced_transfer(said, tmp_path / "not-here", None, "row 3")
    assert isinstance(elsewhere, FileTransfer)
    assert elsewhere.path == Path("/server/x.safetensors")
    ours = announced_transfer({"hidden_states_file": "../../x.safetensors"}, tmp_path, None, "row 3")
    assert ours == FileTransfer(tmp_path / "x.safetensors", "row 3")
    assert announced_transfer({}, tmp_path, None, "row 3") is None


def test_a_directory_that_cannot_be_seen_is_named_at_once_with_what_to_set(tmp_path: Path) -> None:
    assert FileTransfer(tmp_path / "x").access_error("http://gpu-7:8000") is None
    problem = FileTransfer(Path("/mnt/none/x"), "row 3").access_error("http://gpu-7:8000")
    assert isinstance(problem, ServiceError)
    assert re.search("gpu-7:8000 wrote the hidden states of row 3 to x, .*/mnt/none", problem.message)
    assert problem.hint.startswith("serve.hidden_states_dir=DIRECTORY")
