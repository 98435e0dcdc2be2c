"""Shards: rows are read as they were added, a killed writer loses one shard at most, the contract is enforced."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from speculators.errors import ContractError, StageError
from speculators.features.contract import ANSWERS, check_contract, feature_contract
from speculators.features.encoding import decode, encode
from speculators.features.io import FileReader, exceeds_page_cache
from speculators.features.prefetch import BufferPool
from speculators.features.shards import ShardReader, ShardWriter

LAYERS, WIDTH = 3, 5


def contract(**changed: object) -> dict[str, object]:
    made = feature_contract(
        target="a" * 64,
        tokens="b" * 64,
        dtype="bfloat16",
        compute_dtype="float32",
        layer_ids=[1, 2, 4],
        hidden_size=WIDTH,
    )
    return {**made, **changed}


def row_of(row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row `row`, always the same one: 4 to 10 tokens."""
    draw = torch.Generator().manual_seed(row)
    tokens = 4 + row % 7
    ids = torch.randint(0, 1000, (tokens,), generator=draw)
    return ids, torch.randn(tokens, LAYERS, WIDTH, generator=draw)


def write(directory: Path, rows: range, shard_tokens: int = 20) -> ShardWriter:
    writer = ShardWriter(directory, contract(), shard_tokens)
    for row in rows:
        if row not in writer.done:
            writer.add(row, *row_of(row))
    return writer


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_rows_come_back_in_the_stored_dtype(tmp_path: Path) -> None:
    write(tmp_path, range(12)).close()
    reader = ShardReader(tmp_path)
    assert reader.rows == list(range(12))
    assert reader.contract == contract()
    for row in reader.rows:
        ids, states = row_of(row)
        assert reader.length(row) == len(ids)
        assert torch.equal(reader.token_ids(row), ids)
        assert reader.hidden_states(row).dtype == torch.bfloat16
        assert torch.equal(reader.hidden_states(row), states.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_stored_dtype_survives(tmp_path: Path, dtype: str) -> None:
    writer = ShardWriter(tmp_path, contract(dtype=dtype), 1000)
    ids, states = row_of(3)
    writer.add(3, ids, states)
    writer.close()
    assert torch.equal(ShardReader(tmp_path).hidden_states(3), states.to(getattr(torch, dtype)))


def test_float8_comes_back_as_bfloat16_and_as_exact_as_it_is_encoded(tmp_path: Path) -> None:
    stored = contract(dtype="float8_e4m3fn")
    writer = ShardWriter(tmp_path, stored, 20)
    for row in range(12):
        writer.add(row, *row_of(row))
    writer.close()
    reader = ShardReader(tmp_path)
    assert reader.contract == stored
    for row in reader.rows:
        ids, states = row_of(row)
        assert torch.equal(reader.token_ids(row), ids)
        assert torch.equal(reader.hidden_states(row), decode(encode("row", states, "float8_e4m3fn")))
        assert reader.hidden_states(row).dtype is torch.bfloat16
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "token_ids": [22],
        "scales": [22, 2],
        "last_scales": [22],
        "states": [22, 2, 5],
        "last": [22, 5],
    }
    assert (tensors["states"].dtype, tensors["scales"].dtype) == (torch.float8_e4m3fn, torch.bfloat16)


def test_an_interrupted_writer_of_float8_ends_in_the_same_bytes(tmp_path: Path) -> None:
    for directory, attempts in (("whole", [30]), ("cut", [17, 30])):
        for rows in attempts:
            writer = ShardWriter(tmp_path / directory, contract(dtype="float8_e4m3fn"), 20)
            for row in range(rows):
                if row not in writer.done:
                    writer.add(row, *row_of(row))
        writer.close()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_row_with_a_value_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path, dtype: str) -> None:
    writer = ShardWriter(tmp_path, contract(dtype=dtype), 20)
    ids, states = row_of(0)
    states[1, 2, 3] = float("nan")
    with pytest.raises(StageError, match="row 0: the hidden states cannot be stored"):
        writer.add(0, ids, states)
    writer.add(0, *row_of(0))
    writer.close()
    assert ShardReader(tmp_path).rows == [0]


