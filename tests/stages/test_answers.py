"""regenerate against a server on loopback: answers that are sampled, cut, looping, refused, or calls; killed twice."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import OnFault
from speculators.config.schema import Config
from speculators.data.answer_faults import repetition_start
from speculators.data.answer_log import AnswerLog
from speculators.data.template import merge_turns, stored_turns
from speculators.errors import StageError
from speculators.job import Endpoint, Job
from speculators.stages import regenerate
from tests.loopback import JsonHandler, serving
from tests.stages.jobs import lines, make_job

END = 2
FIND = {"name": "find", "arguments": {"word": "harbour"}}


def rendered(body: dict[str, Any]) -> list[int]:
    """A prompt: a token a word, messages and what the template gets with them."""
    spoken = " ".join(f"<{m['role']}> {m['content']}" for m in body["messages"])
    extra = [*body.get("tools", ()), *sorted(body.get("chat_template_kwargs", {}).items())]
    return [3 + hash_of(word) for word in [*map(json.dumps, extra), *spoken.split(), "<assistant>"]]


def hash_of(text: str) -> int:
    return sum(position * byte for position, byte in enumerate(text.encode(), 7)) % 997


class Target:
    """A target whose answer follows from the prompt, and with a temperature from the request's seed."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        target = self

        class Handler(JsonHandler):
            def get(self) -> None:
                self.reply(200, {})

            def post(self, body: dict[str, Any]) -> None:
                if self.path == "/tokenize":
                    self.reply(*target.tokenize(body))
                else:
                    self.reply(200, target.chat(body))

        self.http = serving(Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def tokenize(self, body: dict[str, Any]) -> tuple[int, Any]:
        if any("refuse" in message["content"] for message in body["messages"]):
            return 400, {"error": {"message": "System role not supported"}}
        return 200, {"tokens": rendered(body)}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(body)
        prompt, last = rendered(body), body["messages"][-1]["content"]
        words = [f"w{word % 50}" for word in self.words(body, prompt, last)]
        text = json.dumps(FIND) if "call" in last else " ".join(words[: body["max_tokens"]])
        ids = [3 + hash_of(word) for word in text.split()]
        finish = "stop"
        if len(words) >= body["max_tokens"] and "call" not in last:
            finish = "length"
        else:
            ids.append(END)
        message: dict[str, Any] = {"content": text}
        if (
            "call" in last and body.get("tools") and "tool_choice" not in body
        ):  # a parser takes the call out of the text
            function = {"name": FIND["name"], "arguments": json.dumps(FIND["arguments"])}
            call = {"id": "t1", "type": "function", "function": function}
            message, finish = {"content": None, "reasoning": "hm", "tool_calls": [call]}, "tool_calls"
        choice = {"message": message, "token_ids": ids, "finish_reason": finish}
        return {"prompt_token_ids": prompt, "choices": [choice]}

    def words(self, body: dict[str, Any], prompt: list[int], last: str) -> list[int]:
        source = random.Random(f"{body['seed']}" if body["temperature"] else f"{prompt}")
        length = 5 if "short" in last else 200
        spoken = [source.randrange(1 << 20) for _ in range(length)]
        return spoken[:10] + spoken[10:13] * 60 if "loop" in last else spoken


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.http.shutdown()
    target.http.server_close()


def rows_of(*talks: list[str], **fields: Any) -> list[dict[str, Any]]:
    """Conversations of user messages."""
    return [
        {"id": f"d/{i}", "source": "d", "messages": [{"role": "user", "content": text} for text in talk], **fields}
        for i, talk in enumerate(talks)
    ]


@pytest.fixture
def job_of(tmp_path: Path, config: Config, target: Target) -> Callable[..., Job]:
    config.regenerate.max_tokens, config.regenerate.concurrency = 80, 8

    def make(name: str, rows: list[dict[str, Any]]) -> Job:
        (tmp_path / "target").mkdir(exist_ok=True)
        (tmp_path / "target/config.json").write_text(json.dumps({"eos_token_id": END}))
        (tmp_path / f"{name}-prompts").mkdir(exist_ok=True)
        (tmp_path / f"{name}-prompts/conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = tmp_path / f"{name}-prompts"
        job = make_job("regenerate", tmp_path / name, config, prompts=prompts, target=tmp_path / "target")
        job.services["target"] = Endpoint(
            url=target.url, model="m", api_key="", mode="generate", directory=tmp_path, log=tmp_path / "log"
        )
        return job

    return make


def published(job: Job) -> list[Any]:
    return lines(job.output / "conversations.jsonl")


def run_killed_twice(job_of: Callable[[], Job], monkeypatch: pytest.MonkeyPatch, each: int) -> Job:
    """Run to the end in three attempts; the first two are killed after so many lines, in the middle of the next."""
    real, appended = AnswerLog.append, 0

    def until_killed(log: AnswerLog, answered: dict[str, Any]) -> None:
        nonlocal appended
        if appended == each:
            with (job.scratch / "answers.jsonl").open("a") as file:
                file.write(json.dumps(answered)[:40])
            os.kill(os.getpid(), signal.SIGKILL)
        appended += 1
        real(log, answered)

    monkeypatch.setattr(AnswerLog, "append", until_killed)
    for _ in range(2):
        job = job_of()
        if not (child := os.fork()):
            try:
                regenerate.main(job)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(AnswerLog, "append", real)
    job = job_of()
    regenerate.main(job)
    assert job.record["resumed"] == 2 * each
    return job


def test_prompts_that_differ_in_a_number_have_different_sampled_answers_and_the_same_again(
    job_of: Callable[..., Job], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.regenerate.temperature = 1.0
    rows = rows_of(*([f"ticket {number} is open"] for number in range(48)))
    first = job_of("first", rows)
    regenerate.main(first)
    answers = {row["messages"][-1]["content"] for row in published(first)}
    assert len(answers) == 48
    killed = run_killed_twice(lambda: job_of("killed", rows), monkeypatch, 11)
    assert published(killed) == published(first)


@pytest.mark.parametrize("on_cut", ["keep", "end"])
def test_each_conversation_of_256_is_there_once_or_counted_whatever_happens_on_the_way(
    job_of: Callable[..., Job], config: Config, monkeypatch: pytest.MonkeyPatch, on_cut: str
) -> None:
    config.regenerate.on_loop, config.regenerate.on_cut = OnFault.mask, OnFault[on_cut]
    kinds = ("short", "long", "loop", "long")
    talks = [[f"{kinds[i % 4]} {i}", f"{kinds[(i + 1) % 4]} and {i}"] for i in range(256)]
    talks[100] = ["short first", "refuse this"]
    talks[101] = ["refuse me", "short"]
    job = run_killed_twice(lambda: job_of("job", rows_of(*talks)), monkeypatch, 60)
    record, made = job.record, published(job)
    assert record["conversations"] == 256
    assert record["kept_whole"] + sum(record["kept_in_part"].values()) + sum(record["dropped"].values()) == 256
    assert (record["dropped"], record["kept_in_part"]["refused"]) == ({"refused": 1}, 1)
    assert record["kept_in_part"].get("cut_answer", 0) == (0 if on_cut == "keep" else 191)
    assert [row["id"] for row in made] == [f"d/{i}" for i in range(256) if i != 101]
    assert lines(job.output / "errors.jsonl") == [
        {"id": f"d/{i}", "source": "d", "reason": "System role not supported"} for i in (100, 101)
    ]
    turns = [turn for row in made for turn in row["turns"]]
    assert record["finish_reasons"] == dict(Counter(turn["finish_reason"] for turn in turns))
    assert record["faults"]["cut"] == record["finish_reasons"]["length"] > len(turns) / 2
    loops = [turn for turn in turns if repetition_start(turn["answer_ids"]) is not None]
    assert len(loops) == record["faults"]["looping"] > 60
    assert all(turn["supervised"] == [0, repetition_start(turn["answer_ids"])] for turn in loops)
    supervised = sum(sum(row.loss_mask) for one in made for row in merge_turns(stored_turns(one["turns"])))
    assert supervised == record["supervised_tokens"] < record["answer_tokens"]
    told = "\n".join(record["notes"])
    assert "end in an exact loop: regenerate.on_loop=mask" in told
    assert "the server refuses 2 conversations (errors.jsonl): System role not supported" in told


def test_a_target_that_refuses_most_conversations_is_an_error(job_of: Callable[..., Job]) -> None:
    with pytest.raises(StageError, match=r"the server refuses 5 of 5 conversations; the last: System role") as error:
        regenerate.main(job_of("job", rows_of(*(["refuse", "x"] for _ in range(20)))))
    assert "chat template accepts" in error.value.hint


def with_tools(call_text: str, recorded: dict[str, Any]) -> list[dict[str, Any]]:
    messages = [
        {"role": "user", "content": call_text},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "r1", "type": "function", "function": recorded}]},
        {"role": "tool", "content": "short result", "tool_call_id": "r1"},
        {"role": "user", "content": "short thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    return [{"id": "d/0", "source": "d", "messages": messages, "tools": tools}]


@pytest.mark.parametrize(
    ("text", "recorded", "roles", "dropped"),
    [
        ("call it", FIND, "user assistant tool assistant user assistant", {}),
        ("call it", {**FIND, "arguments": {"word": "pier"}}, "user assistant", {"other_call": 1}),
        ("short text", FIND, "user assistant", {"other_call": 1}),
    ],
)
def test_recorded_results_follow_the_recorded_call_only(
    job_of: Callable[..., Job], target: Target, text: str, recorded: dict[str, Any], roles: str, dropped: dict[str, int]
) -> None:
    job = job_of("job", with_tools(text, recorded))
    regenerate.main(job)
    (made,) = published(job)
    assert [message["role"] for message in made["messages"]] == roles.split()
    assert len(made["turns"]) == roles.count("assistant")
    assert (job.record["kept_in_part"], job.record["dropped"]) == (dropped, {})
    assert {request["tool_choice"] for request in target.requests} == {"none"}  # the server has no parser
    assert all(request["tools"] == made["tools"] for request in target.requests)


def test_an_answer_that_is_all_thought_and_call_is_not_empty_and_its_results_follow(
    job_of: Callable[..., Job], config: Config, target: Target
) -> None:
    config.serve.tool_call_parser = "hermes"
    job = job_of("job", with_tools("call it", FIND))
    regenerate.main(job)
    (made,) = published(job)
    assert " ".join(message["role"] for message in made["messages"]) == "user assistant tool assistant user assistant"
    own = made["messages"][1]
    assert (own["content"], own["reasoning_content"]) == ("", "hm")
    assert own["tool_calls"] == [{"id": "r1", "type": "function", "function": FIND}]
    sent = target.requests[1]["messages"][1]
    assert sent["tool_calls"][0]["function"]["arguments"] == json.dumps(FIND["arguments"])
    assert (sent["reasoning"], job.record["faults"], job.record["kept_whole"]) == ("hm", {}, 1)


def test_variables_of_the_template_are_in_the_prompt_and_not_supervised(
    job_of: Callable[..., Job], config: Config
) -> None:
    config.target.chat_template_kwargs = {"enable_thinking": False}
    job = job_of("job", [*rows_of(["short"]), {**rows_of(["short"])[0], "id": "d/1"}])
    regenerate.main(job)
    scaffold = 3 + hash_of(json.dumps(["enable_thinking", False]))
    for row in published(job):
        (sequence,) = merge_turns(stored_turns(row["turns"]))
        assert sequence.input_ids[0] == scaffold
        assert sequence.loss_mask[0] == 0
