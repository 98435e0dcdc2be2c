"""collect: tokens + answers with hidden states -> hidden states. Map each token row to its rows in the answers' shards.

It needs no server, because `regenerate` kept the hidden states while the target answered, and it copies no data: the
shards are linked, with an index of their own. The last token of an answer was never an input of the target, so a row
has hidden states for all tokens but the last, unless the row was cut; training uses the row up to there.
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
    """Write the index of every token row and link the shards that it refers to."""
    tokens = load_from_disk(str(job.inputs["tokens"]))
    turns = read_turns(job.inputs["states"] / "conversations.jsonl")
    parts: dict[int, RowSlice] = {}
    greedy_tokens: list[GreedyToken] = []
    for number in range(len(tokens)):
        row = tokens[number]
        turn = find_turn(turns[row["id"]], row["input_ids"])
        if turn is None:
            raise ContractError(
                f"row {number} (conversation {row['id']}) is not the beginning of any prompt and answer of the target",
                "use `pipeline=offline`, which computes the hidden states of the rows themselves",
            )
        greedy_tokens += greedy_tokens_of_row(number, turn)
        answer_row, begin, length = turn["states"]
        parts[number] = RowSlice(answer_row, begin, begin + min(len(row["input_ids"]), length))
    shutil.rmtree(job.output)  # a killed attempt may have left files in it
    job.output.mkdir()
    answers = ShardReader(job.inputs["states"] / ANSWER_STATES)
    job.digests_written |= answers.link_rows(parts, hidden_states_contract(job), job.output)
    write_greedy_tokens(job.output, greedy_tokens)
    job.record |= {
        "rows": len(tokens),
        "tokens": sum(tokens["seq_len"]),
        "bytes": sum(path.stat().st_size for path in job.output.iterdir()),
    }


def greedy_tokens_of_row(row: int, turn: Answer) -> list[GreedyToken]:
    """The server's greedy tokens of a turn, at positions of the row; the fidelity check ignores those past a cut."""
    begin = len(turn["prompt_ids"]) - 1
    return [GreedyToken(row, begin + index, token, logprob) for index, token, logprob in turn.get("picks", ())]


def read_turns(conversations: Path) -> dict[str, list[Answer]]:
    """Read the turns that have hidden states, by conversation id.

    Raises:
        ContractError: no turn has any.
    """
    turns: dict[str, list[Answer]] = defaultdict(list)
    with conversations.open(encoding="utf-8") as lines:
        for line in lines:
            conversation: ConversationRow = json.loads(line)
            turns[conversation["id"]] += [turn for turn in conversation["turns"] if "states" in turn]
    if not any(turns.values()):
        raise ContractError(f"{conversations.parent} has answers without hidden states", "run `regenerate` again")
    return turns


def find_turn(turns: list[Answer], row: list[int]) -> Answer | None:
    """The first turn whose prompt and answer begin with the token ids of the row; None if no turn does."""
    return next((turn for turn in turns if [*turn["prompt_ids"], *turn["answer_ids"]][: len(row)] == row), None)
