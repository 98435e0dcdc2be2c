"""Wiring: what is refused, what is added, and the order."""

from __future__ import annotations

import pytest

from speculators.config import compose
from speculators.config.choices import Dtype
from speculators.config.schema import Config
from speculators.errors import RecipeError
from speculators.runner.planning import graph
from speculators.runner.planning.plan import Planner
from speculators.runner.servers import vllm
from speculators.runner.store.artifacts import Store


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "engine_version", lambda python: "1.2.3")


def test_order_is_that_of_the_data(config: Config) -> None:
    names = [n for n in graph.build(config) if n != "target" and not n.startswith("dataset.")]
    assert names == ["prompts", "regenerate", "tokenize", "vocab", "extract", "train", "evaluate"]


def test_sources_become_nodes_of_their_own(config: Config) -> None:
    nodes = graph.build(config)
    assert nodes["regenerate"].inputs == {"prompts": "prompts", "target": "target"}
    assert nodes["prompts"].inputs == {"dataset.sharegpt": "dataset.sharegpt"}
    assert set(nodes["evaluate"].inputs) == {"speculator", "target", "dataset.sharegpt", "dataset.human_eval"}
    assert nodes["target"].fetch_as == "checkpoint"


def test_a_service_is_no_node(config: Config) -> None:
    assert "serve" not in graph.build(config)


def test_a_second_node_of_a_kind_names_it(config: Config) -> None:
    config.pipeline["evaluate_again"] = {"uses": "evaluate", "speculator": "train"}
    assert graph.build(config)["evaluate_again"].kind == "evaluate"


@pytest.mark.parametrize(
    ("node", "wiring", "message", "hint"),
    [
        ("trian", {}, "there is no stage `trian`", "did you mean `train`?"),
        ("vocab", {"token": "tokenize"}, "`vocab` has no input `token`", "did you mean `tokens`?"),
        ("vocab", {}, "the input `tokens` is not wired", "of type tokens"),
        ("vocab", {"tokens": "tokenise"}, "there is no node `tokenise`", "did you mean `tokenize`?"),
        ("vocab", {"tokens": "train"}, "`train` gives speculator, this input takes tokens", "`tokenize`"),
        ("extract", {"tokens": "tokenize", "target": "train"}, "`train` gives speculator", "`serve`"),
        ("target", {"uses": "prompts"}, "this name is reserved", "another name"),
        *((name, {"uses": "prompts"}, f"`{name}` cannot name a node", "letters") for name in ("", "..", "a/b", "a.1")),
        ("train", {"tokens": "tokenize", "vocab": "vocab"}, "the input `features` is not wired", "`target: serve`"),
        (
            "train",
            {"tokens": "tokenize", "vocab": "vocab", "features": "extract", "target": "serve"},
            "`features` come from `extract` or from a server, not from both",
            "remove `features` or `target`",
        ),
        ("train", {"tokens": "tokenize", "vocab": "vocab", "target": "vocab"}, "`vocab` gives vocabulary", "`serve`"),
    ],
)
def test_wiring_that_does_not_fit_is_refused(
    config: Config, node: str, wiring: dict[str, str], message: str, hint: str
) -> None:
    config.pipeline[node] = wiring
    with pytest.raises(RecipeError) as caught:
        graph.build(config)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_circle_is_refused_with_its_nodes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.pipeline = {
        "a": {"uses": "vocab", "tokens": "b"},
        "b": {"uses": "vocab", "tokens": "a"},
    }
    monkeypatch.setitem(
        graph.KINDS, "vocab", graph.Kind(version=1, gives=("tokens",), takes={"tokens": "tokens"}, target=False)
    )
    with pytest.raises(RecipeError, match=r"depend on each other: .*a.*b"):
        graph.build(config)


