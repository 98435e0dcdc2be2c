"""extract against a server that misbehaves: bad rows stop it or are left out and counted, and sealed shards stay."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from speculators import timeouts
from speculators.config.choices import Dtype, OnBadRow
from speculators.config.schema import Config
from speculators.data.packing import RowSlice
from speculators.engine import pool
from speculators.errors import ContractError, RunError, ServiceError, StageError
from speculators.features import shards
from speculators.features.contract import check_contract
from speculators.features.dataloader import DataLoader, ShardSource
from speculators.features.shards import ShardReader
from speculators.features.writer import SKIPPED
from speculators.job import Endpoint, Job, ReusableRows
from speculators.stages.extract import main
from speculators.targets.fidelity_check import GREEDY_TOKENS_FILE, read_greedy_tokens
from tests.stages.jobs import make_job
from tests.stages.states_server import WIDTH, StatesServer, states_of

ROWS = [[row + 10, *range(2, 12)] for row in range(30)]
"""Row r begins with the token r + 10, by which the server knows it."""

Start = Callable[..., StatesServer]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(timeouts, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(pool, "FIRST_PROBE_SECONDS", 0.02)
    servers: list[StatesServer] = []

    def start(trouble: dict[int, str] | None = None) -> StatesServer:
        directory = tmp_path / f"states{len(servers)}"
        directory.mkdir()
        servers.append(StatesServer(directory, trouble))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def job_in(
    root: Path, config: Config, server: StatesServer, *, name: str = "work", skip: bool = False,
    last_state: str = "everywhere", rows: Sequence[list[int]] = ROWS,
) -> Job:  # fmt: skip
    """A job over rows of the length of `ROWS`; a second one in the same directory is the next attempt."""
    if not (root / "tokens").exists():
        table = [
            {"input_ids": ids, "loss_mask": [0] * 7 + [1] * 4, "seq_len": len(ids), "id": f"c{i}"}
            for i, ids in enumerate(rows)
        ]
        datasets.Dataset.from_list(table).save_to_disk(root / "tokens")
        (root / "target").mkdir()
        (root / "target/config.json").write_text(json.dumps({"hidden_size": WIDTH}))
    config.target.min_greedy_agreement, config.target.dtype = 0.0, Dtype.bfloat16
    config.extract.shard_tokens, config.extract.concurrency, config.extract.retries = 60, 4, 1
    config.extract.on_bad_row = OnBadRow.skip if skip else OnBadRow.error
    job = make_job("extract", root / name, config, tokens=root / "tokens", target=root / "target")
    job.derived |= {"layer_ids": [2], "capture_layer_ids": [2, 4], "last_state": last_state}
    job.digests |= {"target": "t", "tokens": "k"}
    job.services["target"] = Endpoint(
        url=server.url, model="m", api_key="k", mode="extract", directory=server.directory, log=root / "server.log"
    )
    return job


def test_every_row_is_kept_with_its_own_states_and_nothing_else_is_left(
    tmp_path: Path, config: Config, serve: Start
) -> None:
    server = serve()
    job = job_in(tmp_path, config, server)
    main(job)
    reader = ShardReader(job.output)
    assert reader.rows == list(range(30))
    assert all(torch.equal(reader.hidden_states(row), states_of(ROWS[row])) for row in reader.rows)
    assert list(server.directory.iterdir()) == []
    assert (job.output / GREEDY_TOKENS_FILE).exists()
    assert not (job.output / SKIPPED).exists()
    assert (job.record["rows"], job.record["tokens"], "skipped" in job.record) == (30, 330, False)


def test_the_last_layer_is_kept_where_an_answer_is_predicted_and_where_the_gate_looks(
    tmp_path: Path, config: Config, serve: Start
) -> None:
    server = serve()
    main(everywhere := job_in(tmp_path, config, server, name="everywhere"))
    main(job := job_in(tmp_path, config, server, last_state="answers"))
    reader, picks = ShardReader(job.output), {pick.row: pick.position for pick in read_greedy_tokens(job.output)}
    assert len(picks) == 30
    for row in reader.rows:
        wanted = states_of(ROWS[row])
        wanted[[place for place in range(6) if place != picks[row]], 1] = torch.nan
        torch.testing.assert_close(reader.hidden_states(row), wanted, rtol=0, atol=0, equal_nan=True)
    parts = [part_in(tmp_path, config, serve(), part, last_state="answers") for part in (0, 1)]
    for part in parts:
        main(part)
    main(whole := joining(tmp_path, config, server, *parts, last_state="answers"))
    assert files(whole.output) == files(job.output)
    with pytest.raises(ContractError, match='last_state is "answers", expected "everywhere"'):
        check_contract(reader.contract, ShardReader(everywhere.output).contract)
    corpus = DataLoader(job.inputs["tokens"], ShardSource(reader))
    pack = corpus.pack([RowSlice(3, 0, 11), RowSlice(20, 0, 9)], torch.device("cpu"))
    places = pack.loss_mask.nonzero()[:, 0]
    states = torch.cat([states_of(ROWS[3]), states_of(ROWS[20][:9])])
    assert torch.equal(pack.last_hidden_states[pack.last_index[places]], states[places, 1])
    corpus.supervise_all([3])
    with pytest.raises(ContractError, match=r"last layer was not kept where rows 3 \(conversation c3\)"):
        corpus.pack([RowSlice(3, 0, 11)], torch.device("cpu"))


@pytest.mark.parametrize(
    ("stored", "wanted", "requested"),
    [("everywhere", "everywhere", 1), ("everywhere", "answers", 1), ("answers", "everywhere", 25)],
)
def test_rows_with_tokens_of_an_earlier_artifact_are_copied(
    tmp_path: Path, config: Config, serve: Start, stored: str, wanted: str, requested: int
) -> None:
    server, new = serve(), [99, *range(2, 12)]
    main(earlier := job_in(tmp_path, config, server, last_state=stored))
    other = tmp_path / "other"
    rows = [ROWS[4], new, *ROWS[7:]]
    main(fresh := job_in(other, config, server, name="fresh", rows=rows, last_state=wanted))
    server.asked.clear()
    job = job_in(other, config, server, last_state=wanted)
    job.reuse = [ReusableRows(hidden_states=tmp_path / "gone"), ReusableRows(hidden_states=earlier.output)]
    main(job)
    assert (len(server.asked), job.record["reused"]) == (requested, 25 - requested)
    assert new in server.asked
    assert files(job.output) == files(fresh.output)


@pytest.mark.parametrize("connector", ["example", "fp8"])
def test_stock_connectors_give_the_same_rows_and_leave_nothing_behind(
    tmp_path: Path, config: Config, serve: Start, connector: str
) -> None:
    main(ours := job_in(tmp_path, config, serve(), name="ours"))
    broken, server = serve({18: "unwritten"}), serve()
    broken.connector = server.connector = connector
    with pytest.raises(StageError, match="the server could not write the hidden states of row 8"):
        main(job_in(tmp_path, config, broken))  # what is in flight then goes with the server
    main(job := job_in(tmp_path, config, server))
    assert list(server.directory.iterdir()) == []
    if connector == "example":
        assert files(job.output) == files(ours.output)
    else:
        reader = ShardReader(job.output)
        assert all(torch.allclose(reader.hidden_states(row), states_of(ROWS[row]), rtol=0.08) for row in reader.rows)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("nan", StageError, r"row 7: the target's hidden states are not finite \(captured layers number \[0\]\)"),
        ("truncated", StageError, "row 7: the hidden states in .* cannot be read"),
        ("tokens", ContractError, "row 7: the server exported the hidden states of other tokens"),
        ("layers", ContractError, r"the hidden states of row 7 have shape \[11, 1, 8\], expected \[11, 2, 8\]"),
        ("dtype", ContractError, "row 7: the server computes in torch.float32"),
        ("unwritten", StageError, "could not write the hidden states of row 7: OSError: No space left on device"),
        ("refused", StageError, "the server refuses row 7: too long"),
    ],
)
def test_a_bad_row_stops_or_is_left_out_as_the_recipe_says(
    tmp_path: Path, config: Config, serve: Start, trouble: str, kind: type[RunError], message: str
) -> None:
    server = serve({17: trouble})
    with pytest.raises(kind, match=message):
        main(job_in(tmp_path, config, server))
    job = job_in(tmp_path, config, server, name="skipping", skip=True)
    main(job)
    assert ShardReader(job.output).rows == [row for row in range(30) if row != 7]
    assert (job.record["rows"], job.record["tokens"]) == (29, 29 * 11)
    assert (job.record["skipped"], job.record["skipped_rows"]) == (1, [7])
    assert "1 rows were left out because their hidden states cannot be used, row 7: " in job.record["notes"][0]
    assert list(json.loads((job.output / SKIPPED).read_text())) == ["7"]


def test_rows_that_are_left_out_are_not_trained_on_and_others_may_not_be_missing(
    tmp_path: Path, config: Config, serve: Start
) -> None:
    job = job_in(tmp_path, config, serve({17: "nan"}), skip=True)
    main(job)
    corpus = DataLoader(job.inputs["tokens"], ShardSource(ShardReader(job.output)))
    rows, held = corpus.split(0.3)
    assert sorted([*rows, *held]) == [row for row in range(30) if row != 7]
    (job.output / SKIPPED).unlink()
    with pytest.raises(ContractError, match="29 rows, and tokens of 30"):
        DataLoader(job.inputs["tokens"], ShardSource(ShardReader(job.output)))


def test_too_many_bad_rows_are_not_the_rows_fault(tmp_path: Path, config: Config, serve: Start) -> None:
    server = serve({row + 10: "nan" for row in range(3, 30)})
    job = job_in(tmp_path, config, server, skip=True)
    with pytest.raises(StageError, match=r"of 5 rows cannot be used, after 8 rows; the last: row 7: .* not finite"):
        main(job)
    assert not (job.output / SKIPPED).exists()
    server.trouble = {}
    again = job_in(tmp_path, config, server, skip=True)
    main(again)
    assert again.record["rows"] == 30


def test_a_row_that_was_left_out_stays_out_when_the_stage_goes_on(tmp_path: Path, config: Config, serve: Start) -> None:
    server = serve({11: "nan"})
    server.dies_after = 20
    with pytest.raises(ServiceError, match=r"refuses connections|stopped while"):
        main(job_in(tmp_path, config, server, skip=True))
    other = serve()
    job = job_in(tmp_path, config, other, skip=True)
    main(job)
    assert ROWS[1] not in other.asked
    assert (job.record["rows"], job.record["skipped_rows"]) == (29, [1])


def test_a_server_that_is_killed_costs_only_what_was_not_sealed(tmp_path: Path, config: Config, serve: Start) -> None:
    main(straight := job_in(tmp_path, config, serve(), name="straight"))
    server = serve()
    server.dies_after = 20
    with pytest.raises(ServiceError, match=r"refuses connections|stopped while"):
        main(job_in(tmp_path, config, server))
    sealed = len(list((tmp_path / "work/data").glob("shard-*")))
    assert sealed > 0
    main(again := job_in(tmp_path, config, other := serve()))
    assert again.record["resumed"] == len(ROWS) - len(other.asked) > 0
    assert files(again.output) == files(straight.output)


def test_a_disk_that_fills_up_costs_only_the_shard_that_was_being_written(
    tmp_path: Path, config: Config, serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    main(straight := job_in(tmp_path, config, server, name="straight"))
    write, written = shards.write_safetensors, []

    def full(path: Path, *args: Any) -> str:
        written.append(path)
        digest = write(path, *args)
        if len(written) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return digest

    monkeypatch.setattr(shards, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        main(job_in(tmp_path, config, server))
    monkeypatch.undo()
    main(again := job_in(tmp_path, config, other := serve()))
    assert again.record["resumed"] == 12
    assert sorted(other.asked) == sorted(ROWS[12:])
    assert files(again.output) == files(straight.output)


def part_in(
    root: Path, config: Config, server: StatesServer, part: int, *, skip: bool = False, last_state: str = "everywhere"
) -> Job:
    """One of two workers' parts of `ROWS`."""
    job = job_in(root, config, server, name=f"part-{part}", skip=skip, last_state=last_state)
    job.derived["part"] = [part, 2]
    return job


