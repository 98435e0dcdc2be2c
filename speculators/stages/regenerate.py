"""regenerate: conversations -> conversations answered by the target. Keep the server's own token ids of each turn.

A draft learns to predict the target's output, so the target writes every assistant turn. The turns of a conversation
are answered in order, many conversations at the same time. Each finished conversation is appended to
`scratch/answers.jsonl`; a new attempt resumes with those that are not in it.

If another stage reads the hidden states of the answers (pipeline `fused`), the server exports those of each turn in the
same forward pass, for the prompt and all answer tokens but the last, which is never an input. Each turn's file stays in
scratch/ until every conversation is answered; then the shards in `states/` get one row a conversation, and `states` of
a turn gives its row, offset and length there. A turn that is the beginning of the next one's prompt has none, so that
the history of a conversation is stored once. An answer with unusable hidden states stops the stage or ends its
conversation before that answer: `extract.on_bad_row`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
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
from speculators.timeouts import SYNC_SECONDS

STATES = "states"
"""Directory of the turns' hidden states in the scratch directory."""
BAD_STATES = "bad_states"
"""`dropped` of a conversation that ends before an answer with unusable hidden states; a new attempt retries it."""
SAMPLED = 16
"""Number of conversations whose answers include greedy tokens, for the fidelity check of their hidden states."""


