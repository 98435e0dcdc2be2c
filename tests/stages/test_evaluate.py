"""The parts of `evaluate` that need no server; `tests/smoke` runs it on the engine."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import DataFormat, Dtype, Sampling
from speculators.config.schema import Config, Dataset
from speculators.data.conversations import RowCounts, in_evaluation_holdout
from speculators.engine.client import Client
from speculators.engine.metrics import DraftCounters
from speculators.job import Endpoint, Job, write_json
from speculators.stages import evaluate
from speculators.stages.evaluate import SIDES, choose, lossless_pairs, summarise
from tests.loopback import JsonHandler, serving
from tests.stages.jobs import lines, make_job


def job_of(tmp_path: Path, *, trained: bool = False, count: int = 5, **changes: Any) -> Job:
    """A job on one set, `quiz`, of 100 questions."""
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"question {i}"}) + "\n" for i in range(100)))
    config = Config()
    config.evaluate.datasets = {"quiz": Dataset(source="x", format=DataFormat.prompts)}
    config.data = dict(config.evaluate.datasets) if trained else {}
    config.prompts.eval_holdout_ratio = 0.2
    config.evaluate.num_prompts = count
    for name, value in changes.items():
        setattr(config.evaluate, name, value)
    inputs = {f"dataset__{name}": path for name in config.evaluate.datasets}
    job = make_job("evaluate", tmp_path / "work", config, **inputs)
    job.derived = {"phase": 0, "phases": 1, "num_speculative_tokens": [3], "served_dtypes": ["bfloat16"]}
    return job


def record(name: str, plain: tuple[list[int], float], speculative: tuple[list[int], float]) -> dict[str, Any]:
    sides = zip(("baseline", "speculative"), (plain, speculative), strict=True)
    return {"id": name, **{side: {"token_ids": ids, "seconds": seconds} for side, (ids, seconds) in sides}}


def test_speed_and_acceptance_are_what_one_gets_by_hand() -> None:
    records = [
        record("a", ([1] * 10, 1.0), ([1] * 10, 0.5)),
        record("b", ([1] * 20, 2.0), ([2] * 20, 1.0)),
        record("c", ([1] * 10, 3.0), ([1] * 10, 2.5)),
    ]
    counted = DraftCounters(drafts=20, proposed=60, accepted=20, accepted_per_position={1: 12, 2: 6, 3: 2})
    found = summarise(records, {"baseline": 6.0, "speculative": 4.0}, counted, positions=3)
    assert found["baseline"]["tokens_per_second"] == pytest.approx(40 / 6)
    assert found["speculative"]["tokens_per_second"] == pytest.approx(10)
    assert found["speed_up"] == pytest.approx(1.5)
    assert found["baseline"]["ms_per_token"] == pytest.approx(100)  # of 100, 100 and 300
    assert found["speculative"]["ms_per_token"] == pytest.approx(50)  # of 50, 50 and 250
    assert found["acceptance_length"] == 2.0
    assert found["per_position"] == pytest.approx([0.6, 0.3, 0.1])
    assert found["conditional"] == pytest.approx([0.6, 0.5, 1 / 3])
    assert (found["prompts"], found["tokens"], found["identical_answers"]) == (3, 40, 2)


def test_the_prompts_of_a_set_are_the_same_every_time_and_fewer_are_a_part_of_more(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    five = choose(job, "quiz", RowCounts())
    assert choose(job, "quiz", RowCounts()) == five
    job.config.evaluate.num_prompts = 8
    assert choose(job, "quiz", RowCounts())[:5] == five
    assert five[0].id.startswith("quiz/")
    assert five[0].messages[0]["content"].startswith("question ")


def test_of_a_set_that_is_trained_on_only_held_out_rows_are_used_and_the_rest_is_counted(tmp_path: Path) -> None:
    job, counts = job_of(tmp_path, trained=True, count=1000), RowCounts()
    texts = {prompt.messages[0]["content"] for prompt in choose(job, "quiz", counts)}
    assert texts == {f"question {i}" for i in range(100) if in_evaluation_holdout(f"question {i}", 0.2)}
    assert counts.dropped == {"trained on": 100 - len(texts)}


def test_the_instruction_of_a_set_comes_before_its_prompts(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.config.evaluate.datasets["quiz"].instruction = "Go on:"
    assert choose(job, "quiz", RowCounts())[0].messages[0]["content"].startswith("Go on:\n\nquestion ")


def test_answers_are_compared_as_the_target_is_served_and_in_float32_where_that_fits(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert lossless_pairs(job) == {"bfloat16": SIDES}
    job.derived["served_dtypes"] = ["bfloat16", "float32"]
    assert lossless_pairs(job) == {"bfloat16": SIDES, "float32": ("baseline_float32", "speculative_float32")}
    job.config.target.dtype, job.derived["served_dtypes"] = Dtype.float32, ["float32"]
    assert lossless_pairs(job) == {"float32": SIDES}
    job.config.evaluate.lossless_prompts = 0
    assert lossless_pairs(job) == {}


def test_the_last_phase_publishes_what_the_earlier_ones_left_and_asks_no_server_again(tmp_path: Path) -> None:
    job = job_of(tmp_path, count=1000, concurrency=[1, 4])
    counted = DraftCounters(drafts=5, proposed=15, accepted=5, accepted_per_position={1: 4, 2: 1, 3: 0})
    for concurrency, seconds in ((1, 2.0), (4, 1.0)):
        records = [record("quiz/1", ([1, 2], seconds), ([1, 2], seconds / 2))]
        summary = summarise(records, {"baseline": seconds, "speculative": seconds / 2}, counted, 3)
        summary |= {"num_speculative_tokens": 3, "concurrency": concurrency}
        write_json(job.scratch / f"measured-quiz-3-{concurrency}.json", {"summary": summary, "records": records})
    difference = {"id": "quiz/2", "position": 4, "baseline": 1, "speculative": 2, "gap": None, "verdict": "fault"}
    compared = {"prompts": 2, "tokens": 9, "identical": 1, "ties": 0, "faults": 1, "differences": [difference]}
    write_json(job.scratch / "lossless-bfloat16-quiz-3.json", compared)

    job.derived |= {"phase": 0, "phases": 2}
    evaluate.main(job)
    assert not list(job.output.iterdir())

    job.derived |= {"phase": 1, "phases": 2}
    evaluate.main(job)
    found = json.loads((job.output / "evaluation.json").read_text())
    assert found["datasets"]["quiz"]["acceptance_length"] == 2.0
    assert found["datasets"]["quiz"]["measurements"][1]["concurrency"] == 4
    assert found["datasets"]["quiz"]["measurements"][1]["baseline"]["tokens_per_second"] == 2.0
    assert found["lossless"]["faults"] == 1
    assert found["lossless"]["comparisons"][0]["differences"] == [difference]
    assert job.record["lossless"]["faults"] == 1
    assert job.record["datasets"]["quiz"]["read"] == 100
    assert job.record["notes"] == ["quiz: measured on 100 prompts, of 1000 requested: it has no more"]
    assert len(lines(job.output / "quiz.jsonl")) == 2


class Engine:
    """A server whose draft proposes so many tokens in each answer, all of which are accepted; 0: a baseline."""

    def __init__(self, tokens: int, logprobs: dict[str, float] | None = None) -> None:
        self.answers = 0
        outer = self

        class Handler(JsonHandler):
            def get(self) -> None:
                each = [f'num_accepted_tokens_per_pos_total{{position="{i}"}} {outer.answers}' for i in range(tokens)]
                counts = [f"num_drafts_total {outer.answers}", f"num_accepted_tokens_total {tokens * outer.answers}"]
                page = "".join(f"vllm:spec_decode_{line}\n" for line in (*counts, *each)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def post(self, body: dict[str, Any]) -> None:
                if logprobs:
                    shown = {"tokens": ["token_id:7"], "top_logprobs": [logprobs]}
                    choice = {"text": "", "prompt_token_ids": [1], "token_ids": [7], "finish_reason": "length"}
                    self.reply(200, {"choices": [{**choice, "logprobs": shown}]})
                    return
                outer.answers += 1
                choice = {"message": {"content": "a"}, "token_ids": [7] * body["max_tokens"], "finish_reason": "length"}
                self.reply(200, {"prompt_token_ids": [1], "choices": [choice]})

        self.http = serving(Handler)
        url, mode = f"http://127.0.0.1:{self.http.server_port}", "speculative" if tokens else "baseline"
        self.endpoint = Endpoint(url=url, model="m", api_key="", mode=mode, directory=Path("/none"), log=Path("/none"),
                                 num_speculative_tokens=tokens)  # fmt: skip

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def test_each_number_of_tokens_is_measured_on_its_own_server_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a dataset may have the name that the hub gives it."""
    monkeypatch.setattr("speculators.engine.metrics.METRICS_POLL_SECONDS", 0.0)
    name, engines = "acme/short-lines", {tokens: Engine(tokens) for tokens in (0, 2, 5)}
    quiz = Dataset(source="x", format=DataFormat.prompts)
    job = job_of(
        tmp_path, count=3, datasets={name: quiz}, concurrency=[1, 2], max_tokens=9, num_speculative_tokens=[2, 5]
    )
    job.config.target.dtype = Dtype.float32  # so that the timed answers are compared
    job.derived |= {"num_speculative_tokens": [2, 5], "phases": 2}
    for phase, tokens in enumerate((2, 5)):
        job.derived["phase"] = phase
        job.services = {"baseline": engines[0].endpoint, "speculative": engines[tokens].endpoint}
        evaluate.main(job)
        answers = [engine.answers for engine in engines.values()]
        evaluate.main(job)  # as an attempt after the end of this phase
        assert [engine.answers for engine in engines.values()] == answers
    found = json.loads((job.output / "evaluation.json").read_text())
    measured = found["datasets"][name]["measurements"]
    assert [(m["num_speculative_tokens"], m["concurrency"]) for m in measured] == [(2, 1), (2, 2), (5, 1), (5, 2)]
    assert [m["acceptance_length"] for m in measured] == [3, 3, 6, 6]
    assert [len(m["per_position"]) for m in measured] == [2, 2, 5, 5]
    assert found["lossless"]["prompts"] == found["lossless"]["identical"] == 6
    assert {path.name for path in job.output.iterdir()} == {"evaluation.json", "acme%2Fshort-lines.jsonl"}
    assert len(lines(job.output / "acme%2Fshort-lines.jsonl")) == 12
    for engine in engines.values():
        engine.close()


