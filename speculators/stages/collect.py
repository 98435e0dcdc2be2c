"""collect: tokens + answers with their states -> hidden states. Says which part of what `regenerate` kept a row is.

No server is needed: the target has computed these states while it answered. Nor are they written again: the shards are
those of the answers, in another set. The last token of an answer was never an input, so a row's states end one token
before the row does, unless the row was cut; training takes the row that far.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

from datasets import load_from_disk

from speculators.data.conversations import Answer, ConversationRow
from speculators.data.packing import RowSlice
from speculators.errors import ContractError
from speculators.features.shards import ShardReader
from speculators.features.writer import ANSWER_STATES, hidden_states_contract
from speculators.job import Job
from speculators.targets.fidelity_check import write_greedy_tokens
from speculators.targets.readings import GreedyToken


def main(job: Job) -> None:
    """Every row of the tokens."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    turns = read_turns(job.inputs["states"] / "conversations.jsonl")
    parts: dict[int, RowSlice] = {}
    picks: list[GreedyToken] = []
    for number in range(len(tokens)):
        row = tokens[number]
        turn = covering(turns[row["id"]], row["input_ids"])
        if turn is None:
            raise ContractError(
                f"row {number} (conversation {row['id']}) is no part of what the target was asked and answered",
                "use `pipeline=offline`, which runs the target over the rows themselves",
            )
        picks += greedy_tokens_of_row(number, turn)
        answer_row, begin, length = turn["states"]
        parts[number] = RowSlice(answer_row, begin, begin + min(len(row["input_ids"]), length))
    shutil.rmtree(job.output)  # of an attempt that was killed
    job.output.mkdir()
    answers = ShardReader(job.inputs["states"] / ANSWER_STATES)
    job.digests_written |= answers.link_rows(parts, hidden_states_contract(job), job.output)
    write_greedy_tokens(job.output, picks)
    job.record |= {
        "rows": len(tokens),
        "tokens": sum(tokens["seq_len"]),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
    }


def greedy_tokens_of_row(row: int, turn: Answer) -> list[GreedyToken]:
    """What the server found likeliest in a turn that covers a row; training leaves out what the row was cut before."""
    begin = len(turn["prompt_ids"]) - 1
    return [GreedyToken(row, begin + place, token, logprob) for place, token, logprob in turn.get("picks", ())]


def read_turns(conversations: Path) -> dict[str, list[Answer]]:
    """Conversation id -> its turns that have states.

    Raises:
        ContractError: none has.
    """
    turns: dict[str, list[Answer]] = defaultdict(list)
    with conversations.open(encoding="utf-8") as lines:
        for line in lines:
            conversation: ConversationRow = json.loads(line)
            turns[conversation["id"]] += [turn for turn in conversation["turns"] if "states" in turn]
    if not any(turns.values()):
        raise ContractError(f"{conversations.parent} holds answers without their states", "run `regenerate` again")
    return turns


def covering(turns: list[Answer], row: list[int]) -> Answer | None:
    """The turn whose prompt and answer begin with the row: of several, the first."""
    return next((t for t in turns if [*t["prompt_ids"], *t["answer_ids"]][: len(row)] == row), None)
