"""collect: tokens + answers with their states -> hidden states. Sorts what `regenerate` kept into shards, by row.

No server is needed: the target has computed these states while it answered. The last token of an answer was never an
input, so a row's states end one token before the row does, unless the row was cut; training takes the row that far.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from safetensors.torch import load_file

from speculators.data.encoding import decode
from speculators.errors import ContractError
from speculators.job import Job
from speculators.targets.fidelity import write_picks
from speculators.targets.readings import Pick
from speculators.targets.states import last_places, states_writer


def main(job: Job) -> None:
    """Every row of the tokens, in order, but for those that an earlier attempt sealed."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    turns = read_turns(job.inputs["states"] / "conversations.jsonl")
    writer = states_writer(job)
    picks: list[Pick] = []
    for number in range(len(tokens)):
        row = tokens[number]
        turn = covering(turns[row["id"]], row["input_ids"])
        if turn is not None:
            picks += picks_in(number, turn)
        if number not in writer.done:
            if turn is None:
                raise ContractError(
                    f"row {number} (conversation {row['id']}) is no part of what the target was asked and answered",
                    "use `pipeline=offline`, which runs the target over the rows themselves",
                )
            found = load_file(job.inputs["states"] / "states" / turn["states"])
            length = min(len(row["input_ids"]), len(found["token_ids"]))
            last = last_places(job, row["loss_mask"])[:length]
            writer.add(number, found["token_ids"][:length], decode(found)[:length], last)
            job.progress(number + 1, len(tokens), "rows")
    writer.close()
    job.digests_written |= writer.digests
    write_picks(job.output, picks)
    job.record |= {
        "rows": len(tokens),
        "tokens": sum(tokens["seq_len"]),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
    }


def picks_in(row: int, turn: dict[str, Any]) -> list[Pick]:
    """What the server found likeliest in a turn that covers a row; training leaves out what the row was cut before."""
    begin = len(turn["prompt_ids"]) - 1
    return [Pick(row, begin + place, token, logprob) for place, token, logprob in turn.get("picks", ())]


def read_turns(conversations: Path) -> dict[str, list[dict[str, Any]]]:
    """Conversation id -> its turns that have states.

    Raises:
        ContractError: none has.
    """
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with conversations.open(encoding="utf-8") as lines:
        for line in lines:
            conversation = json.loads(line)
            turns[conversation["id"]] += [turn for turn in conversation["turns"] if "states" in turn]
    if not any(turns.values()):
        raise ContractError(f"{conversations.parent} holds answers without their states", "run `regenerate` again")
    return turns


def covering(turns: list[dict[str, Any]], row: list[int]) -> dict[str, Any] | None:
    """The turn whose prompt and answer begin with the row: of several, the first."""
    return next((t for t in turns if [*t["prompt_ids"], *t["answer_ids"]][: len(row)] == row), None)