def test_servers_that_have_a_phase_each_give_the_result_that_they_give_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.engine.metrics.METRICS_POLL_SECONDS", 0.0)
    results = []
    for turns in ([(0, 2), (0, 5)], [(2,), (5,), (0,)]):
        engines = {tokens: Engine(tokens) for tokens in (0, 2, 5)}
        where = tmp_path / f"{len(turns)}"
        where.mkdir()
        job = job_of(where, count=3, concurrency=[1, 2], max_tokens=9, num_speculative_tokens=[2, 5])
        job.config.evaluate.temperature = 0.5  # so that greedy answers are others than the timed ones
        job.derived |= {"num_speculative_tokens": [2, 5], "phases": 2 * len(turns)}
        job.derived["served_dtypes"] = ["bfloat16", "float32"]
        for phase, up in enumerate([*turns, *turns]):
            suffix = "" if phase < len(turns) else "_float32"
            job.derived["phase"] = phase
            endpoints = [engines[tokens].endpoint for tokens in up]
            job.services = {f"{endpoint.mode}{suffix}": endpoint for endpoint in endpoints}
            evaluate.main(job)
            answers = [engine.answers for engine in engines.values()]
            evaluate.main(job)  # as an attempt after the end of this phase
            assert [engine.answers for engine in engines.values()] == answers
        text = (job.output / "evaluation.json").read_text()
        results.append(
            json.loads(re.sub(r'"(seconds|tokens_per_second|ms_per_token|speed_up)": [\d.e+-]+', '"t": 0', text))
        )
        assert len(lines(job.output / "quiz.jsonl")) == 12
        for engine in engines.values():
            engine.close()
    assert results[0] == results[1]
    assert results[0]["lossless"]["dtype"] == "float32"
    assert results[0]["lossless_served"]["dtype"] == "bfloat16"
    assert results[0]["lossless"]["identical"] == results[0]["lossless_served"]["identical"] == 6
    assert [m["acceptance_length"] for m in results[0]["datasets"]["quiz"]["measurements"]] == [3, 3, 6, 6]