def test_a_node_keeps_states_where_another_takes_them_and_is_served_and_keyed_so(store: Store) -> None:
    fused = Planner(compose.compose(["recipe=smollm2_eagle3", "pipeline=fused"]), store)
    offline = Planner(compose.compose(["recipe=smollm2_eagle3", "pipeline=offline"]), store)
    modes = [[s.mode for p in graph.phases(planner.graph["regenerate"], planner.config) for s in p]
             for planner in (fused, offline)]  # fmt: skip
    assert modes == [["extract"], ["generate"]]
    assert fused.graph["extract"].kind == "collect"
    digests = dict.fromkeys(fused.graph, "d")
    images = [planner.step("regenerate", digests).preimage["config"] for planner in (fused, offline)]
    assert set(images[0]) - set(images[1]) == {
        "capture_layer_ids",
        "last_state",
        "extract.dtype",
        "extract.shard_tokens",
    }


def test_training_is_wired_to_a_server_or_to_features_and_keyed_by_which(store: Store) -> None:
    planners = {
        name: Planner(compose.compose(["recipe=smollm2_eagle3", f"pipeline={name}"]), store)
        for name in ("offline", "online", "hybrid")
    }
    images, modes = {}, {}
    for name, planner in planners.items():
        digests = dict.fromkeys(planner.graph, "d")
        images[name] = planner.step("train", digests).preimage
        modes[name] = [s.mode for p in graph.phases(planner.graph["train"], planner.config) for s in p]
    assert modes == {"offline": [], "online": ["extract"], "hybrid": ["extract"]}
    assert "extract" not in planners["online"].graph
    assert images["online"] == images["hybrid"], "where states are kept meanwhile makes no difference"
    offline, online = images["offline"], images["online"]
    assert set(online["config"]) - set(offline["config"]) == {"extract.dtype"}
    assert set(offline["inputs"]) - set(online["inputs"]) == {"features"}
    assert (offline["service"], online["service"]) == ({}, {"engine": "1.2.3"})
    assert online["version"] == offline["version"]


def test_evaluation_in_float32_needs_one_phase_and_in_bfloat16_two(config: Config) -> None:
    node = graph.build(config)["evaluate"]
    assert [[s.name for s in p] for p in graph.phases(node, config)] == [["baseline", "speculative"]]
    config.target.dtype = Dtype.bfloat16
    assert [[s.name for s in p] for p in graph.phases(node, config)] == [
        ["baseline", "speculative"],
        ["baseline_float32", "speculative_float32"],
    ]
    config.evaluate.lossless_prompts = 0
    assert len(graph.phases(node, config)) == 1


def test_each_number_of_speculative_tokens_is_a_phase_beside_the_baseline(config: Config) -> None:
    node, config.evaluate.num_speculative_tokens = graph.build(config)["evaluate"], [3, 5, 3]
    config.target.dtype = Dtype.bfloat16
    found = [[(s.name, s.num_speculative_tokens) for s in phase] for phase in graph.phases(node, config)]
    assert found == [
        [("baseline", None), ("speculative", 3)],
        [("baseline", None), ("speculative", 5)],
        [("baseline_float32", None), ("speculative_float32", 3)],
        [("baseline_float32", None), ("speculative_float32", 5)],
    ]


def offline() -> Config:
    return compose.compose(["recipe=smollm2_eagle3", "pipeline=offline"])


def test_workers_of_an_extraction_come_before_it_and_move_no_key(store: Store) -> None:
    config = offline()
    alone = Planner(config, store)
    config.extract.workers = 2
    planner = Planner(config, store)
    nodes = planner.graph
    assert [name for name in nodes if name.startswith("extract")] == ["extract.1", "extract.2", "extract"]
    assert (nodes["extract"].mode, nodes["extract.1"].mode) == ("", "extract")
    assert nodes["extract"].inputs == alone.graph["extract"].inputs
    digests = dict.fromkeys(alone.graph, "d")
    planner.derived = alone.derived = {"layer_ids": [2], "capture_layer_ids": [2, 4], "last_state": "answers"}
    keys = {name: planner.step(name, digests).key for name in ("extract.1", "extract.2", "extract")}
    assert keys["extract"] == alone.step("extract", digests).key
    assert len(set(keys.values())) == 3


def test_forcing_an_extraction_forces_its_workers() -> None:
    config = offline()
    config.extract.workers, config.force = 2, ["extract"]
    assert graph.forced_nodes(graph.build(config), config) == {"extract", "extract.1", "extract.2"}
