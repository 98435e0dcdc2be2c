"""The whole pipeline, small, on the real engine: killed on the way, resumed by the same command, and measured; then
training from the live engine: the batches of training from files, the same losses but for rounding, over a lost server;
then, of each algorithm, a draft that knows one row by heart, served; and a copy of it, served by vLLM alone.

Target, prompts and engine are the demo's. The tests of this module are one story and run in order: each
starts from the store that the one before left.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from speculators.engine.metrics import DraftCounters, parse_counters
from speculators.features.shards import ShardReader
from speculators.runner.servers import server as servers
from tests.smoke.world import ONE_ROW, QUESTION, World, gone, lines, wait_for

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]
STAGES = ("prompts", "regenerate", "tokenize", "vocab", "extract", "train", "evaluate")


def test_a_worker_killed_in_regenerate_leaves_no_server_and_keeps_what_was_answered(world: World) -> None:
    process = world.start("run.retries=0")
    wait_for(lambda: lines(world.scratch("regenerate"), "answers.jsonl") >= 4, process)
    pid = world.worker("regenerate")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "error: regenerate was killed by SIGKILL: probably out of memory" in err
    assert "hint: " in err
    assert "Traceback" not in err.split("error: ")[0]
    assert gone(world)
    assert lines(world.scratch("regenerate"), "answers.jsonl") >= 4


def test_the_runner_killed_in_extract_takes_everything_down_with_it(world: World) -> None:
    process = world.start()
    wait_for(lambda: list((world.store / "work" / "extract").glob("*/data/shard-*.safetensors")), process)
    process.kill()
    process.communicate()
    assert gone(world)
    regenerated = next((world.store / "artifacts" / "regenerate").glob("*/*/artifact.json"))
    assert json.loads(regenerated.read_text())["record"]["resumed"] >= 4


def test_a_worker_killed_in_train_loses_no_step_that_was_sealed(world: World) -> None:
    process = world.start("run.retries=0")
    wait_for(lambda: world.scratch("train") and list(world.scratch("train").rglob("*.safetensors")), process)
    pid = world.worker("train")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == 1
    assert gone(world)
    extracted = next((world.store / "artifacts" / "extract").glob("*/*/artifact.json"))
    assert json.loads(extracted.read_text())["record"]["resumed"] > 0


def test_the_same_command_ends_in_a_measured_draft(world: World) -> None:
    code, out, err = world.run()
    assert code == 0, err
    steps = world.last_run()["steps"]
    results = json.loads((Path(steps["evaluate"]["path"]) / "evaluation.json").read_text())
    assert set(results["datasets"]) == {"human_eval", "sharegpt"}
    for measured in results["datasets"].values():
        assert measured["prompts"] == 2
        assert 1 <= measured["acceptance_length"] <= 4
        assert measured["baseline"]["tokens_per_second"] > 0
    assert results["lossless"]["faults"] == 0
    assert "speed-up" in out
    assert gone(world)


def test_the_same_command_again_finds_everything_cached_and_starts_nothing(world: World) -> None:
    runs = sorted((world.root / "runs").iterdir())
    began = time.monotonic()
    code, _, err = world.run()
    seconds = time.monotonic() - began
    assert code == 0
    assert [line.split()[1] for line in err.splitlines() if line.startswith("cached")] == list(STAGES)
    assert not [line for line in err.splitlines() if line.startswith(("started", "starting", "run "))]
    assert "all stages were cached, nothing ran" in err
    assert sorted((world.root / "runs").iterdir()) == runs
    assert seconds < 10


def test_a_changed_learning_rate_marks_train_and_what_follows(world: World) -> None:
    before = sorted(p for p in world.root.rglob("*"))
    code, out, _ = world.run("train.lr=5e-4", "--json", verb="plan")
    assert code == 0
    steps = json.loads(out)["steps"]
    assert (steps["train"]["state"], steps["train"]["reason"]) == ("run", "changed: train.lr 0.001 -> 0.0005")
    assert steps["evaluate"]["state"] == "waits"
    assert {steps[name]["state"] for name in STAGES[:5]} == {"cached"}
    assert sorted(p for p in world.root.rglob("*")) == before


def test_what_was_killed_and_resumed_has_the_bytes_of_what_was_not(world: World) -> None:
    first = world.last_run()["steps"]
    for stage in ("extract", "train"):
        artifact = Path(first[stage]["path"]).parent
        artifact.rename(world.root / f"first-{stage}")
    code, _, err = world.run()
    assert code == 0, err
    run = world.last_run()
    decided = {e["node"]: e["state"] for e in run["events"] if e["event"] == "stage.decided"}
    assert decided["extract"] == "run"
    assert decided["train"] == "run"
    assert {s: run["steps"][s]["digest"] for s in STAGES} == {s: first[s]["digest"] for s in STAGES}
    assert decided["evaluate"] == "cached"
    assert gone(world)


def test_states_taken_while_answering_are_those_of_a_prefill_up_to_rounding(world: World) -> None:
    prefilled = ShardReader(Path(world.last_run()["steps"]["extract"]["path"]))
    # Forced, or the answers of the run before would be prefilled and not answered again.
    code, _, err = world.run("pipeline=fused", "until=extract", "force=regenerate")
    assert code == 0, err
    run = world.last_run()
    assert len([e for e in run["events"] if e["event"] == "service.starting"]) == 1
    fused = ShardReader(Path(run["steps"]["extract"]["path"]))
    compared = 0
    for row in fused.rows:
        ids = fused.token_ids(row)
        if torch.equal(prefilled.token_ids(row)[: len(ids)], ids):  # else rounding has made it answer otherwise
            assert prefilled.length(row) - fused.length(row) in (0, 1)
            one, other = prefilled.hidden_states(row)[: len(ids)].float(), fused.hidden_states(row).float()
            off = (one - other).norm(dim=-1) / one.norm(dim=-1)
            assert off[~off.isnan()].max() < 0.01  # the last layer is not kept everywhere
            compared += 1
    assert compared > len(fused) / 2
    assert gone(world)


def test_what_was_answered_for_another_recipe_is_neither_asked_nor_prefilled_again(world: World) -> None:
    code, _, err = world.run("pipeline=fused", "until=regenerate", "speculator.target_layer_ids=[2,15]")
    assert code == 0, err
    run = world.last_run()
    assert [e["reason"][:18] for e in run["events"] if e.get("node") == "regenerate" and "reason" in e] == [
        "0 of 24 rows new; "
    ]
    assert not [e for e in run["events"] if e["event"].startswith("service.")]
    artifact = Path(run["steps"]["regenerate"]["path"]).parent / "artifact.json"
    record = json.loads(artifact.read_text())["record"]
    assert (record["reused"], record["answered"], record["prefilled"]) == (24, 0, 0)


def test_every_whole_conversation_of_the_cut_file_is_read_and_the_cut_is_reported(world: World) -> None:
    artifacts = (world.store / "artifacts" / "prompts").glob("*/*/artifact.json")
    records = [json.loads(path.read_text())["record"]["datasets"] for path in artifacts]
    counted = next(record["sharegpt"] for record in records if "sharegpt" in record)
    assert counted["read"] == 17671
    (damage,) = counted["damage"]
    assert damage["byte"] == 125509632
    assert damage["reason"] == "the file ends in the middle of a row"


def test_a_recipe_may_demand_that_the_cut_be_an_error(world: World) -> None:
    code, _, err = world.run("data.sharegpt.on_damage=error")
    assert code == 1
    assert "error: prompts: " in err
    assert "17671" in err
    assert "Traceback" not in err


def trained(world: World) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What the last run's training says at its end, its metrics, and its record."""
    path = Path(world.last_run("train")["steps"]["train"]["path"])
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
    assert record["reused_rows"] > 0
    assert record["reused_rows"] + record["prefilled_rows"] == record["kept_rows"]
    assert record["kept_rows"] <= summary["rows"] + summary["validation_rows"]
    assert gone(world)