def joining(
    root: Path, config: Config, server: StatesServer, *parts: Job, name: str = "joined", last_state: str = "everywhere"
) -> Job:
    job = job_in(root, config, server, name=name, last_state=last_state)
    job.inputs |= {f"part.{i:05d}": part.output for i, part in enumerate(parts)}
    return job


def test_what_two_workers_make_is_byte_for_byte_what_one_makes(tmp_path: Path, config: Config, serve: Start) -> None:
    main(one := job_in(tmp_path, config, serve(), name="one"))
    servers = [serve(), serve()]
    parts = [part_in(tmp_path, config, server, part) for part, server in enumerate(servers)]
    for part in parts:
        main(part)
    assert [len(server.asked) for server in servers] == [12, 18], "two shards and three"
    job = joining(tmp_path, config, servers[0], *parts)
    (job.output / "shard-00009.safetensors").write_bytes(b"of an attempt that was killed")
    main(job)
    assert files(job.output) == files(one.output)
    assert job.digests_written == one.digests_written
    said = {name: job.record[name] for name in ("rows", "tokens", "bytes", "resumed", "workers")}
    assert said == {**{name: one.record[name] for name in ("rows", "tokens", "bytes", "resumed")}, "workers": 2}
    shard = "shard-00000.safetensors"
    assert (job.output / shard).samefile(parts[0].output / shard), "nothing is stored twice"


