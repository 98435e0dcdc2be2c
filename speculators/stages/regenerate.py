"""regenerate: conversations -> the same conversations answered by the target, with token ids as the server saw them.

A draft learns to predict what the target itself would say, so every assistant turn is the target's own. The turns of a
conversation are answered one after the other, many conversations at once. A finished conversation is appended to
`scratch/answers.jsonl`; a killed attempt goes on with those that are not there.

Where another node takes the hidden states of the answers (pipeline `fused`), the server keeps those of every turn in
the same pass, of the prompt and of the answer but its last token, which was never an input. They lie in scratch/, one
file for each turn, until all is answered, and then go into the shards of `states/`, one row for each conversation:
`states` of a turn says which part of which row is its own. A turn whose whole is the beginning of the next one's prompt
has none: the history of a conversation is kept once. An answer whose states cannot be used stops the stage, or ends its
conversation before it: `extract.on_bad_row`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.config.choices import OnBadRow
from speculators.config.schema import Regenerate
from speculators.data.conversations import ConversationRow, Message
from speculators.data.template import ChatTurn, TokenSequence, merge_turns
from speculators.engine.client import Client, Completion
from speculators.engine.transfer import Transfer
from speculators.errors import ContractError, StageError
from speculators.features.encoding import encode, split_last_layer
from speculators.features.shards import ShardWriter
from speculators.features.writer import (
    ANSWER_STATES,
    check_hidden_states,
    hidden_states_writer,
    last_layer_mask,
    refuse_too_many,
)
from speculators.job import Job
from speculators.targets.fidelity_check import greedy_tokens_in_answer

STATES = "states"
"""Directory of the turns' hidden states in the scratch directory."""
BAD_STATES = "bad_states"
"""Why a conversation ends before an answer whose states cannot be used. Another attempt asks for it again."""
SAMPLED = 16
"""Conversations whose answers also say what the server finds likeliest, so that their states can be checked."""
SYNC_SECONDS = 1.0
"""Answers that a crash of the machine may lose; a crash of this process loses none."""


