"""regenerate: conversations -> conversations answered by the target. Keep the server's own token ids of each turn.

A draft learns to predict the target's output, so the target writes every assistant turn. The turns of a conversation
are answered in order, many conversations at the same time. Each finished conversation is appended to
`scratch/answers.jsonl`; a new attempt resumes with those that are not in it.

A conversation that was answered before, in an artifact or an attempt that the request names (`Job.reuse`), is not
answered again: it is found by the digest of its messages, which `rows.jsonl` lists (see `speculators.answers`). That
goes for conversations that were dropped, too.

If another stage reads the hidden states of the answers (pipeline `fused`), the server exports those of each turn in the
same forward pass, for the prompt and all answer tokens but the last, which is never an input. Each turn's file stays in
scratch/ until every conversation is answered; then the shards in `states/` get one row a conversation, and `states` of
a turn gives its row, offset and length there. A turn that is the beginning of the next one's prompt has none, so that
the history of a conversation is stored once. An answer with unusable hidden states stops the stage or ends its
conversation before that answer: `extract.on_bad_row`. Hidden states of earlier answers are copied from the artifact
that has them. If it has other layers or another format, the target prefills prompt and answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.answers import BAD_STATES, ROWS, AnsweredRow, row_digest, row_line
from speculators.config.choices import OnBadRow
from speculators.config.schema import Config
from speculators.data.answer_log import OF_THE_LOG, AnswerLog, EarlierAnswers, StoredHiddenStates
from speculators.data.conversations import ConversationRow, Message
from speculators.data.template import ChatTurn, TokenSequence, merge_turns
from speculators.engine.client import Client
from speculators.engine.sampling import request_seed, sampling_fields, template_fields
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
SAMPLED = 16
"""Number of conversations whose answers include greedy tokens, for the fidelity check of their hidden states."""


def main(job: Job) -> None:
    """Answer the conversations in any order, and write them in the order of the input."""
    with (job.inputs["prompts"] / "conversations.jsonl").open(encoding="utf-8") as lines:
        conversations: list[ConversationRow] = [json.loads(line) for line in lines]
    digests = [row_digest(conversation) for conversation in conversations]
    writer = hidden_states_writer(job, "prompts", ANSWER_STATES) if _keeps_hidden_states(job) else None
    sealed = writer.done if writer else set()
    start = time.monotonic()
    with AnswerLog(job.scratch, digests, sealed) as log:
        finished = log.finished
        job.record["resumed"] = len(finished)
        unsealed = [index for index in range(len(conversations)) if index not in sealed]
        earlier = EarlierAnswers(job.reuse, {digests[index] for index in unsealed}, writer)
        for i in unsealed:
            # Answers and hidden states are of one artifact, also if an earlier attempt had the answers of another one.
            states_only = digests[i] in earlier.hidden_states and i in finished and _lacks_hidden_states(finished[i])
            if digests[i] in earlier.answers and (i not in finished or states_only):
                log.append({"index": i, **conversations[i], **earlier.answers[digests[i]], "reused": True})
        without_states = {i for i in unsealed if writer and i in finished and _lacks_hidden_states(finished[i])}
        copied = {i: earlier.hidden_states[digests[i]] for i in without_states if digests[i] in earlier.hidden_states}
        asyncio.run(_request_all(job, conversations, log, without_states - copied.keys()))
    elapsed_seconds = time.monotonic() - start
    kept = [finished[i] for i in range(len(conversations)) if finished[i]["turns"]]
    if not kept:
        raise StageError(
            f"none of {len(conversations)} conversations was answered: {_dropped(finished)}",
            "raise `max_seq_len`, or choose other prompts",
        )
    if writer:
        _write_hidden_states(job, kept, writer, copied)
    _publish(job, kept, finished, digests)
    turns = [turn for answered in kept for turn in answered["turns"]]
    reused = [answered for answered in finished.values() if answered.get("reused")]
    job.record |= {
        "conversations": len(conversations),
        "kept": len(kept),
        "dropped": _dropped(finished),
        "reused": len(reused),
        "answered": len(conversations) - len(reused),
        "prefilled": sum(answered.get("prefilled", False) for answered in finished.values()),
        "turns": len(turns),
        "answer_tokens": sum(len(turn["answer_ids"]) for turn in turns),
        "finish_reasons": dict(Counter(turn["finish_reason"] for turn in turns)),
        "seconds": round(elapsed_seconds, 1),
    }
    bad = [answered for answered in finished.values() if answered["dropped"] == BAD_STATES]
    if bad:
        note = f"{len(bad)} conversations end before an answer whose hidden states cannot be used: {bad[0]['why']}"
        job.record["notes"] = [note]


def _publish(job: Job, kept: list[dict[str, Any]], finished: dict[int, dict[str, Any]], digests: list[str]) -> None:
    """Write the answered conversations in the order of the input, and the index of all of them."""
    numbers = {answered["index"]: number for number, answered in enumerate(kept)}
    with (job.output / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for answered in kept:
            published = {key: value for key, value in answered.items() if key not in OF_THE_LOG}
            file.write(json.dumps(published, ensure_ascii=False) + "\n")
    with (job.output / ROWS).open("w", encoding="utf-8") as file:
        for index, digest in enumerate(digests):
            row = AnsweredRow(digest=digest, dropped=finished[index]["dropped"], line=numbers.get(index))
            file.write(row_line(row))


async def _request_all(
    job: Job, conversations: list[ConversationRow], log: AnswerLog, without_states: set[int]
) -> None:
    """Request what is missing: the answers of conversations, and the hidden states of answers without them."""
    config, finished = job.config.regenerate, log.finished
    unanswered = in_order(conversations, (i for i in range(len(conversations)) if i not in finished))
    waiting = [*sorted(without_states), *unanswered]
    if not waiting:
        return
    if "target" not in job.services:
        raise StageError(
            f"{len(waiting)} of {len(conversations)} rows are no longer in the store", "run the same command again"
        )
    client = Client(
        job.services["target"], concurrency=config.concurrency, retries=config.retries, timeout=config.timeout
    )
    start, tokens, done = time.monotonic(), 0, len(conversations) - len(waiting)
    # The first ones that this attempt requests, too: its server may be another one than that of earlier rows.
    sampled = {*range(SAMPLED), *sorted(waiting)[:SAMPLED]}

    async def work(index: int) -> dict[str, Any]:
        files = TurnFiles(job, index, sampled=index in sampled) if _keeps_hidden_states(job) else None
        if index in finished:
            assert files is not None
            return await prefill(client, finished[index], files)
        answered = await answer(client, conversations[index], job.config, files)
        return {"index": index, **answered}

    async with client:
        async for answered in client.map(work, waiting):
            if answered["index"] not in without_states:
                tokens += sum(len(turn["answer_ids"]) for turn in answered["turns"])
            log.append(answered)
            if answered["dropped"] == BAD_STATES:
                reasons = [each["why"] for each in finished.values() if each["dropped"] == BAD_STATES]
                refuse_too_many(reasons, "answers", len(finished))
            done += 1
            tokens_per_second = round(tokens / (time.monotonic() - start), 1)
            job.progress(done, len(conversations), "conversations", tokens_per_second=tokens_per_second)
    job.record["retried_requests"] = client.retried
    if not without_states:
        job.record["tokens_per_second"] = round(tokens / (time.monotonic() - start), 1)


class TurnFiles:
    """The files with the hidden states of one conversation's turns in the scratch directory."""

    def __init__(self, job: Job, index: int, *, sampled: bool) -> None:
        self.request: dict[str, Any] = {"kv_transfer_params": {"hidden_states": True, "include_output_tokens": True}}
        """Parameters with which the server exports the hidden states of a request."""
        self.sampled = sampled
        """Whether greedy tokens of the answers are kept."""
        if sampled:
            # Two, because the server lists the sampled token first, and the greedy one may be the other.
            self.request["logprobs"] = 2
        self.skips = job.config.extract.on_bad_row is OnBadRow.skip
        """Whether unusable hidden states end the conversation before their answer instead of stopping the stage."""
        self._directory = job.scratch / STATES
        self._index = index
        self._stored_dtype = job.config.extract.dtype.name
        self._compute_dtype = getattr(torch, job.config.target.dtype.name)

    def write(self, turn: int, input_ids: Sequence[int], transfer: Transfer) -> str:
        """Check the hidden states of a turn and write them in the stored dtype; returns the name of the file."""
        token_ids, hidden_states = transfer.load()
        item = f"conversation {self._index}"
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