def test_a_shard_is_plain_safetensors_and_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, range(12)).close()
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as shard:
        head = json.loads(shard.metadata()["contract"])
        assert head["contract"] == contract()
        # rows of 4, 5, 6 and 7 tokens: the fourth one reaches 20
        assert head["rows"] == [
            [0, 0, 4, 0, [[0, 4]]],
            [1, 4, 5, 4, [[0, 5]]],
            [2, 9, 6, 9, [[0, 6]]],
            [3, 15, 7, 15, [[0, 7]]],
        ]
        assert shard.get_tensor("states").shape == (22, LAYERS - 1, WIDTH)
        assert shard.get_tensor("last").shape == (22, WIDTH)
        assert shard.get_tensor("token_ids").dtype == torch.int64


def test_the_index_has_the_digest_of_every_shard_and_so_has_the_writer(tmp_path: Path) -> None:
    write(tmp_path, range(9))
    writer = write(tmp_path, range(12))
    writer.close()
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")}
    assert writer.digests == found
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["file"] for shard in shards] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for shard in shards:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()


def test_an_interrupted_writer_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(30)).close()
    first = write(tmp_path / "cut", range(17))  # never closed: what a kill leaves
    assert first.done == set(range(14))
    second = ShardWriter(tmp_path / "cut", contract(), 20)
    assert second.done == first.done
    write(tmp_path / "cut", range(30)).close()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_writer_killed_while_it_seals_loses_only_that_shard(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.features.test_shards import write
real, calls = os.replace, []
def replace(source, target):
    calls.append(target)
    os.kill(os.getpid(), 9) if len(calls) == 3 else real(source, target)
os.replace = replace
write(Path(sys.argv[1]), range(30))
"""
    root = str(Path(__file__).parents[2])
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cut"), root], check=False, env=os.environ)
    assert died.returncode == -9
    assert sorted(contents(tmp_path / "cut")) == [
        ".shard-00002.safetensors",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    write(tmp_path / "cut", range(30)).close()
    write(tmp_path / "whole", range(30)).close()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_going_on_under_another_contract_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(12))
    with pytest.raises(ContractError, match=r"layer_ids is \[1, 2, 4\], expected \[1, 2, 5\]"):
        ShardWriter(tmp_path, contract(layer_ids=[1, 2, 5]), 20)


def test_every_field_that_differs_is_named() -> None:
    with pytest.raises(ContractError) as error:
        check_contract(contract(dtype="float32", target="c" * 64), contract())
    assert 'dtype is "float32", expected "bfloat16"' in error.value.message
    assert "target is" in error.value.message
    assert "hidden_size" not in error.value.message
    check_contract(contract(), {"layer_ids": [1, 2, 4], "normed": False})


def test_states_of_another_shape_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, contract(), 20)
    ids, states = row_of(0)
    with pytest.raises(ContractError, match=r"row 0 have shape \[4, 2, 5\], expected \[4, 3, 5\]"):
        writer.add(0, ids, states[:, :2])


def test_a_row_is_added_once(tmp_path: Path) -> None:
    writer = write(tmp_path, range(3))
    with pytest.raises(ValueError, match="row 2 was added before"):
        writer.add(2, *row_of(2))


def test_a_cut_off_shard_is_reported_by_name(tmp_path: Path) -> None:
    write(tmp_path, range(12)).close()
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ContractError, match=r"shard-00001\.safetensors is damaged"):
        ShardReader(tmp_path).hidden_states(5)


def test_a_shard_that_is_cut_off_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    write(tmp_path, range(12)).close()
    reader = ShardReader(tmp_path)
    reader.check()
    shard = tmp_path / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(ContractError, match=r"shard-00001\.safetensors is damaged: it was cut off"):
        [reader.hidden_states(row) for row in reader.rows]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header: header["states"].update(dtype="F16"),
        lambda header: header["states"].update(shape=[22, LAYERS - 1, WIDTH - 1]),
        lambda header: header.pop("token_ids"),
        lambda header: header.update(__metadata__={}),
        lambda header: header["states"].update(data_offsets=[0, 660]),
    ],
    ids=["dtype", "shape", "tensor", "contract", "place"],
)
def test_a_shard_that_is_not_what_its_contract_says_is_damaged(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object]
) -> None:
    write(tmp_path, range(12)).close()
    shard = tmp_path / "shard-00000.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    spoil(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ContractError, match=r"shard-00000\.safetensors is damaged"):
        ShardReader(tmp_path).check()


def test_beginnings_of_rows_are_read_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, range(12)).close()
    reader = ShardReader(tmp_path)
    into = {
        "token_ids": torch.empty(8, dtype=torch.int64),
        "states": torch.empty(8, LAYERS - 1, WIDTH, dtype=torch.bfloat16),
        "last": torch.empty(8, WIDTH, dtype=torch.bfloat16),
    }
    reader.will_need([(9, 3), (2, 5)])
    reader.fill([(9, 3), (2, 5)], into)
    assert torch.equal(into["token_ids"], torch.cat([row_of(9)[0][:3], row_of(2)[0][:5]]))
    states = torch.cat([row_of(9)[1][:3], row_of(2)[1][:5]]).bfloat16()
    assert torch.equal(into["states"], states[:, :-1])
    assert torch.equal(into["last"], states[:, -1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_last_layer_is_kept_where_it_is_asked_for(tmp_path: Path, dtype: str) -> None:
    writer = ShardWriter(tmp_path, contract(dtype=dtype, last_state=ANSWERS), 20)
    for row in range(12):
        ids, states = row_of(row)
        writer.add(row, ids, states, torch.arange(len(ids)) % 4 > (row % 3))
    writer.close()
    size = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    reader = ShardReader(tmp_path)
    for row in reader.rows:
        ids, states = row_of(row)
        kept = torch.arange(len(ids)) % 4 > (row % 3)
        wanted = decode(encode("row", states, dtype))
        wanted[~kept, -1] = torch.nan
        torch.testing.assert_close(reader.hidden_states(row), wanted, rtol=0, atol=0, equal_nan=True)
        assert reader.last_layer_mask(row, 4).tolist() == kept[:4].tolist()
    into = torch.empty(3, WIDTH, dtype=reader.layout["last"][0])
    reader.fill([(1, 4), (0, 2)], {"last": into})  # places 2 and 3 of the one, 1 of the other
    if dtype == "bfloat16":
        assert torch.equal(into, torch.stack([*row_of(1)[1][2:4, -1], row_of(0)[1][1, -1]]).bfloat16())
    again = ShardWriter(tmp_path, contract(dtype=dtype, last_state=ANSWERS), 20)
    again.close()
    assert sum(path.stat().st_size for path in tmp_path.glob("shard-*")) == size
    assert again.done == set(range(12))
    with pytest.raises(ContractError, match="last_state"):
        check_contract(reader.contract, contract(dtype=dtype))


def test_a_row_of_which_the_last_layer_is_nowhere_kept(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, contract(last_state=ANSWERS), 20)
    ids, states = row_of(0)
    writer.add(0, ids, states, torch.zeros(len(ids), dtype=torch.bool))
    writer.close()
    found = ShardReader(tmp_path).hidden_states(0)
    assert torch.equal(found[:, :-1], states[:, :-1].bfloat16())
    assert bool(found[:, -1].isnan().all())


@pytest.fixture
def long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of several blocks each, in several shards, none of which begins or ends where a sector does."""
    monkeypatch.setattr(FileReader, "BLOCK", FileReader.PAGE)
    monkeypatch.setattr(FileReader, "SMALL", 1)
    draw = torch.Generator().manual_seed(0)
    writer = ShardWriter(tmp_path, contract(), 1500)
    for row, tokens in enumerate((700, 3, 411, 900, 137)):
        writer.add(row, torch.full((tokens,), row), torch.randn(tokens, LAYERS, WIDTH, generator=draw))
    writer.close()
    return tmp_path


def direct_io(directory: Path) -> ShardReader:
    reader = ShardReader(directory, direct_io=True)
    if reader._direct_files is None:
        pytest.skip("this file system has no reads past the page cache")
    return reader


def test_past_the_cache_the_same_is_read(long_rows: Path) -> None:
    plain, past = ShardReader(long_rows), direct_io(long_rows)
    past.will_need([(row, 3) for row in past.rows])
    for row in plain.rows:
        assert torch.equal(past.hidden_states(row), plain.hidden_states(row))
        assert torch.equal(past.token_ids(row), plain.token_ids(row))
    parts = [(3, 899), (0, 1), (2, 411), (1, 2)]
    found = [torch.empty(1313, LAYERS - 1, WIDTH, dtype=torch.bfloat16) for _ in range(2)]
    for reader, states in zip((plain, past), found, strict=True):
        reader.fill(parts, {"states": states})
    assert torch.equal(*found)


@pytest.fixture
def wide_rows(tmp_path: Path) -> Path:
    """Rows of which every token takes whole sectors."""
    writer = ShardWriter(tmp_path, contract(hidden_size=256, last_state=ANSWERS), 500)
    draw = torch.Generator().manual_seed(0)
    for row, tokens in enumerate((700, 3, 411, 900, 137)):
        states = torch.randn(tokens, LAYERS, 256, generator=draw)
        writer.add(row, torch.full((tokens,), row), states, torch.arange(tokens) > tokens // 3)
    writer.close()
    return tmp_path


def read_wide(reader: ShardReader) -> dict[str, torch.Tensor]:
    parts = [(3, 899), (0, 1), (2, 411), (1, 2)]
    places = sum(int(reader.last_layer_mask(row, tokens).sum()) for row, tokens in parts)
    into = BufferPool().empty(
        {"states": (torch.bfloat16, (1313, LAYERS - 1, 256)), "last": (torch.bfloat16, (places, 256))}
    )
    reader.fill(parts, into)
    return into


def test_whole_sectors_are_read_straight_into_their_place(wide_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past, wanted = direct_io(wide_rows), read_wide(ShardReader(wide_rows))
    monkeypatch.setattr(FileReader, "_buffer", lambda self: pytest.fail("they went through memory of ours"))
    found = read_wide(past)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_disk_of_larger_sectors_is_read_in_those(wide_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past, wanted, real = direct_io(wide_rows), read_wide(ShardReader(wide_rows)), os.preadv
    direct = past._direct_files
    assert direct is not None

    def preadv(descriptor: int, rooms: list[memoryview], offset: int) -> int:
        pages = not (offset | np.frombuffer(rooms[0], np.uint8).ctypes.data | len(rooms[0])) % FileReader.PAGE
        if descriptor in [direct._files(path).descriptor for path in past._paths] and not pages:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, rooms, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    found = read_wide(past)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_past_the_cache_too_a_shard_that_is_cut_off_is_an_error(long_rows: Path) -> None:
    reader = direct_io(long_rows)
    reader.check()
    shard = long_rows / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(ContractError, match=r"shard-00001\.safetensors is damaged: it was cut off"):
        reader.hidden_states(4)


def test_a_file_system_without_such_reads_is_read_through_the_cache(
    long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    reader = ShardReader(long_rows, direct_io=True)
    assert reader._direct_files is None
    assert torch.equal(reader.hidden_states(3), ShardReader(long_rows).hidden_states(3))


def test_a_set_is_larger_than_memory_when_half_of_that_does_not_hold_it(
    long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(path.stat().st_size for path in long_rows.glob("shard-*"))
    for pages, larger in ((2 * total, False), (2 * total - 2, True)):
        monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}.__getitem__)
        assert exceeds_page_cache(long_rows) is larger


def test_readers_that_share_their_files_keep_few_of_them_open(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / name, range(12), shard_tokens=8).close()
    reading = FileReader(3)
    readers = [ShardReader(tmp_path / name, reading) for name in "abcd"]
    before = len(os.listdir("/proc/self/fd"))
    for row in range(12):
        for reader in readers:
            assert torch.equal(reader.token_ids(row), row_of(row)[0])
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    del reading, readers, reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_missing_row_and_a_missing_index_are_reported(tmp_path: Path) -> None:
    write(tmp_path, range(12))
    with pytest.raises(ContractError, match=r"no index\.json"):
        ShardReader(tmp_path)
    write(tmp_path, range(12)).close()
    with pytest.raises(ContractError, match="no hidden states of row 12"):
        ShardReader(tmp_path).hidden_states(12)


def test_reading_a_row_does_not_load_its_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, contract(hidden_size=4096), 10**9)
    for row in range(8):
        writer.add(row, torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, LAYERS, 4096))
    writer.close()  # 197 MB
    reader = ShardReader(tmp_path)

    def anonymous_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    before = anonymous_kib()
    assert reader.hidden_states(7).shape == (1000, LAYERS, 4096)
    assert anonymous_kib() - before < 60_000  # as it is stored, and as it is asked for