def test_a_worker_that_is_killed_goes_on_at_its_last_sealed_shard(tmp_path: Path, config: Config, serve: Start) -> None:
    main(one := job_in(tmp_path, config, serve(), name="one"))
    main(first := part_in(tmp_path, config, serve(), 0))
    dying = serve()
    dying.dies_after = 9
    with pytest.raises(ServiceError, match=r"refuses connections|stopped while"):
        main(part_in(tmp_path, config, dying, 1))
    other = serve()
    main(second := part_in(tmp_path, config, other, 1))
    assert second.record["resumed"] == 18 - len(other.asked) == 6
    main(job := joining(tmp_path, config, other, first, second))
    assert files(job.output) == files(one.output)


def test_rows_that_workers_leave_out_are_left_out_of_the_whole(tmp_path: Path, config: Config, serve: Start) -> None:
    server = serve({12: "nan", 39: "nan"})
    parts = [part_in(tmp_path, config, server, part, skip=True) for part in (0, 1)]
    for part in parts:
        main(part)
    main(job := joining(tmp_path, config, server, *parts))
    reader = ShardReader(job.output)
    assert reader.rows == [row for row in range(30) if row not in (2, 29)]
    assert all(torch.equal(reader.hidden_states(row), states_of(ROWS[row])) for row in reader.rows)
    assert (job.record["skipped"], job.record["skipped_rows"]) == (2, [2, 29])
    assert list(json.loads((job.output / SKIPPED).read_text())) == ["2", "29"]


def test_parts_that_are_not_the_whole_or_of_another_target_are_not_joined(
    tmp_path: Path, config: Config, serve: Start
) -> None:
    server = serve()
    main(first := part_in(tmp_path, config, server, 0))
    with pytest.raises(ContractError, match="no worker has extracted row 12"):
        main(joining(tmp_path, config, server, first))
    other = joining(tmp_path, config, server, first, name="other")
    other.digests["target"] = "another"
    with pytest.raises(ContractError, match='target is "t", expected "another"'):
        main(other)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
