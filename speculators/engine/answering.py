"""Has the target answer a conversation, or compute the hidden states of one that it has answered."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

from speculators.answers import BAD_STATES, row_digest
from speculators.config.schema import Config, Regenerate
from speculators.data.answer_faults import CUT, EMPTY, LOOPING, judge
from speculators.data.conversations import ConversationRow, Message
from speculators.engine.client import Client, Completion, RefusedError
from speculators.engine.sampling import request_seed, sampling_fields, template_fields
from speculators.engine.tool_calls import agrees, answer_message, as_request, segments
from speculators.engine.turn_states import TurnFiles, continues, last_turns, sequences
from speculators.errors import ContractError, StageError
from speculators.targets.fidelity_check import greedy_tokens_in_answer

TOO_LONG, REFUSED, OTHER_CALL = "prompt_too_long", "refused", "other_call"
OF_FAULTS = {CUT: "cut_answer", LOOPING: "looping_answer", EMPTY: "empty_answer"}
"""Why answers are missing in a conversation, `dropped`, apart from BAD_STATES; by fault where a rule demands it."""


class Answering:
    """Requests the answers of one conversation. `turns` has those so far, which `answered` returns."""

    def __init__(
        self,
        client: Client,
        conversation: ConversationRow,
        config: Config,
        files: TurnFiles | None,
        ends: Collection[int],
        target: Path | None,
    ) -> None:
        self._client, self._conversation, self._config, self._files = client, conversation, config, files
        self._end_tokens = ends
        self._messages: list[Any] = []
        self._kept = 0
        self.turns: list[dict[str, Any]] = []
        self._item = f"conversation {conversation['id']}"
        self._prompt = template_fields(config.target, conversation)
        self._digest = row_digest(conversation)
        self._sampling = sampling_fields(config.regenerate, target, self._digest)

    def answered(self, dropped: str | None, why: str = "") -> dict[str, Any]:
        """The conversation with the answers that are kept, and the reason if some are missing."""
        messages = self._messages[: self._kept]
        answered = {**self._conversation, "messages": messages, "turns": self.turns, "dropped": dropped}
        return answered | ({"why": why} if why else {})

    async def run(self) -> dict[str, Any]:
        """Answer the conversation until its end, or a reason to end it."""
        parts = list(segments(self._conversation["messages"]))
        try:
            for number, part in enumerate(parts):
                self._messages += part.messages
                completion = await self._request()
                if completion is None:
                    return self.answered(TOO_LONG)
                config = self._config.regenerate
                verdict = judge(completion.token_ids, completion.finish_reason, self._end_tokens, config)
                if verdict.drops:
                    self.turns, self._kept = [], 0
                    return self.answered(OF_FAULTS[verdict.ended_by])
                if verdict.ended_by == EMPTY:
                    return self.answered(OF_FAULTS[EMPTY])
                if why := await self._keep_turn(completion):
                    return self.answered(BAD_STATES, why)
                message = answer_message(completion)
                self._messages.append(message)
                self._kept = len(self._messages)
                is_last = number == len(parts) - 1
                if verdict.ended_by:
                    return self.answered(None if is_last else OF_FAULTS[verdict.ended_by])
                if self._conversation.get("tools") and not is_last and not agrees(message, part.recorded or {}):
                    return self.answered(OTHER_CALL)
        except RefusedError as error:
            return self.answered(REFUSED, error.reason)
        return self.answered(None)

    async def _request(self) -> Completion | None:
        """Request the next answer; None if the prompt leaves no room for one."""
        messages = [as_request(message) for message in self._messages]
        common = {"item": self._item, "affinity_key": self._item}
        prompt_ids = await self._client.tokenize(messages, **common, **self._prompt)
        available_tokens = self._config.max_seq_len - len(prompt_ids)
        if available_tokens <= 0:
            return None
        config = self._config.regenerate
        calls = {}
        if "tools" in self._prompt and not self._config.serve.tool_call_parser:
            calls = {"tool_choice": "none"}  # the prompt has the tools, and the text of the answer the calls
        return await self._client.chat(
            messages,
            **common,
            max_tokens=min(config.max_tokens, available_tokens),
            seed=request_seed(config.seed, self._digest, len(self.turns)),
            **self._sampling,
            **self._prompt,
            **calls,
            **(self._files.request if self._files else {}),
        )

    async def _keep_turn(self, completion: Completion) -> str:
        """Add an answer to `turns`, with its hidden states if they are kept; returns why these cannot be used."""
        turn: dict[str, Any] = {"prompt_ids": completion.prompt_ids, "answer_ids": completion.token_ids}
        turn["finish_reason"] = completion.finish_reason
        if self._files:
            try:
                transfer = await self._client.requested_states(completion, item=self._item)
                input_ids = [*completion.prompt_ids, *completion.token_ids[:-1]]
                turn["states"] = await asyncio.to_thread(self._files.write, len(self.turns), input_ids, transfer)
            except (StageError, ContractError) as error:  # only this answer failed, not the server
                if not self._files.skips:
                    raise
                return error.message
            if self.turns and continues(self.turns[-1], turn):
                self._files.delete(self.turns[-1].pop("states"))
            if greedy_tokens := greedy_tokens_in_answer(completion):
                turn["picks"] = greedy_tokens
        self.turns.append(turn)
        return ""


async def answer(
    client: Client,
    conversation: ConversationRow,
    config: Config,
    files: TurnFiles | None = None,
    end_tokens: Collection[int] = (),
    target: Path | None = None,
) -> dict[str, Any]:
    """Answer a conversation; `dropped` is the reason if turns are missing, else None. The turns before are kept.

    A prompt and its answer have at most `max_seq_len` tokens: the answer is cut, and a prompt of that length ends the
    conversation. So do a prompt that the server refuses, an answer at which a rule ends it (`answer_faults`), and
    one whose calls are not the recorded ones (`tool_calls`). `target` is the checkpoint, for
    `regenerate.sampling=model`.
    """
    return await Answering(client, conversation, config, files, end_tokens, target).run()


def judged(answered: dict[str, Any], config: Regenerate, end_tokens: Collection[int]) -> dict[str, Any]:
    """Apply the recipe's rules to the answers that are kept: the range of each that is supervised, and all faults.

    Answers of an earlier artifact may have been judged by other rules.
    """
    turns: list[dict[str, Any]] = []
    faults: list[str] = []
    for turn in answered["turns"]:
        verdict = judge(turn["answer_ids"], turn["finish_reason"], end_tokens, config)
        kept = {name: value for name, value in turn.items() if name != "supervised"}
        turns.append(kept if verdict.supervised is None else {**kept, "supervised": list(verdict.supervised)})
        faults += verdict.faults
    # An answer that ended its conversation, and is not among those that are kept.
    faults += [fault for fault, reason in OF_FAULTS.items() if reason == answered["dropped"] and fault not in faults]
    return {**answered, "turns": turns, "faults": faults}


async def prefill(client: Client, answered: dict[str, Any], files: TurnFiles) -> dict[str, Any]:
    """Compute the hidden states of a conversation that is answered already; returns it with the names of their files.

    Unusable hidden states end the conversation before the first answer that needs them, if the recipe says so.
    """
    turns = [dict(turn) for turn in answered["turns"]]
    item = f"conversation {answered['id']}"
    kept = 0
    for index, sequence in zip(last_turns(turns), sequences(turns), strict=True):
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
    """The messages up to this number of the target's answers; none for 0."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > first]
    return messages[: indices[answers - 1] + 1] if answers else []