def main(job: Job) -> None:
    """Answer every conversation, in any order; publish them in the order they came in."""
    conversations: list[ConversationRow] = [
        json.loads(line) for line in _lines(job.inputs["prompts"] / "conversations.jsonl")
    ]
    log = job.scratch / "answers.jsonl"
    states = hidden_states_writer(job, "prompts", ANSWER_STATES) if _keeps_states(job) else None
    sealed = states.done if states else set()
    finished = {i: a for i, a in read_answers(log).items() if a["dropped"] != BAD_STATES or i in sealed}
    job.record["resumed"] = len(finished)
    start = time.monotonic()
    asyncio.run(_answer_all(job, conversations, finished, log))
    seconds = time.monotonic() - start
    kept = [finished[i] for i in range(len(conversations)) if finished[i]["turns"]]
    if not kept:
        raise StageError(
            f"none of {len(conversations)} conversations was answered: {_dropped(finished)}",
            "raise `max_seq_len`, or choose other prompts",
        )
    if states:
        _pack_states(job, kept, states)
    with (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for answered in kept:
            public = {key: value for key, value in answered.items() if key not in ("index", "dropped", "why")}
            file.write(json.dumps(public, ensure_ascii=False) + "\n")
    turns = [turn for answered in kept for turn in answered["turns"]]
    job.record |= {
        "conversations": len(conversations),
        "kept": len(kept),
        "dropped": _dropped(finished),
        "turns": len(turns),
        "answer_tokens": sum(len(turn["answer_ids"]) for turn in turns),
        "finish_reasons": dict(Counter(turn["finish_reason"] for turn in turns)),
        "seconds": round(seconds, 1),
    }
    bad = [answered for answered in finished.values() if answered["dropped"] == BAD_STATES]
    if bad:
        note = f"{len(bad)} conversations end before an answer whose hidden states cannot be used: {bad[0]['why']}"
        job.record["notes"] = [note]


def read_answers(log: Path) -> dict[int, dict[str, Any]]:
    """What earlier attempts finished, by the conversation's place in the input.

    A last line that a kill cut off is removed from the file, so that the next one starts on a line of its own.
    """
    if not log.exists():
        return {}
    data = log.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(log, whole)
    answers = [json.loads(line) for line in data[:whole].splitlines()]
    return {answer["index"]: answer for answer in answers}


async def _answer_all(
    job: Job, conversations: list[ConversationRow], finished: dict[int, dict[str, Any]], log: Path
) -> None:
    config = job.config.regenerate
    waiting = in_order(conversations, (i for i in range(len(conversations)) if i not in finished))
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, tokens, synced = time.monotonic(), 0, 0.0
    with log.open("a", encoding="utf-8") as file:
        async with client:

            async def work(index: int) -> dict[str, Any]:
                keeper = Keeper(job, index) if _keeps_states(job) else None
                answered = await answer(client, conversations[index], config, job.config.max_seq_len, keeper)
                return {"index": index, **answered}

            async for answered in client.map(work, waiting):
                synced = _append(file, answered, synced)
                finished[answered["index"]] = answered
                if answered["dropped"] == BAD_STATES:
                    bad = [each["why"] for each in finished.values() if each["dropped"] == BAD_STATES]
                    refuse_too_many(bad, "answers", len(finished))
                tokens += sum(len(turn["answer_ids"]) for turn in answered["turns"])
                speed = tokens / (time.monotonic() - start)
                job.progress(len(finished), len(conversations), "conversations", tokens_per_second=round(speed, 1))
        os.fsync(file.fileno())
    job.record["retried_requests"] = client.retried
    if waiting:
        job.record["tokens_per_second"] = round(tokens / (time.monotonic() - start), 1)


class Keeper:
    """Keeps the hidden states of one conversation's turns in the scratch directory."""

    def __init__(self, job: Job, index: int) -> None:
        self.request: dict[str, Any] = {"kv_transfer_params": {"hidden_states": True, "include_output_tokens": True}}
        """What a request says to get states."""
        if index < SAMPLED:
            # Of two, because the first that the server lists is the sampled one, which need not be the likeliest.
            self.request["logprobs"] = 2
        self.skips = job.config.extract.on_bad_row is OnBadRow.skip
        """Whether a conversation goes without an answer whose states cannot be used."""
        self._directory = job.scratch / STATES
        self._index = index
        self._stored = job.config.extract.dtype.name
        self._compute = getattr(torch, job.config.target.dtype.name)

    def keep(self, turn: int, said: Completion, file: Transfer) -> str:
        """Check one turn's states and write them in the stored type; returns the file's name."""
        token_ids, states = file.load()
        item = f"conversation {self._index}"
        check_hidden_states(item, [*said.prompt_ids, *said.token_ids[:-1]], token_ids, states, self._compute)
        name = f"{self._index:07d}-{turn}.safetensors"
        self._directory.mkdir(exist_ok=True)
        save_file({"token_ids": token_ids, **encode(item, states, self._stored)}, self._directory / f".{name}")
        os.replace(self._directory / f".{name}", self._directory / name)
        return name

    def drop(self, name: str) -> None:
        """Delete the states of a turn that a later one holds too."""
        (self._directory / name).unlink()


def continues(turn: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether the prompt of `later` begins with the whole of `turn`: then its states hold those of `turn`."""
    whole = [*turn["prompt_ids"], *turn["answer_ids"]]
    return bool(later["prompt_ids"][: len(whole)] == whole)


def _keeps_states(job: Job) -> bool:
    return "capture_layer_ids" in job.derived


def _pack_states(job: Job, kept: list[dict[str, Any]], writer: ShardWriter) -> None:
    """Move the states of the turns that are kept into shards; an earlier attempt may have moved some."""
    waiting: dict[int, list[Path]] = {}
    for number, answered in enumerate(kept):
        row, begin = answered["index"], 0
        turns = [turn for turn in answered["turns"] if "states" in turn]
        files = [job.scratch / STATES / turn["states"] for turn in turns]
        wholes = merge_turns(
            [ChatTurn(prompt_ids=t["prompt_ids"], answer_ids=t["answer_ids"]) for t in answered["turns"]]
        )
        for turn, whole in zip(turns, wholes, strict=True):
            turn["states"] = [row, begin, len(whole.input_ids) - 1]
            begin += len(whole.input_ids) - 1
        if row not in writer.done:
            waiting[row] = files
            writer.add_encoded(row, *_joined(job, files, wholes))
        for done in waiting.keys() & writer.done:
            for file in waiting.pop(done):
                file.unlink()
        job.progress(number + 1, len(kept), "conversations")
    writer.close()
    job.digests_written |= {f"{ANSWER_STATES}/{name}": digest for name, digest in writer.digests.items()}


def _joined(job: Job, files: list[Path], wholes: list[TokenSequence]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One conversation's token ids, states as `split_last_layer` leaves them, and where the last layer's are kept."""
    found = []
    for file, whole in zip(files, wholes, strict=True):
        try:
            encoded = load_file(file)
        except FileNotFoundError:
            raise StageError(
                f"the hidden states {file.name} of a finished answer are gone", f"delete {job.scratch}"
            ) from None
        last = last_layer_mask(job, whole.loss_mask)[:-1]
        found.append({"token_ids": encoded.pop("token_ids"), "kept": last, **split_last_layer(encoded, last)})
    sifted = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    return sifted.pop("token_ids"), sifted, sifted.pop("kept")


async def answer(
    client: Client, conversation: ConversationRow, config: Regenerate, longest: int, keeper: Keeper | None = None
) -> dict[str, Any]:
    """The conversation with the target's answers; `dropped` says why turns are missing, null if none is.

    A prompt and its answer together have at most `longest` tokens: the answer is cut to that, and a prompt that leaves
    no room ends the conversation, as an empty answer does. What was answered before is kept.
    """
    messages: list[Message] = []
    turns: list[dict[str, Any]] = []
    dropped, why = None, ""
    kept = 0
    item = affinity_key = f"conversation {conversation['id']}"
    for message in conversation["messages"]:
        messages.append(message)
        if message["role"] != "user":
            continue
        prompt_ids = await client.tokenize(messages, item=item, affinity_key=affinity_key)
        room = longest - len(prompt_ids)
        if room <= 0:
            dropped = "prompt_too_long"
            break
        said = await client.chat(
            messages,
            item=item,
            affinity_key=affinity_key,
            max_tokens=min(config.max_tokens, room),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            **(keeper.request if keeper else {}),
        )
        if not said.text.strip():
            dropped = "empty_answer"
            break
        messages.append({"role": "assistant", "content": said.text})
        turn = {"prompt_ids": said.prompt_ids, "answer_ids": said.token_ids, "finish_reason": said.finish_reason}
        if keeper:
            try:
                file = await client.requested_states(said, item=item)
                turn["states"] = await asyncio.to_thread(keeper.keep, len(turns), said, file)
            except (StageError, ContractError) as error:  # about this answer: what is about the server is another
                if not keeper.skips:
                    raise
                dropped, why = BAD_STATES, error.message
                break
            if turns and continues(turns[-1], turn):
                keeper.drop(turns[-1].pop("states"))
            turn |= {"picks": picks} if (picks := greedy_tokens_in_answer(said)) else {}
        turns.append(turn)
        kept = len(messages)
    told = {"why": why} if why else {}
    return {**conversation, "messages": messages[:kept], "turns": turns, "dropped": dropped, **told}


def in_order(conversations: list[ConversationRow], waiting: Iterable[int]) -> list[int]:
    """The waiting conversations, those with the same system prompt one after the other.

    So a server computes a prompt that they share once, and still remembers it when the next one comes.
    """

    def shared(index: int) -> str:
        first = next(iter(conversations[index]["messages"]), {"role": ""})
        return str(first["content"]) if first["role"] == "system" else ""

    return sorted(waiting, key=lambda index: (shared(index), index))


def _append(file: TextIO, answered: dict[str, Any], synced: float) -> float:
    """Write one line; returns when the file was last made durable."""
    file.write(json.dumps(answered, ensure_ascii=False) + "\n")
    file.flush()
    now = time.monotonic()
    if now - synced < SYNC_SECONDS:
        return synced
    os.fsync(file.fileno())
    return now


def _dropped(finished: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Conversations that lost a turn or more, by reason."""
    return dict(Counter(answered["dropped"] for answered in finished.values() if answered["dropped"]))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file
