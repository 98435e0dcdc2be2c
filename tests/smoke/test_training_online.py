"""Training from the live engine: the same batches as from files, the same losses but for rounding, over a lost server.

The tests of this module are one story and run in order, in the store that `test_pipeline` leaves.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.smoke.world import World, gone, wait_for

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]


def trained(world: World) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What the last run's training says at its end, its metrics, and its record."""
    path = Path(world.last_run()["steps"]["train"]["path"])
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((path.parent / "artifact.json").read_text())["record"]
    return json.loads((path / "summary.json").read_text()), metrics, record


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def server_of(world: World) -> int | None:
    for pid in world.processes():
        if "vllm.entrypoints.openai.api_server" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            return pid
    return None


def test_online_trains_on_the_batches_of_offline_with_its_losses(world: World) -> None:
    results = {}
    for pipeline in ("offline", "online"):
        code, _, err = world.run(f"pipeline={pipeline}", "until=train")
        assert code == 0, err
        results[pipeline] = trained(world)
    (offline, files, _), (online, live, record) = results["offline"], results["online"]
    assert {n: offline[n] for n in ("steps", "tokens", "rows")} == {n: online[n] for n in ("steps", "tokens", "rows")}
    assert losses(live) == pytest.approx(losses(files), rel=0.02)
    assert online["validation"]["acceptance_length"] == pytest.approx(
        offline["validation"]["acceptance_length"], abs=0.05
    )
    assert record["prefilled_tokens"] > 0
    assert 0 <= record["seconds_waited"] <= record["seconds_in_steps"]
    assert gone(world)


def test_hybrid_loses_its_server_on_the_way_goes_on_and_prefills_no_row_again(world: World) -> None:
    process = world.start("pipeline=hybrid", "until=train", "train.seed=1", "train.states_memory_gib=0")
    scratch = wait_for(lambda: world.scratch("train"), process)
    wait_for(lambda: list(scratch.glob("step-*/sealed.json")), process)
    pid = server_of(world)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 0, err
    events = world.last_run()["events"]
    assert len([e for e in events if e["event"] == "stage.retried" and e["node"] == "train"]) == 1
    summary, _, record = trained(world)
    assert record["found_rows"] > 0
    assert record["found_rows"] + record["prefilled_rows"] == record["kept_rows"]
    assert record["kept_rows"] <= summary["rows"] + summary["validation_rows"]
    assert gone(world)