def last_turns(turns: list[dict[str, Any]]) -> list[int]:
    """Indices of the turns that are not the beginning of the next one's prompt: one for each row of `merge_turns`."""
    return [i for i, turn in enumerate(turns) if turn is turns[-1] or not continues(turn, turns[i + 1])]


def _sequences(turns: list[dict[str, Any]]) -> list[TokenSequence]:
    return merge_turns([ChatTurn(prompt_ids=turn["prompt_ids"], answer_ids=turn["answer_ids"]) for turn in turns])


def _lacks_hidden_states(answered: dict[str, Any]) -> bool:
    """Whether the conversation has answers, and this stage has no file with their hidden states."""
    return bool(answered["turns"]) and not any("states" in turn for turn in answered["turns"])


def _keeps_hidden_states(job: Job) -> bool:
    return "capture_layer_ids" in job.derived


def _write_hidden_states(
    job: Job, kept: list[dict[str, Any]], writer: ShardWriter, copied: dict[int, StoredHiddenStates]
) -> None:
    """Write the hidden states of the kept turns into shards, except rows that an earlier attempt sealed.

    `copied` are those of earlier artifacts, by row; the others are files of this stage.
    """
    unsealed: dict[int, list[Path]] = {}
    for number, answered in enumerate(kept):
        row, begin = answered["index"], 0
        turns, sequences = [answered["turns"][i] for i in last_turns(answered["turns"])], _sequences(answered["turns"])
        files = [job.scratch / STATES / turn["states"] for turn in turns if "states" in turn]
        for turn, sequence in zip(turns, sequences, strict=True):
            turn["states"] = [row, begin, len(sequence.input_ids) - 1]
            begin += len(sequence.input_ids) - 1
        if row not in writer.done:
            unsealed[row] = files
            if row in copied:
                writer.add_encoded(row, *_copy_turns(job, copied[row], sequences))
            else:
                writer.add_encoded(row, *_read_turns(job, files, sequences))
        for sealed_row in unsealed.keys() & writer.done:
            for file in unsealed.pop(sealed_row):
                file.unlink()
        job.progress(number + 1, len(kept), "conversations")
    writer.close()
    job.digests_written |= {f"{ANSWER_STATES}/{name}": digest for name, digest in writer.digests.items()}


