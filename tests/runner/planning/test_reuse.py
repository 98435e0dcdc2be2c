"""The plan knows which answers the store has, whatever they were made for, and starts no server where it has all."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from speculators.answers import AnsweredRow, row_digest, row_line
from speculators.config import compose
from speculators.runner.planning import key
from speculators.runner.planning.explain import explain_stage
from speculators.runner.planning.plan import Planner, Step
from speculators.runner.planning.reuse import answers_identity
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import PREIMAGE, Store
from tests.conftest import publish

TALKS = ["what", "nothing", "why"]


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def planner_of(store: Store, *words: str) -> Planner:
    return Planner(compose.compose(["recipe=smollm2_eagle3", *words]), store)


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def index(texts: Sequence[str]) -> str:
    """`rows.jsonl`; to `nothing` there is no answer."""
    kept = [text for text in texts if text != "nothing"]
    rows = [
        AnsweredRow(digest=row_digest({"messages": messages(text)}), dropped=None, line=kept.index(text))
        if text in kept
        else AnsweredRow(digest=row_digest({"messages": messages(text)}), dropped="empty_answer", line=None)
        for text in texts
    ]
    return "".join(map(row_line, rows))


def make(store: Store, until: str, talks: Sequence[str], *words: str) -> None:
    """What a run over these conversations leaves, until this stage."""
    planner, digests = planner_of(store, *words), dict[str, str]()
    rows = "".join(json.dumps({"id": text, "messages": messages(text)}) + "\n" for text in talks)
    files = {"prompts": {"conversations.jsonl": rows}, "regenerate": {"rows.jsonl": index(talks)}}
    for name in planner.graph:
        step = planner.step(name, digests)
        if step.artifact is not None:
            digests[name] = step.digest
        elif name in files:
            work = store.work(name, step.key)
            (work / "data").mkdir(parents=True)
            for file, text in files[name].items():
                (work / "data" / file).write_text(text)
            told = {"preimage": step.preimage, "record": {}, "provenance": {"run": "earlier", "finished": "2026"}}
            digests[name] = store.publish(name, step.key, **told, digest=None).digest
        else:
            digests[name] = publish(store, planner, name, digests, f"{name} of {talks}")
        if name == until:
            return


def planned(store: Store, *words: str) -> Step:
    return next(step for step in planner_of(store, *words).plan() if step.node.name == "regenerate")


PREFILLED = "0 of 3 rows new, 2 prefilled again (a prefill computes all layers); "
CASES: dict[tuple[str, ...], tuple[str, bool]] = {
    ("speculator.target_layer_ids=[1,2]",): (f"{PREFILLED}changed: capture_layer_ids", True),
    ("extract.dtype=float32",): (f"{PREFILLED}changed: extract.dtype", True),
    ("speculator.target_layer_ids=[0,15]",): ("0 of 3 rows new; changed: capture_layer_ids", False),
    ("train.train_on_prompts=false",): ("0 of 3 rows new; changed: last_state", False),
    ("pipeline=offline",): ("0 of 3 rows new; changed: ", False),
    ("pipeline=online",): ("0 of 3 rows new; changed: ", False),
    ("prompts.num_conversations=385",): ("upstream: prompts; 3 answers in the store", True),
    ("regenerate.max_tokens=100",): ("changed: regenerate.max_tokens 160 -> 100", True),
    ("target.dtype=bfloat16",): ("changed: target.dtype", True),
    ("max_seq_len=512",): ("changed: max_seq_len", True),
    ("serve.extra_args=[--quantization,fp8]",): ("changed: serve.extra_args", True),
    ("target.chat_template_kwargs.enable_thinking=false",): ("changed: target.chat_template_kwargs", True),
    ("pipeline=offline", "force=regenerate"): ("forced", True),
}
"""Changes after a fused run over three conversations: the reason of `regenerate`, and whether it needs a server."""


def test_an_extraction_copies_from_those_of_the_same_layers_and_format(store: Store) -> None:
    offline = "pipeline=offline"
    make(store, "extract", TALKS, offline)
    more = (offline, "prompts.num_conversations=385")
    make(store, "tokenize", [*TALKS, "who"], *more)

    def extraction(*words: str) -> Step:
        return next(step for step in planner_of(store, *words).plan() if step.node.name == "extract")

    step = extraction(*more)
    assert step.reason == "rows with tokens of earlier rows are copied; upstream: tokens"
    assert [rows.hidden_states for rows in step.reuse.sources] == [next(iter(store.artifacts("extract"))).data]
    assert step.node.mode == "extract"
    for other in ("extract.dtype=float32", "speculator.target_layer_ids=[1]", "serve.extra_args=[--quantization,fp8]"):
        assert extraction(*more, other).reuse.sources == ()
    assert extraction(*more, "speculator.target_layer_ids=[15]").reuse.sources != ()
    parts = [step for step in planner_of(store, *more, "extract.workers=2").plan() if "extract" in step.node.name]
    assert [bool(step.reuse.sources) for step in parts] == [True, True, False], "the last one joins them"


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_the_plan_says_how_many_rows_are_new(store: Store, words: tuple[str, ...]) -> None:
    make(store, "regenerate", TALKS)
    assert planned(store).state.name == "cached"
    step = planned(store, *words)
    reason, served = CASES[words]
    assert step.reason.startswith(reason)
    assert bool(step.node.mode) == served
    assert step.reuse.sources == () or str(store.root) in str(step.reuse.sources[0].conversations)


def test_more_conversations_cost_their_own_answers(store: Store) -> None:
    make(store, "regenerate", TALKS)
    more = "prompts.num_conversations=385"
    make(store, "prompts", [*TALKS, "who"], more)
    assert planned(store, more).reason == "1 of 4 rows new; upstream: prompts"
    make(store, "regenerate", [*TALKS, "who"], more)
    fewer = planned(store, "pipeline=offline")
    assert [source.hidden_states for source in fewer.reuse.sources] == [None, None]
    assert len(planned(store, "speculator.target_layer_ids=[0,15]").reuse.artifacts) == 2


def test_what_a_killed_attempt_has_answered_counts_for_other_recipes(store: Store) -> None:
    make(store, "prompts", TALKS)
    step = planned(store)
    assert step.reason == "new"
    work = store.work("regenerate", step.key)
    (work / "scratch").mkdir(parents=True)
    (work / PREIMAGE).write_text(json.dumps(step.preimage))
    (work / "scratch/rows.jsonl").write_text(index(TALKS[:2]) + '{"digest": "cut')
    assert planned(store).reason == "new", "its own work directory is resumed from"
    assert planned(store, "pipeline=offline").reason.startswith("1 of 3 rows new; ")


def test_a_damaged_artifact_is_not_reused(store: Store) -> None:
    make(store, "regenerate", TALKS)
    artifact = next(iter(store.artifacts("regenerate")))
    (artifact.data / "rows.jsonl").unlink()
    assert planned(store, "pipeline=offline").reuse.sources == ()


def test_explain_says_the_same_and_follows_a_wait_to_its_root(store: Store) -> None:
    make(store, "regenerate", TALKS)
    explained = explain_stage(planner_of(store, "extract.dtype=float32"), "regenerate")
    assert explained.reason == f"{PREFILLED}changed: extract.dtype bfloat16 -> float32"
    waiting = explain_stage(planner_of(store, "prompts.num_conversations=385"), "tokenize")
    assert waiting.because.startswith("prompts: changed: ")


@pytest.mark.parametrize(("temperature", "same"), [(0.0, True), (0.7, False)])
def test_greedy_answers_of_version_1_are_found_and_sampled_ones_are_not(
    store: Store, temperature: float, same: bool
) -> None:
    """There, every request had the same seed, on which greedy answers do not depend."""
    sampling = f"regenerate.temperature={temperature}"
    make(store, "prompts", TALKS, sampling)
    step = planned(store, sampling)
    image = {**step.preimage, "version": 1}
    work = store.work("regenerate", key.digest(image))
    (work / "data").mkdir(parents=True)
    (work / "data/rows.jsonl").write_text(index(TALKS))
    told = {"preimage": image, "record": {}, "provenance": {}}
    store.publish("regenerate", key.digest(image), **told, digest=None)
    assert bool(planned(store, sampling).reuse.sources) == same


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["regenerate.on_loop=mask", "regenerate.on_cut=mask"], True),
        (["regenerate.on_loop=end"], False),
        (["regenerate.on_cut=drop"], False),
        (["serve.reasoning_parser=qwen3"], False),
        (["regenerate.concurrency=3"], True),
    ],
)
def test_a_masked_answer_is_the_one_that_was_kept(store: Store, words: list[str], same: bool) -> None:
    def identity(*words: str) -> str | None:
        return answers_identity(planner_of(store, *words).known("regenerate", {"target": "t"}))

    assert (identity(*words) == identity()) == same
