"""The parts of `evaluate` that need no server; `tests/smoke` runs it on the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.config.choices import DataFormat, Dtype
from speculators.config.schema import Config, Dataset
from speculators.data.conversations import RowCounts, in_evaluation_holdout
from speculators.engine.metrics import DraftCounters
from speculators.job import Job, write_json
from speculators.stages import evaluate
from speculators.stages.evaluate import choose, lossless_pair, summarise
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
    job = make_job("evaluate", tmp_path / "work", config, dataset__quiz=path)
    job.derived = {"phase": 0, "phases": 1}
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


def test_answers_are_compared_in_float32_whatever_the_target_is_served_in(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert lossless_pair(job) == ("baseline_float32", "speculative_float32")
    job.config.target.dtype = Dtype.float32
    assert lossless_pair(job) == ("baseline", "speculative")
    job.config.evaluate.lossless_prompts = 0
    assert lossless_pair(job) is None


def test_the_last_phase_publishes_what_the_earlier_ones_left_and_asks_no_server_again(tmp_path: Path) -> None:
    job = job_of(tmp_path, concurrency=[1, 4])
    counted = DraftCounters(drafts=5, proposed=15, accepted=5, accepted_per_position={1: 4, 2: 1, 3: 0})
    for concurrency, seconds in ((1, 2.0), (4, 1.0)):
        records = [record("quiz/1", ([1, 2], seconds), ([1, 2], seconds / 2))]
        summary = summarise(records, {"baseline": seconds, "speculative": seconds / 2}, counted, 3)
        write_json(job.scratch / f"measured-quiz-{concurrency}.json", {"summary": summary, "records": records})
    difference = {"id": "quiz/2", "position": 4, "baseline": 1, "speculative": 2, "gap": None, "verdict": "fault"}
    compared = {"prompts": 2, "tokens": 9, "identical": 1, "ties": 0, "faults": 1, "differences": [difference]}
    write_json(job.scratch / "lossless-quiz.json", compared)

    job.derived = {"phase": 0, "phases": 2}
    evaluate.main(job)
    assert not list(job.output.iterdir())

    job.derived = {"phase": 1, "phases": 2}
    evaluate.main(job)
    found = json.loads((job.output / "evaluation.json").read_text())
    assert found["datasets"]["quiz"]["acceptance_length"] == 2.0
    assert found["datasets"]["quiz"]["by_concurrency"]["4"]["baseline"]["tokens_per_second"] == 2.0
    assert found["lossless"]["faults"] == 1
    assert found["lossless"]["datasets"]["quiz"]["differences"] == [difference]
    assert job.record["lossless"]["faults"] == 1
    assert job.record["datasets"]["quiz"]["read"] == 100
    assert len(lines(job.output / "quiz.jsonl")) == 2
