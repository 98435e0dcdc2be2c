"""regenerate: what was answered before is not answered again, whatever for; killed in between, the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from speculators.answers import read_rows
from speculators.config.choices import HiddenStatesDtype, OnBadRow
from speculators.config.fields import select
from speculators.config.schema import Config, from_builtins
from speculators.engine.client import Client, Completion
from speculators.engine.transfer import FileTransfer
from speculators.errors import ContractError, StageError
from speculators.features.shards import ShardReader
from speculators.job import Endpoint, Job, ReusableRows
from speculators.runner.planning.graph import KEEPING, KINDS
from speculators.stages import regenerate
from tests.stages.jobs import lines, make_job

WIDTH = 4
TALKS = [["what"], ["empty"], ["how so", "and then"], ["x " * 40], ["why"], ["who", "empty"]]
"""User messages of conversations. The target answers `empty` with nothing, and the one of 40 tokens is too long."""


class Target(Client):
    """A client whose target is played: tokens are words, a prompt begins with all that was said before."""

    answered: ClassVar[list[str]] = []
    prefilled: ClassVar[list[int]] = []
    layers: ClassVar[list[int]] = []
    dies_after: ClassVar[int] = 1 << 30
    bad: ClassVar[str] = ""

    async def tokenize(self, messages: Any, *, item: str, affinity_key: str = "", **fields: Any) -> list[int]:
        return [
            sum(word.encode()) % 97 for message in messages for word in [message["role"], *message["content"].split()]
        ]

    async def chat(self, messages: Any, *, item: str, affinity_key: str = "", **fields: Any) -> Completion:
        if len(self.answered) == self.dies_after:
            raise KeyboardInterrupt
        self.answered.append(messages[-1]["content"])
        text = "" if messages[-1]["content"] == "empty" else f"so {messages[-1]['content']} it is"
        spoken = [*messages, {"role": "assistant", "content": text}]
        prompt = await self.tokenize(messages, item=item)
        ids = (await self.tokenize(spoken, item=item))[len(prompt) :]
        logprobs = [{token: -0.1} for token in ids] if "logprobs" in fields else []
        return said(prompt, ids, text, logprobs)

    async def prefill(self, token_ids: Any, *, item: str, affinity_key: str = "", **fields: Any) -> Completion:
        self.prefilled.append(len(token_ids))
        return said(list(token_ids), [7], "x", [{7: -0.2}] if "logprobs" in fields else [])

    async def requested_states(self, answer: Completion, *, item: str) -> FileTransfer:
        ids = [*answer.prompt_ids, *(answer.token_ids[:-1] if answer.text != "x" else [])]
        path = self.endpoint.directory / f"{item}-{len(ids)}.safetensors"
        states = states_of(ids, self.layers)
        if self.bad and item.endswith(self.bad):
            states[:] = torch.nan
        save_file({"hidden_states": states, "token_ids": torch.tensor(ids)}, path)
        return FileTransfer(path)


def said(prompt: list[int], ids: list[int], text: str, logprobs: list[dict[int, float]]) -> Completion:
    return Completion(
        prompt_ids=prompt, token_ids=ids, text=text, finish_reason="stop", logprobs=logprobs, kv_transfer_params={},
        seconds=0.0,
    )  # fmt: skip


def states_of(ids: list[int], layers: list[int]) -> torch.Tensor:
    """Of each token and layer by itself, in float8 without rounding."""
    return torch.tensor(ids)[:, None, None] % 8 + torch.tensor(layers)[None, :, None] * torch.ones(1, 1, WIDTH)


@pytest.fixture(autouse=True)
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regenerate, "Client", Target)
    for name, value in (("answered", []), ("prefilled", []), ("layers", []), ("dies_after", 1 << 30), ("bad", "")):
        monkeypatch.setattr(Target, name, value)


class Runs:
    """Runs of `regenerate` in one directory."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.config = root, config
        (root / "target").mkdir()
        # An answer has the token of its role, and so has one that is empty.
        role = sum(b"assistant") % 97
        (root / "target/config.json").write_text(json.dumps({"hidden_size": WIDTH, "eos_token_id": role}))
        config.regenerate.max_tokens, config.max_seq_len, config.regenerate.concurrency = 20, 30, 1

    def job(
        self, name: str, talks: list[list[str]], *, layers: list[int] | None = None, dtype: str = "bfloat16",
        last_state: str = "everywhere", reuse: tuple[ReusableRows, ...] = (), served: bool = True,
    ) -> Job:  # fmt: skip
        """A job over conversations; `layers` are those whose states are kept, None: no pipeline that keeps any."""
        prompts = self.root / f"{name}-prompts"
        prompts.mkdir(exist_ok=True)
        rows = [
            {"id": f"c{i}", "source": "s", "messages": [{"role": "user", "content": text} for text in talk]}
            for i, talk in enumerate(talks)
        ]
        (prompts / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config.extract.dtype = HiddenStatesDtype[dtype]
        job = make_job("regenerate", self.root / name, self.config, prompts=prompts, target=self.root / "target")
        job.config = from_builtins(Config, select(self.config, (*KINDS["regenerate"].reads, *KEEPING)))
        job.digests |= {"target": "t", "prompts": name}
        if layers is not None:
            job.derived |= {"capture_layer_ids": layers, "last_state": last_state}
            Target.layers = layers
        if served:
            job.services["target"] = Endpoint(
                url="http://127.0.0.1:1", model="m", api_key="", mode="extract", directory=self.root, log=self.root
            )
        job.reuse = list(reuse)
        return job

    def run(self, name: str, talks: list[list[str]], **how: Any) -> Job:
        job = self.job(name, talks, **how)
        regenerate.main(job)
        return job


@pytest.fixture
def runs(tmp_path: Path, config: Config) -> Runs:
    config.target.dtype = type(config.target.dtype).float32
    return Runs(tmp_path, config)


def rows_of(job: Job, *, states: bool = False) -> ReusableRows:
    """What the runner passes of an artifact."""
    return ReusableRows(
        conversations=job.output / "conversations.jsonl", hidden_states=job.output / "states" if states else None
    )


def contents(job: Job) -> tuple[Any, ...]:
    """Published conversations without greedy tokens, drops, and states with NaN as 99."""
    published = lines(job.output / "conversations.jsonl")
    for line in published:
        for turn in line["turns"]:
            turn.pop("picks", None)
    states = []
    if "capture_layer_ids" in job.derived:
        reader = ShardReader(job.output / "states")
        states = [
            (reader.token_ids(row).tolist(), reader.hidden_states(row).nan_to_num(99).tolist()) for row in reader.rows
        ]
    return published, list(read_rows(job.output)), states


FUSED: dict[str, Any] = {"layers": [0, 2, 4]}
VARIANTS: dict[str, tuple[dict[str, Any], bool, int]] = {
    "the same": (FUSED, True, 0),
    "fewer layers": ({"layers": [2, 4]}, True, 0),
    "the last layer at answers only": ({**FUSED, "last_state": "answers"}, True, 0),
    "other layers": ({"layers": [0, 3, 4]}, False, 3),
    "another format": ({**FUSED, "dtype": "float8_e4m3fn"}, False, 3),
    "no states": ({}, False, 0),
}
"""What is wanted after a fused run: how, whether its states fit, and how many conversations are prefilled for it."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grown", [False, True])
def test_no_conversation_is_answered_twice(runs: Runs, variant: str, grown: bool) -> None:
    how, fits, prefilled = VARIANTS[variant]
    talks = TALKS if grown else TALKS[:5]
    earlier = runs.run("earlier", TALKS[:5], **FUSED)
    assert (earlier.record["reused"], earlier.record["answered"]) == (0, 5)
    fresh = runs.run("fresh", talks, **how)
    Target.answered.clear()
    job = runs.run("again", talks, **how, reuse=(rows_of(earlier, states=fits),), served=grown or prefilled > 0)
    assert Target.answered == ([] if not grown else ["who", "empty"])
    assert (job.record["reused"], job.record["answered"], job.record["prefilled"]) == (5, grown, prefilled)
    assert len(Target.prefilled) == prefilled
    assert contents(job) == contents(fresh)
    assert job.record["dropped"] == fresh.record["dropped"] == {"empty_answer": 1, "prompt_too_long": 1}
    in_part = {"empty_answer": 1} if grown else {}
    assert job.record["kept_in_part"] == fresh.record["kept_in_part"] == in_part
    assert job.record["faults"] == fresh.record["faults"] == {"empty": 1 + grown}


def test_answers_without_states_are_prefilled_and_have_greedy_tokens_to_be_checked_by(runs: Runs) -> None:
    earlier = runs.run("offline", TALKS)
    fresh = runs.run("fresh", TALKS, **FUSED)
    job = runs.run("fused", TALKS, **FUSED, reuse=(rows_of(earlier),))
    assert contents(job) == contents(fresh)
    turn = lines(job.output / "conversations.jsonl")[0]["turns"][-1]
    assert turn["picks"] == [[len(turn["answer_ids"]) - 1, 7, -0.2]]


def test_killed_in_between_the_rest_alone_is_answered_by_the_next_attempt_and_by_other_recipes(runs: Runs) -> None:
    earlier = runs.run("earlier", TALKS[:2], **FUSED)
    Target.answered.clear()
    Target.dies_after = 1
    reuse = (rows_of(earlier, states=True),)
    with pytest.raises(KeyboardInterrupt):
        runs.run("killed", TALKS, **FUSED, reuse=reuse)
    Target.dies_after = 1 << 30
    attempt = ReusableRows(conversations=runs.root / "killed/scratch/answers.jsonl")
    other = runs.run("other", TALKS, layers=[0, 1, 4], reuse=(rows_of(earlier), attempt))
    assert (other.record["reused"], Target.answered.count("how so")) == (2, 2)
    Target.answered.clear()
    job = runs.run("killed", TALKS, **FUSED, reuse=reuse)
    assert (job.record["resumed"], job.record["reused"], Target.answered[:1]) == (2, 2, ["how so"])
    assert contents(job) == contents(runs.run("fresh", TALKS, **FUSED))


def test_an_artifact_that_is_deleted_meanwhile_costs_its_rows_and_no_more(runs: Runs) -> None:
    earlier = runs.run("earlier", TALKS, **FUSED)
    reuse = (rows_of(earlier, states=True),)
    Target.answered.clear()
    Target.dies_after = 0
    with pytest.raises(KeyboardInterrupt):
        runs.run("again", [*TALKS, ["late"]], **FUSED, reuse=reuse)
    shutil.rmtree(earlier.output)
    Target.dies_after = 1 << 30
    job = runs.run("again", [*TALKS, ["late"]], **FUSED, reuse=reuse)
    assert (Target.answered, job.record["prefilled"]) == (["late"], 4)
    with pytest.raises(StageError, match="6 of 6 rows are no longer in the store"):
        runs.run("unserved", TALKS, **FUSED, reuse=reuse, served=False)


def test_hidden_states_of_other_tokens_are_refused(runs: Runs) -> None:
    earlier, other = runs.run("earlier", TALKS, **FUSED), runs.run("other", [["a b"], *TALKS[1:]], **FUSED)
    shutil.rmtree(earlier.output / "states")
    shutil.copytree(other.output / "states", earlier.output / "states")
    with pytest.raises(ContractError, match="row 0 is of other tokens") as refused:
        runs.run("again", TALKS, **FUSED, reuse=(rows_of(earlier, states=True),))
    assert "verify --quarantine" in refused.value.hint


def test_bad_hidden_states_end_a_conversation_and_are_requested_again_by_the_next(runs: Runs) -> None:
    runs.config.extract.on_bad_row = OnBadRow.skip
    earlier = runs.run("earlier", TALKS)
    Target.bad = "c2"
    job = runs.run("bad", TALKS, **FUSED, reuse=(rows_of(earlier),))
    assert (job.record["dropped"]["bad_states"], job.record["kept"]) == (1, 3)
    Target.bad = ""
    Target.answered.clear()
    runs.run("again", TALKS, **FUSED, reuse=(rows_of(job, states=True),))
    assert Target.answered == ["how so", "and then"]