def test_in_a_coarser_format_a_tie_is_wider(tmp_path: Path) -> None:
    """The baseline prefers 7 to 8 by 0.3 nats, and the answers differ there."""
    engine = Engine(0, logprobs={"token_id:7": -0.5, "token_id:8": -0.8})
    records = [{"id": "a", "prompt_ids": [1], "baseline": {"token_ids": [7]}, "speculative": {"token_ids": [8]}}]

    async def verdicts(dtype: str) -> tuple[int, int]:
        async with Client(engine.endpoint, concurrency=1, retries=0, timeout=9.0) as client:
            found = await evaluate._compare(client, records, dtype)
        return found["ties"], found["faults"]

    assert asyncio.run(verdicts("bfloat16")) == (1, 0)
    assert asyncio.run(verdicts("float32")) == (0, 1)
    engine.close()


@pytest.mark.parametrize(("temperature", "expected"), [(None, 0.6), (0.0, 0.0)])
def test_a_request_has_the_recipes_template_options_and_the_models_sampling(
    tmp_path: Path, temperature: float | None, expected: float
) -> None:
    job = job_of(tmp_path, sampling=Sampling.model)
    job.config.target.chat_template_kwargs = {"enable_thinking": False}
    job.inputs["target"] = tmp_path
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    sent: dict[str, Any] = {}

    class Recorder:
        async def chat(self, messages: Any, **fields: Any) -> None:
            sent.update(fields)

    prompt = choose(job, "quiz", RowCounts())[0]
    asyncio.run(evaluate._ask(job, Recorder(), prompt, "item", temperature=temperature))  # type: ignore[arg-type]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert (sent["temperature"], sent.get("top_k")) == (expected, 20 if temperature is None else None)