def _copy_turns(
    job: Job, stored: StoredHiddenStates, rows: list[TokenSequence]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Read one conversation from an earlier artifact; returns what `_read_turns` does."""
    input_ids = [token for row in rows for token in row.input_ids[:-1]]
    mask = torch.cat([last_layer_mask(job, row.loss_mask)[:-1] for row in rows])
    token_ids, tensors = stored.shards.read(stored.row, input_ids, mask)
    return token_ids, tensors, mask


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
    client: Client, conversation: ConversationRow, config: Config, files: TurnFiles | None = None
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
    prompt_fields = template_fields(config.target, conversation)
    sampling, digest = sampling_fields(config.regenerate), row_digest(conversation)
    for message in conversation["messages"]:
        messages.append(message)
        if message["role"] != "user":
            continue
        prompt_ids = await client.tokenize(messages, item=item, affinity_key=affinity_key, **prompt_fields)
        available_tokens = config.max_seq_len - len(prompt_ids)
        if available_tokens <= 0:
            dropped = "prompt_too_long"
            break
        completion = await client.chat(
            messages,
            item=item,
            affinity_key=affinity_key,
            max_tokens=min(config.regenerate.max_tokens, available_tokens),
            seed=request_seed(config.regenerate.seed, digest, len(turns)),
            **sampling,
            **prompt_fields,
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
                input_ids = [*completion.prompt_ids, *completion.token_ids[:-1]]
                turn["states"] = await asyncio.to_thread(files.write, len(turns), input_ids, transfer)
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


async def prefill(client: Client, answered: dict[str, Any], files: TurnFiles) -> dict[str, Any]:
    """Compute the hidden states of a conversation that is answered already; returns it with the names of their files.

    Unusable hidden states end the conversation before the first answer that needs them, if the recipe says so.
    """
    turns = [dict(turn) for turn in answered["turns"]]
    item = f"conversation {answered['id']}"
    kept = 0
    for index, sequence in zip(last_turns(turns), _sequences(turns), strict=True):
        turn, input_ids = turns[index], sequence.input_ids[:-1]
        logprobs = {"logprobs": 1} if files.sampled and "picks" not in turn else {}
        try:
            completion = await client.prefill(input_ids, item=item, affinity_key=item, **logprobs)
            transfer = await client.requested_states(completion, item=item)
            turn["states"] = await asyncio.to_thread(files.write, index, input_ids, transfer)
        except (StageError, ContractError) as error:  # only these hidden states failed, not the server
            if not files.skips:
                raise
            bad = {"dropped": BAD_STATES, "why": error.message, "turns": turns[:kept]}
            return {**answered, **bad, "messages": _messages_until(answered["messages"], kept)}
        if logprobs:
            greedy_tokens = greedy_tokens_in_answer(completion)
            turn["picks"] = [(len(turn["answer_ids"]) - 1, *rest) for _, *rest in greedy_tokens]
        kept = index + 1
    return {**answered, "turns": turns, "prefilled": True}


def _messages_until(messages: list[Message], answers: int) -> list[Message]:
    """The messages up to this number of answers; none for 0."""
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: indices[answers - 1] + 1] if answers else []


def in_order(conversations: list[ConversationRow], waiting: Iterable[int]) -> list[int]:
    """Sort the waiting conversations by system prompt, so that the server's prefix cache has it for the next one."""

    def system_prompt(index: int) -> str:
        first = next(iter(conversations[index]["messages"]), {"role": ""})
        return str(first["content"]) if first["role"] == "system" else ""

    return sorted(waiting, key=lambda index: (system_prompt(index), index))


def _dropped(finished: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Number of conversations with missing turns, by reason."""
    return dict(Counter(answered["dropped"] for answered in finished.values() if answered["dropped"]))