DRAFTS = {
    "dflash": ("speculator=dflash", "speculator.num_layers=2", "speculator.block_size=8"),
    "eagle3": ("speculator=eagle3",),
}


@pytest.mark.parametrize("algorithm", sorted(DRAFTS))
def test_a_draft_that_knows_a_row_by_heart_is_served_as_it_was_trained(world: World, algorithm: str) -> None:
    """Wherever training and the engine differ, in a layout, a position, a layer or the template, tokens are refused."""
    code, _, err = world.run(*DRAFTS[algorithm], recipe=ONE_ROW)
    assert code == 0, err
    evaluation = json.loads((Path(world.last_run()["steps"]["evaluate"]["path"]) / "evaluation.json").read_text())
    measured, longest = evaluation["datasets"]["hub/again"], evaluation["num_speculative_tokens"] + 1
    assert measured["tokens"] == evaluation["max_tokens"]
    assert measured["identical_answers"] == 1
    assert measured["acceptance_length"] > 0.9 * longest
    assert gone(world)


def test_a_copy_of_that_draft_is_served_from_anywhere_by_the_command_that_is_printed(
    world: World, tmp_path: Path
) -> None:
    """The README's way to serve: vLLM finds target, method and number of tokens in the checkpoint alone."""
    copy = world.root / "copied" / "draft"
    shutil.copytree(world.last_run()["directory"] / "draft", copy)
    port = str(servers.free_port())
    code, out, err = world.run(str(copy), "--print", "--", "--port", port, "--enforce-eager", verb="serve", recipe="")
    assert code == 0, err
    command = shlex.split(out)
    assert {word for word in command if word.startswith("--")} == {"--model", "--host", "--port", "--enforce-eager"}
    counted, text = asyncio.run(ask_printed(command, tmp_path, f"http://127.0.0.1:{port}"))
    assert text
    assert counted.acceptance_length() > 2
    assert gone(world)


async def ask_printed(command: list[str], directory: Path, url: str) -> tuple[DraftCounters, str]:
    """Start a printed command in `directory`, ask the question, and end the server as Ctrl-C does."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # by default it takes half of the machine's memory
    assert command[0] == "python"
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *command[1:]], cwd=directory, env=environment, stdout=log, stderr=log
        )
    try:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            while server.poll() is None and not await answers(client):
                await asyncio.sleep(1)
            assert server.poll() is None, (directory / "log").read_text()[-3000:]
            question = {"messages": [{"role": "user", "content": QUESTION["prompt"]}], "temperature": 0}
            answer = await client.post("/v1/chat/completions", json={**question, "max_tokens": 48})
            counted = parse_counters((await client.get("/metrics")).text)
        server.send_signal(signal.SIGINT)
        server.wait(60)
    finally:
        server.kill()
    return counted, answer.json()["choices"][0]["message"]["content"]


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
