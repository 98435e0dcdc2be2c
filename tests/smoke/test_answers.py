"""Answers on the real engine: requests sample for themselves, tools are offered, a refused conversation is a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.engine.tool_calls import calls_in_text
from tests.smoke import tiny_gemma
from tests.smoke.world import World, gone

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]
RECIPE = """# @package _global_
defaults:
  - override /target: {target}
  - override /data: []
  - override /speculator: eagle3
  - override /pipeline: offline
  - override /hardware: cpu

max_seq_len: 512
data: {{mine: {{source: {file}, format: messages}}}}
prompts: {{eval_holdout_ratio: 0, max_turns: 2}}
regenerate: {{max_tokens: 48, concurrency: 8}}
serve: {{max_num_seqs: 16, kv_cache_gib: 0.5}}
evaluate: {{datasets: []}}
"""
CALL = {"name": "find", "arguments": {"word": "harbour"}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def answers(
    world: World, name: str, rows: list[dict[str, Any]], *words: str, target: str = "smollm2_135m"
) -> tuple[list[Any], dict[str, Any], Path]:
    """Run `regenerate` over rows; gives its conversations, its record, and its directory."""
    (world.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = world.root / f"{name}.yaml"
    recipe.write_text(RECIPE.format(target=target, file=f"{name}.jsonl"))
    code, _, err = world.run("until=regenerate", *words, recipe=recipe)
    assert code == 0, err
    path = Path(world.last_run("regenerate")["steps"]["regenerate"]["path"])
    made = [json.loads(line) for line in (path / "conversations.jsonl").read_text().splitlines()]
    return made, json.loads((path.parent / "artifact.json").read_text())["record"], path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_prompts_that_differ_in_a_number_are_answered_differently_at_temperature_1(world: World) -> None:
    text = "Ticket {} is open. What is a good next step?"
    rows = [{"id": f"t{i}", "messages": [user(text.format(i))]} for i in range(48)]
    sampled = ("target.dtype=float32", "regenerate.temperature=1")
    made, _, _ = answers(world, "tickets", rows, *sampled)
    assert len({row["messages"][-1]["content"] for row in made}) >= 40
    again, _, _ = answers(world, "tickets", rows, *sampled, "force=regenerate")
    same = sum(
        one["turns"][0]["answer_ids"] == other["turns"][0]["answer_ids"] for one, other in zip(made, again, strict=True)
    )
    assert same > 24  # batches of another size round differently, and a sampled token may then be another
    assert gone(world)


def test_a_conversation_with_tools_continues_after_the_recorded_call_and_ends_after_another(world: World) -> None:
    recorded = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": CALL}]}
    called = [user(f"Repeat this line and nothing else: {json.dumps(CALL)}"), recorded]
    called += [{"role": "tool", "content": "It is by the sea.", "tool_call_id": "c"}]
    rows = [
        {"id": "call", "messages": called, "tools": TOOLS},
        {
            "id": "text",
            "messages": [user("Say hello."), {"role": "assistant", "content": "Hello."}, user("Say goodbye.")],
            "tools": TOOLS,
        },
    ]
    made, record, _ = answers(world, "tools", rows)
    by_id = {row["id"].rpartition("/")[2]: row for row in made}
    first = by_id["call"]["messages"][1]
    if calls_in_text(first["content"]) == [(CALL["name"], CALL["arguments"])]:
        assert [message["role"] for message in by_id["call"]["messages"]] == ["user", "assistant", "tool", "assistant"]
    else:
        assert record["kept_in_part"] == {"other_call": 1}
        assert len(by_id["call"]["turns"]) == 1
    assert record["conversations"] == record["kept_whole"] + sum(record["kept_in_part"].values())
    assert gone(world)


def test_a_conversation_that_the_template_refuses_is_a_row_with_its_reason(world: World) -> None:
    directory = world.root / "without-system"
    tiny_gemma.write(directory)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(refusing + tiny_gemma.TEMPLATE)
    rows: list[dict[str, Any]] = [{"id": f"r{i}", "messages": [user(f"number {i}")]} for i in range(8)]
    rows[3]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    words = (f"target.source={directory}", "target.num_hidden_layers=null", "target.hidden_size=null")
    words += ("target.vocab_size=null", "vocab.size=null", "target.dtype=float32")
    made, record, path = answers(world, "refused", rows, *words)
    (error,) = [json.loads(line) for line in (path / "errors.jsonl").read_text().splitlines()]
    assert error["id"] == "mine/r3"
    assert "System role not supported" in error["reason"]
    assert (len(made), record["dropped"]) == (7, {"refused": 1})
    assert gone(world)