def main(job: Job) -> None:
    """Answer the conversations in any order, and write them in the order of the input."""
    with (job.inputs["prompts"] / "conversations.jsonl").open(encoding="utf-8") as lines:
        conversations: list[ConversationRow] = [json.loads(line) for line in lines]
    log = job.scratch / "answers.jsonl"
    writer = hidden_states_writer(job, "prompts", ANSWER_STATES) if _keeps_hidden_states(job) else None
    sealed = writer.done if writer else set()
    finished = {i: a for i, a in read_answers(log).items() if a["dropped"] != BAD_STATES or i in sealed}
    job.record["resumed"] = len(finished)
    start = time.monotonic()
    asyncio.run(_answer_all(job, conversations, finished, log))
    elapsed_seconds = time.monotonic() - start
    kept = [finished[i] for i in range(len(conversations)) if finished[i]["turns"]]
    if not kept:
        raise StageError(
            f"none of {len(conversations)} conversations was answered: {_dropped(finished)}",
            "raise `max_seq_len`, or choose other prompts",
        )
    if writer:
        _write_hidden_states(job, kept, writer)
    with (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for answered in kept:
            published = {key: value for key, value in answered.items() if key not in ("index", "dropped", "why")}
            file.write(json.dumps(published, ensure_ascii=False) + "\n")
    turns = [turn for answered in kept for turn in answered["turns"]]
    job.record |= {
        "conversations": len(conversations),
        "kept": len(kept),
        "dropped": _dropped(finished),
        "turns": len(turns),
        "answer_tokens": sum(len(turn["answer_ids"]) for turn in turns),
        "finish_reasons": dict(Counter(turn["finish_reason"] for turn in turns)),
        "seconds": round(elapsed_seconds, 1),
    }
    bad = [answered for answered in finished.values() if answered["dropped"] == BAD_STATES]
    if bad:
        note = f"{len(bad)} conversations end before an answer whose hidden states cannot be used: {bad[0]['why']}"
        job.record["notes"] = [note]


def read_answers(log: Path) -> dict[int, dict[str, Any]]:
    """Read the conversations that earlier attempts finished, by index in the input.

    An incomplete last line, which a killed attempt left, is removed so that the next append starts a new line.
    """
    if not log.exists():
        return {}
    data = log.read_bytes()
    complete_bytes = data.rfind(b"\n") + 1
    if complete_bytes < len(data):
        os.truncate(log, complete_bytes)
    answers = [json.loads(line) for line in data[:complete_bytes].splitlines()]
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
                files = TurnFiles(job, index) if _keeps_hidden_states(job) else None
                answered = await answer(client, conversations[index], config, job.config.max_seq_len, files)
                return {"index": index, **answered}

            async for answered in client.map(work, waiting):
                synced = _append(file, answered, synced)
                finished[answered["index"]] = answered
                if answered["dropped"] == BAD_STATES:
                    reasons = [each["why"] for each in finished.values() if each["dropped"] == BAD_STATES]
                    refuse_too_many(reasons, "answers", len(finished))
                tokens += sum(len(turn["answer_ids"]) for turn in answered["turns"])
                tokens_per_second = round(tokens / (time.monotonic() - start), 1)
                job.progress(len(finished), len(conversations), "conversations", tokens_per_second=tokens_per_second)
        os.fsync(file.fileno())
    job.record["retried_requests"] = client.retried
    if waiting:
        job.record["tokens_per_second"] = round(tokens / (time.monotonic() - start), 1)


class TurnFiles:
    """The files with the hidden states of one conversation's turns in the scratch directory."""

    def __init__(self, job: Job, index: int) -> None:
        self.request: dict[str, Any] = {"kv_transfer_params": {"hidden_states": True, "include_output_tokens": True}}
        """Parameters with which the server exports the hidden states of a request."""
        if index < SAMPLED:
            # Two, because the server lists the sampled token first, and the greedy one may be the other.
            self.request["logprobs"] = 2
        self.skips = job.config.extract.on_bad_row is OnBadRow.skip
        """Whether unusable hidden states end the conversation before their answer instead of stopping the stage."""
        self._directory = job.scratch / STATES
        self._index = index
        self._stored_dtype = job.config.extract.dtype.name
        self._compute_dtype = getattr(torch, job.config.target.dtype.name)

    def write(self, turn: int, completion: Completion, transfer: Transfer) -> str:
        """Check the hidden states of a turn and write them in the stored dtype; returns the name of the file."""
        token_ids, hidden_states = transfer.load()
        item, input_ids = f"conversation {self._index}", [*completion.prompt_ids, *completion.token_ids[:-1]]
        check_hidden_states(item, input_ids, token_ids, hidden_states, self._compute_dtype)
        name = f"{self._index:07d}-{turn}.safetensors"
        self._directory.mkdir(exist_ok=True)
        encoded = encode(item, hidden_states, self._stored_dtype)
        save_file({"token_ids": token_ids, **encoded}, self._directory / f".{name}")
        os.replace(self._directory / f".{name}", self._directory / name)
        return name

    def delete(self, name: str) -> None:
        """Delete the file of a turn whose hidden states are also in that of the next turn."""
        (self._directory / name).unlink()


def continues(turn: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether the prompt of `later` begins with all tokens of `turn`, so that its hidden states include the turn's."""
    token_ids = [*turn["prompt_ids"], *turn["answer_ids"]]
    return bool(later["prompt_ids"][: len(token_ids)] == token_ids)


def _keeps_hidden_states(job: Job) -> bool:
    return "capture_layer_ids" in job.derived


def _write_hidden_states(job: Job, kept: list[dict[str, Any]], writer: ShardWriter) -> None:
    """Write the hidden states of the kept turns into shards, except rows that an earlier attempt sealed."""
    unsealed: dict[int, list[Path]] = {}
    for number, answered in enumerate(kept):
        row, begin = answered["index"], 0
        turns = [turn for turn in answered["turns"] if "states" in turn]
        files = [job.scratch / STATES / turn["states"] for turn in turns]
        sequences = merge_turns(
            [ChatTurn(prompt_ids=t["prompt_ids"], answer_ids=t["answer_ids"]) for t in answered["turns"]]
        )
        for turn, sequence in zip(turns, sequences, strict=True):
            turn["states"] = [row, begin, len(sequence.input_ids) - 1]
            begin += len(sequence.input_ids) - 1
        if row not in writer.done:
            unsealed[row] = files
            writer.add_encoded(row, *_read_turns(job, files, sequences))
        for sealed_row in unsealed.keys() & writer.done:
            for file in unsealed.pop(sealed_row):
                file.unlink()
        job.progress(number + 1, len(kept), "conversations")
    writer.close()
    job.digests_written |= {f"{ANSWER_STATES}/{name}": digest for name, digest in writer.digests.items()}


def _read_turns(job: Job, files: list[Path], rows: list[TokenSequence]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Read one conversation: token ids [T], tensors of `split_last_layer`, and the mask [T] of its last layer."""
    turns = []
    for file, row in zip(files, rows, strict=True):
        try:
            encoded = load_file(file)
        except FileNotFoundError:
            raise StageError(
                f"the hidden states {file.name} of a finished answer are missing", f"delete {job.scratch}"
            ) from None
        mask = last_layer_mask(job, row.loss_mask)[:-1]
        turns.append({"token_ids": encoded.pop("token_ids"), "mask": mask, **split_last_layer(encoded, mask)})
    tensors = {name: torch.cat([turn[name] for turn in turns]) for name in turns[0]}
    return tensors.pop("token_ids"), tensors, tensors.pop("mask")


async def answer(
    client: Client, conversation: ConversationRow, config: Regenerate, max_seq_len: int, files: TurnFiles | None = None
) -> dict[str, Any]:
    """Answer the user messages of a conversation; `dropped` is the reason if turns are missing, else None.

    A prompt and its answer have at most `max_seq_len` tokens: the answer is cut, and a prompt of that length ends the
    conversation, as does an empty answer. The turns before are kept.
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
        available_tokens = max_seq_len - len(prompt_ids)
        if available_tokens <= 0:
            dropped = "prompt_too_long"
            break
        completion = await client.chat(
            messages,
            item=item,
            affinity_key=affinity_key,
            max_tokens=min(config.max_tokens, available_tokens),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            **(files.request if files else {}),
        )
        if not completion.text.strip():
            dropped = "empty_answer"
            break
        messages.append({"role": "assistant", "content": completion.text})
        turn: dict[str, Any] = {"prompt_ids": completion.prompt_ids, "answer_ids": completion.token_ids}
        turn["finish_reason"] = completion.finish_reason
        if files:
            try:
                transfer = await client.requested_states(completion, item=item)
                turn["states"] = await asyncio.to_thread(files.write, len(turns), completion, transfer)
            except (StageError, ContractError) as error:  # only this answer failed, not the server
                if not files.skips:
                    raise
                dropped, why = BAD_STATES, error.message
                break
            if turns and continues(turns[-1], turn):
                files.delete(turns[-1].pop("states"))
            if greedy_tokens := greedy_tokens_in_answer(completion):
                turn["picks"] = greedy_tokens
        turns.append(turn)
        kept = len(messages)
    answered = {**conversation, "messages": messages[:kept], "turns": turns, "dropped": dropped}
    return answered | ({"why": why} if why else {})


def in_order(conversations: list[ConversationRow], waiting: Iterable[int]) -> list[int]:
    """Sort the waiting conversations by system prompt, so that the server's prefix cache has it for the next one."""

    def system_prompt(index: int) -> str:
        first = next(iter(conversations[index]["messages"]), {"role": ""})
        return str(first["content"]) if first["role"] == "system" else ""

    return sorted(waiting, key=lambda index: (system_prompt(index), index))


def _append(file: TextIO, answered: dict[str, Any], synced: float) -> float:
    """Append one line; returns the time of the last fsync, on the monotonic clock."""
    file.write(json.dumps(answered, ensure_ascii=False) + "\n")
    file.flush()
    now = time.monotonic()
    if now - synced < SYNC_SECONDS:
        return synced
    os.fsync(file.fileno())
    return now


def _dropped(finished: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Number of conversations with missing turns, by reason."""
    return dict(Counter(answered["dropped"] for answered in finished.values() if answered["dropped"]))
