"""`recipe=gemma4_dflash` from its prompts to its numbers, on the real engine and a tiny Gemma 4 of random weights; then
a draft that knows one row of it by heart, served: whatever is Gemma's own is in its states, embeddings and head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.smoke import tiny_gemma
from tests.smoke.world import ONE_ROW, World, gone

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]
SMALL = (
    "target.dtype=float32", "vocab.size=null", "speculator.num_layers=2", "speculator.block_size=8",
    "hardware=cpu", "serve.max_num_seqs=16", "serve.kv_cache_gib=0.5", "target.num_hidden_layers=null",
    "target.hidden_size=null", "target.vocab_size=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def gemma(world: World) -> str:
    """The word that names the target."""
    directory = world.root / "gemma"
    tiny_gemma.write(directory)
    return f"target.source={directory}"


def artifact(world: World, node: str) -> tuple[Path, dict[str, Any]]:
    """What the last run's node made, and what it said of it."""
    path = Path(world.last_run()["steps"][node]["path"])
    return path, json.loads((path.parent / "artifact.json").read_text())["record"]


def test_the_recipe_ends_in_numbers_measured_on_a_gemma(world: World, gemma: str) -> None:
    few = ("prompts.num_conversations=24", "regenerate.max_tokens=48", "train.epochs=2", "train.batch_tokens=512")
    short = ("max_seq_len=512", "evaluate.num_prompts=2", "evaluate.max_tokens=32", "evaluate.concurrency=[2]")
    code, out, err = world.run(gemma, *SMALL, *few, *short, recipe="gemma4_dflash")
    assert code == 0, err
    trained, record = artifact(world, "train")
    assert record["fidelity"]["agree"] == record["fidelity"]["picks"] > 0
    assert record["prefilled_tokens"] > 0
    config = json.loads((trained / "best/config.json").read_text())
    assert config["speculators_config"]["verifier"]["architectures"] == ["Gemma4ForCausalLM"]
    assert config["aux_hidden_state_layer_ids"] == [2, 3, 4, 5, 6]
    results = json.loads((artifact(world, "evaluate")[0] / "evaluation.json").read_text())
    assert set(results["datasets"]) == {"human_eval", "sharegpt"}
    assert results["lossless"]["faults"] == 0
    assert "speed-up" in out
    assert gone(world)


def test_a_draft_that_knows_a_row_of_a_gemma_by_heart_is_served_as_it_was_trained(world: World, gemma: str) -> None:
    code, _, err = world.run(
        "target=gemma4_31b_it", gemma, *SMALL, "speculator=dflash", "train.epochs=120", recipe=ONE_ROW
    )
    assert code == 0, err
    answers = (artifact(world, "regenerate")[0] / "conversations.jsonl").read_text()
    assert len(set(json.loads(answers)["turns"][0]["answer_ids"])) > 32  # no loop, which any draft would learn
    results = json.loads((artifact(world, "evaluate")[0] / "evaluation.json").read_text())
    measured = results["datasets"]["hub/again"]
    assert measured["identical_answers"] == 1
    assert measured["acceptance_length"] > 0.9 * (results["num_speculative_tokens"] + 1)
    assert gone(world)
