"""What `plan` refuses: exit code 1, one `error:` that names the option, and one `hint:` that works."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speculators import cli
from speculators.packages import install_command
from tests.conftest import write_header
from tests.runner.machines import machine, pretend

RECIPE = """# @package _global_
defaults:
  - override /target: smollm2_135m
  - override /data: []
  - override /speculator: {speculator}
  - override /pipeline: {pipeline}
  - override /hardware: cpu
target: {{source: ./target, num_hidden_layers: null, hidden_size: null, vocab_size: null}}
data: {{mine: {{source: ./rows.jsonl, format: messages}}}}
evaluate: {{datasets: [{{ev: {{source: ./rows.jsonl, format: prompts}}}}]}}
"""
FACTS = {"num_hidden_layers": 8, "hidden_size": 8, "vocab_size": 40_000, "max_position_embeddings": 4096}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with rows, a target as far as planning looks into one, and recipes."""
    for speculator in ("eagle3", "dflash"):
        (tmp_path / f"{speculator}.yaml").write_text(RECIPE.format(speculator=speculator, pipeline="offline"))
    row = {"id": 1, "messages": [{"role": "user", "content": 20 * "a"}], "prompt": 20 * "a"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(FACTS))
    write_header(target / "model.safetensors", FACTS["vocab_size"], FACTS["hidden_size"])
    (target / "tokenizer.json").write_text("{}")
    (target / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, machine(0))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *words: str, recipe: str = "eagle3") -> tuple[int, str, str]:
    """Exit code of `plan`, its `error:` and its `hint:`."""
    code = cli._guarded(["plan", f"recipe={recipe}.yaml", *words])
    text = capsys.readouterr().err
    errors, hints = re.findall(r"^error: (.*)$", text, re.M), re.findall(r"^hint: (.*)$", text, re.M)
    assert len(errors) == len(hints) == (code != 0), text
    return code, *(found[0] if found else "" for found in (errors, hints))  # type: ignore[return-value]


def mended(words: tuple[str, ...], hint: str) -> tuple[str, ...]:
    """The overrides with the first `NAME=VALUE` of the hint in place of the one of that name."""
    found = re.search(r"([\w.]+)=(\[[^\]]*\]|\{[^}]*\}|[^\s,]+)", hint)
    assert found, hint
    return (*(word for word in words if word.partition("=")[0] != found[1]), found[0])


VALUES = [
    "train.max_grad_norm=0", "train.max_grad_norm=-3", "train.log_every_steps=0", "train.lr=0", "train.lr=nan",
    "train.lr=inf", "train.muon_lr=-1", "train.muon_momentum=1", "train.muon_weight_decay=-1",
    "train.weight_decay=-0.1",
    "train.adamw_betas=[0.9]", "train.adamw_betas=[0.9,1]", "train.adamw_eps=0", "train.epochs=0", "train.max_steps=0",
    "train.batch_tokens=0", "train.warmup_ratio=1", "train.decay_ratio=1.5", "train.ema=1", "train.validation_ratio=1",
    "train.loss_spike_factor=0.5", "train.early_stopping_patience=-1", "train.save_every_epochs=-1",
    "train.num_processes=0", "train.gradient_accumulation_steps=0", "train.prefetch_batches=0",
    "train.checkpoint_seconds=-1", "train.states_disk_gib=-1", "train.muon_block=-1", "train.device=cuda",
    "hardware.device=cuda", "hardware.gpus=-1", "regenerate.concurrency=0", "extract.concurrency=0",
    "evaluate.concurrency=[0]", "evaluate.concurrency=[]", "regenerate.temperature=-1", "evaluate.temperature=-0.5",
    "regenerate.top_p=0", "regenerate.max_tokens=0", "regenerate.max_tokens=2048", "regenerate.timeout=0",
    "regenerate.retries=-1", "extract.workers=0", "extract.shard_tokens=0", "evaluate.datasets=[]",
    "evaluate.num_prompts=0", "evaluate.num_speculative_tokens=[0]", "evaluate.max_tokens=0",
    "evaluate.max_tokens=5000", "evaluate.lossless_prompts=-1",
    "prompts.num_conversations=0", "prompts.max_turns=0", "prompts.eval_holdout_ratio=1",
    "prompts.eval_holdout_ratio=-1",
    "vocab.size=0", "vocab.size=40001", "tokenize.min_supervised=-1", "max_seq_len=1", "max_seq_len=4096",
    "max_seq_len=100000", "speculator.num_layers=0", "speculator.target_layer_ids=[]",
    "speculator.target_layer_ids=[-1]",
    "speculator.target_layer_ids=[9]", "speculator.num_speculative_tokens=0", "speculator.num_attention_heads=0",
    "speculator.hidden_loss_weight=-1", "speculator.ttt_steps=0", "speculator.ttt_warmup_ratio=2",
    "speculator.ttt_step_decay=0", "serve.port=70000", "serve.kv_cache_gib=0", "serve.max_num_seqs=0",
    "serve.gpu_memory_utilization=0", "serve.tensor_parallel=0", "serve.mooncake.segment_gib=0", "executor.cpus=0",
    "executor.time_limit=0", "run.retries=-1", "run.quota_gib=nan", "target.min_greedy_agreement=2",
    "target.max_reference_gib=-1", "data.mine.max_chars=0", "data.mine.min_chars=-1",
    "train.seed=-1", "train.seed=9223372036854775808", "prompts.seed=-1", "regenerate.seed=99999999999999999999",
    "speculator.num_layers=99999999999999999999", "train.adamw_betas=[nan,0.9]", "serve.url=foo", "serve.url=ftp://x",
    "serve.url=http://x:99999", "serve.extra_urls=[http://]", "serve.cpu_threads=foo",
    "evaluate.temperature=0.7",
    "tokenize.min_supervised=100000", "train.num_processes=1000", "speculator.loss_fn=[]", "speculator.loss_fn=[kl,tv]",
]  # fmt: skip
"""Overrides that cannot work; what the hint says instead does."""


@pytest.mark.parametrize("word", VALUES)
def test_plan_checks_name_the_option_and_its_value_and_their_hint_works(
    world: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    code, error, hint = planned(capsys, word)
    assert (code, word.partition("=")[0] in error) == (1, True), error
    assert ": " in error, "the constraint"
    assert planned(capsys, *mended((word,), hint)) == (0, "", "")


@pytest.mark.parametrize(
    "word",
    [
        "speculator.decay_gamma=0", "speculator.dpace_alpha=1.5", "speculator.target_layers=0",
        "speculator.sliding_window=0", "speculator.max_anchors=0", "speculator.mask_token_id=-1",
        "speculator.mask_token_id=40000",
        "speculator.loss_fn=kl", "speculator.block_size=1", "speculator.num_speculative_tokens=16",
        "evaluate.num_speculative_tokens=[3,16]",
    ],
)  # fmt: skip
def test_plan_checks_of_a_block_draft(world: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, error, hint = planned(capsys, word, recipe="dflash")
    assert (code, word.partition("=")[0] in error) == (1, True), error
    assert planned(capsys, *mended((word,), hint), recipe="dflash")[0] == 0


def given(world: Path, **fields: object) -> str:
    """A draft as far as planning looks into one; returns the override that names it."""
    directory = world / "given" / "checkpoint_best"
    directory.mkdir(parents=True, exist_ok=True)
    layer = {"hidden_size": 8, "vocab_size": 40_000}
    methods = {"proposal_methods": [{"speculative_tokens": 7}]}
    config = {"speculators_model_type": "dflash", "block_size": 8, "speculators_config": methods}
    (directory / "config.json").write_text(json.dumps({**config, "transformer_layer_config": layer, **fields}))
    (directory / "model.safetensors").write_bytes(b"weights")
    return "evaluate.draft=given/checkpoint_best"


def test_plan_checks_a_draft_that_is_only_measured_and_asks_for_no_other_stage(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--servers", "recipe=eagle3.yaml", "pipeline=evaluate", given(world)]
    words += ["evaluate.num_speculative_tokens=[2,5]"]
    assert cli._guarded(words) == 0
    output = capsys.readouterr().out
    assert [line.split()[:2] for line in output.splitlines() if line.startswith(("run", "waits"))] == [
        ["run", "evaluate"]
    ]
    served = [json.loads(text) for text in re.findall(r"--speculative_config '(.*?)'", output)]
    assert [(s["method"], s["num_speculative_tokens"]) for s in served] == [("dflash", 2), ("dflash", 5)] * 2
    assert {s["model"] for s in served} == {str(world / "given" / "checkpoint_best")}


@pytest.mark.parametrize(
    ("words", "fields", "named"),
    [
        (("evaluate.draft=given/checkpoint_best",), {}, "no stage of the recipe measures it"),
        (("pipeline=evaluate", "evaluate.draft=given"), {}, "evaluate.draft: `given` has no config.json"),
        (("pipeline=evaluate", "evaluate.draft=given/checkpoint_best", "evaluate.num_speculative_tokens=[8]"), {},
         "evaluate.num_speculative_tokens=[8]: must be at most 7"),
        (("pipeline=evaluate",), {}, "evaluate.draft: names no draft"),
        (("pipeline=evaluate", "evaluate.draft=given/checkpoint_best", "speculator.num_speculative_tokens=3"), {},
         "speculator.num_speculative_tokens=3: is of a draft that the recipe trains"),
        (("pipeline=evaluate", "evaluate.draft=nowhere"), {}, "evaluate.draft: `nowhere` does not exist"),
        (("pipeline=evaluate", f"evaluate.draft='pypi:a==1/b@sha256:{64 * '0'}'"), {}, "evaluate.draft: `pypi:a==1"),
        (("pipeline=evaluate", "evaluate.draft=given/checkpoint_best"), {"target_hidden_size": 9},
         "evaluate.draft=given/checkpoint_best: the draft reads hidden states of width 9"),
    ],
)  # fmt: skip
def test_plan_checks_what_a_draft_does_not_fit(
    world: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], fields: dict[str, object], named: str
) -> None:
    given(world, **fields)
    code, error, hint = planned(capsys, *words)
    assert (code, named in error, bool(hint)) == (1, True, True), error
    if "[8]" in words[-1] or words[-1] == "evaluate.draft=given" or (len(words) == 1 and "draft" in words[0]):
        assert planned(capsys, *mended(words, hint))[0] == 0


COMBINED = [
    (("prompts.eval_holdout_ratio=0", "evaluate.datasets=[mine]"), "prompts.eval_holdout_ratio=0"),
    (("until=train", "from=evaluate"), "from=evaluate"),
    (("until=train", "force=[evaluate]"), "force=evaluate"),
    (("data.mine.max_chars=10", "data.mine.min_chars=20"), "data.mine.max_chars=10"),
    (("speculator.fc_norm=true",), "speculator.fc_norm=true"),
    (("evaluate.datasets=[human]",), "evaluate.datasets"),
    (("evaluate.datasets=[{other: {source: gone.jsonl, format: prompts}}]",), "evaluate.datasets.other.source"),
    (("data.mine.source=gone.jsonl",), "data.mine.source"),
    (("pipeline=online", "executor=slurm"), "executor=slurm"),
    (("learning_rate=1e-3",), "learning_rate"),
    *(((f"{group}=null",), f"{group}=null") for group in ("target", "data", "speculator", "pipeline", "hardware")),
    (("speculator=5",), "speculator"),
    (("from=null",), "from: "),
    (("+data.target.source=X",), "data.target.source"),
    (("data.x.source=X",), "data.x"),
    (("~data.mine",), "data.mine"),
    (("target.source=''",), "target.source=''"),
    (("train.lr=${oc.env:NOPE}",), "train.lr"),
    (("max_seq_len=${nope}",), "max_seq_len"),
    (("run.stages={trian: {time_limit: 1}}",), "run.stages: the recipe has no stage `trian`"),
    (("run.stages.train.timelimit=1",), "run.stages.train.timelimit"),
    (("run.stages.train.time_limit=x",), "run.stages.train.time_limit"),
    (("run.stages=5",), "run.stages=5: must be a mapping"),
    (("data.mien.max_chars=5",), "data.mien.source"),
    (("data.mien=null",), "data.mien"),
    (("data.mine.sorce=rows.jsonl",), "data.mine.sorce"),
    (("data.mine=5",), "data.mine is 5"),
    (("data={new: {source: rows.jsonl}}",), "data={'new'"),
    (("+data.new.source=rows.jsonl",), "+data.new.source"),
    (("train=5",), "train=5: must be a mapping"),
    (("run=[1]",), "run=[1]: must be a mapping"),
    (("evaluate=null",), "evaluate=null: must be a mapping"),
    (("serve.url='http://x:1?a=b'",), "serve.url=http://x:1?a=b: must be http://HOST:PORT"),
    (("serve.url=http://a", "serve.extra_urls=[http://A:80/]"), "serve.extra_urls"),
    (("serve.baseline_url=foo", "serve.speculative_url=http://x"), "serve.baseline_url=foo"),
    (("serve.baseline_url=http://x:99999", "serve.speculative_url=http://x"), "serve.baseline_url=http://x:99999"),
    (("serve.baseline_url=http://a", "serve.speculative_url=http://u:p@b"), "serve.speculative_url contains a secret"),
    (("serve.baseline_url=http://localhost:1", "serve.speculative_url=http://127.0.0.1:1/"), "serve.speculative_url"),
    (("evaluate.datasets=[{mine: {source: rows.jsonl, format: prompts}}]",), "evaluate.datasets.mine"),
    (("speculator.algorithm=dflash",), "speculator.algorithm=dflash"),
    (("speculator=dflash", "speculator.algorithm=eagle3"), "speculator.algorithm=eagle3"),
    (("until=extract", "only=train"), "until=extract"),
    (("only=train",), "only=train"),
    (("pipeline=fused", "regenerate.temperature=0.7"), "regenerate.temperature=0.7"),
    (("pipeline=fused", "regenerate.temperatures=[0,1]"), "regenerate.temperatures=[0.0, 1.0]"),
    (("hardware.train_cores=100", "pipeline=online"), "hardware.train_cores=100"),
    (("serve.extra_urls=[http://x]",), "serve.extra_urls"),
    (("serve.extra_args=[--port,1]",), "serve.extra_args"),
    (("serve.extra_args=[--no_enable-prefix-caching]",), "serve.extra_args"),
    (("run.dir=rows.jsonl",), "run.dir=rows.jsonl"),
    (("run.store=rows.jsonl",), "rows.jsonl"),
    (("serve.url=http://x", "serve.hidden_states_dir=nowhere", "until=extract"), "serve.hidden_states_dir=nowhere"),
    ((f"evaluate.datasets=[{{{'n' * 201}: {{source: rows.jsonl, format: prompts}}}}]",), "dataset `nnn"),
]


@pytest.mark.parametrize(("words", "named"), COMBINED, ids=[words[0] for words, _ in COMBINED])
def test_plan_checks_of_options_that_do_not_fit(
    world: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    code, error, hint = planned(capsys, *words)
    assert (code, named in error, bool(hint)) == (1, True, True), error
    if words[0].startswith(("prompts.", "until=train", "data.mine.max", "speculator.", "only=", "hardware.t")):
        kept = tuple(word for word in words if not word.startswith(("until=", "only=")))
        assert planned(capsys, *mended(kept, hint))[0] == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", ["eagle3", "dflash"])
def test_plan_checks_leave_shallow_targets_alone(
    world: Path, capsys: pytest.CaptureFixture[str], depth: int, recipe: str
) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | {"num_hidden_layers": depth}))
    assert planned(capsys, recipe=recipe) == (0, "", "")
    code, _, hint = planned(capsys, f"speculator.target_layer_ids=[{depth + 1}]", recipe=recipe)
    assert code == 1
    assert planned(capsys, *mended((f"speculator.target_layer_ids=[{depth + 1}]",), hint), recipe=recipe)[0] == 0


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_plan_checks_that_the_targets_config_says_what_is_needed(
    world: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (world / "target" / "config.json").write_text(json.dumps({k: v for k, v in FACTS.items() if k != missing}))
    code, error, hint = planned(capsys)
    assert code == 1
    assert error == f"target.source={world}/target: its config.json has no {missing}"
    assert "target.source=DIRECTORY" in hint
    assert planned(capsys, f"target.{missing}={FACTS[missing]}")[0] == 0, "the recipe may say what the file leaves out"


def test_plan_checks_that_the_targets_config_is_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "target" / "config.json").write_text("{")
    code, error, _ = planned(capsys)
    assert (code, error.startswith("target.source: ")) == (1, True)


def test_plan_checks_the_chat_template(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "target" / "tokenizer_config.json").write_text("{}")
    code, error, hint = planned(capsys)
    assert (code, error) == (1, f"target.source={world}/target: its tokenizer has no chat template")
    assert "chat_template.jinja" in hint
    (world / "target" / "chat_template.jinja").write_text("{{ messages }}")
    assert planned(capsys)[0] == 0


def test_plan_checks_that_code_of_the_target_is_trusted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | {"auto_map": {"AutoConfig": "own.Config"}}))
    code, error, hint = planned(capsys)
    assert (code, error.startswith("target.trust_remote_code=false: ")) == (1, True)
    assert planned(capsys, *mended((), hint))[0] == 0


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_plan_checks_that_the_port_is_free(world: Path, capsys: pytest.CaptureFixture[str], taken: int) -> None:
    code, error, hint = planned(capsys, f"serve.port={taken}")
    assert (code, error) == (1, f"serve.port={taken}: the port is in use")
    assert planned(capsys, *mended((f"serve.port={taken}",), hint))[0] == 0
    assert planned(capsys, f"serve.port={taken}", "until=prompts")[0] == 0, "no server is started for it"


def test_plan_checks_what_an_executor_needs(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, error, hint = planned(capsys, "train.executor=slurm")
    assert (code, "train" in error, hint) == (1, True, install_command("slurm"))


def test_plan_checks_no_data_set_to_measure_on_where_nothing_is_measured(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(capsys, "evaluate.datasets=[]", "until=train")[0] == 0


def test_a_server_takes_what_its_stage_needs_and_never_more_tokens_than_the_target_has_positions(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for longest, lengths in ((4095, ["4096"] * 4), (1000, ["1001", "1001", "1128", "1128"])):
        words = [f"max_seq_len={longest}", "evaluate.max_tokens=128"]
        _, server = (
            cli._guarded(["plan", "recipe=eagle3.yaml", "--servers", *words, "target.dtype=float32"]),
            capsys.readouterr(),
        )
        assert re.findall(r"--max-model-len (\d+)", server.out) == lengths


def test_a_length_that_the_recipe_leaves_open_follows_the_target(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | {"max_position_embeddings": 2048}))
    assert cli._guarded(["plan", "recipe=eagle3.yaml", "--servers"]) == 0
    out = capsys.readouterr().out
    assert set(re.findall(r"--max-model-len (\d+)", out)) == {"2048"}
    assert "note: max_seq_len=2047: the target has 2048 positions" in out


def test_plan_checks_rows_and_answers_against_few_positions(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | {"max_position_embeddings": 512}))
    code, error, hint = planned(capsys)
    assert (code, hint) == (1, "max_seq_len=511 regenerate.max_tokens=256")
    assert "512 positions" in error
    assert planned(capsys, *hint.split())[0] == 0


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [
        ({"tie_word_embeddings": False}, {}, "is the output head, such as lm_head.weight"),
        ({}, {"model.embed_tokens.weight": None}, "is the input embeddings, such as embed_tokens.weight"),
        ({}, {"model.norm.weight": None}, "is the final norm"),
        ({}, {"model.norm.bias": [8]}, "is a LayerNorm"),
        ({"model_type": "cohere2"}, {}, "is a LayerNorm"),
        ({}, {"model.embed_tokens.weight": [40_064, 8]}, "has the shape [40064, 8], by config.json it is [40000, 8]"),
        ({"tie_word_embeddings": False}, {"lm_head.weight": [40_000, 8]}, ""),
        ({}, {"model.embed_tokens.weight": None, "backbone.embeddings.weight": [40_000, 8]}, ""),
    ],
)  # fmt: skip
def test_plan_checks_the_tensors_that_training_reads_before_anything_is_served(
    world: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], shapes: dict[str, Any], message: str
) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | config))
    write_header(world / "target" / "model.safetensors", FACTS["vocab_size"], FACTS["hidden_size"], **shapes)
    code, error, hint = planned(capsys)
    assert (code, message in error, bool(hint)) == (bool(message), True, bool(message)), error
    if message:
        assert planned(capsys, "until=regenerate")[0] == 0, "an answer needs none of them"


def test_plan_checks_the_data_of_a_recipe_that_names_none(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "none.yaml").write_text("target: {source: ./target}\nevaluate: {datasets: [human_eval]}")
    code, error, hint = planned(capsys, recipe="none")
    assert (code, error) == (1, "data={}: the recipe names no dataset to train on")
    assert planned(capsys, *mended((), hint), recipe="none")[0] == 0


def test_plan_shows_the_mask_token_and_notes_one_that_answers_contain(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"<|end|>": 39_999}
    (world / "target" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    settings = {"chat_template": "{{ messages }}", "eos_token": "<|end|>"}
    (world / "target" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert cli._guarded(["plan", "recipe=dflash.yaml"]) == 0
    out = capsys.readouterr().out
    assert "mask_token_id=39999" in out
    assert "note: speculator.mask_token_id: 39999 is `<|end|>`, which answers contain" in " ".join(out.split())
    for words in (["recipe=dflash.yaml", "speculator.mask_token_id=5"], ["recipe=eagle3.yaml"]):
        assert cli._guarded(["plan", *words]) == 0
        assert "mask_token_id" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1]", "own.yaml"), ("defaults: 5", "own.yaml: `defaults`"), ("train: 5", "own.yaml: train=5"),
        ("evaluate: 5", "own.yaml: evaluate=5"), ("data: [1]", "own.yaml: data=[1]"), ("run: x", "own.yaml: run=x"),
        ("speculator: 3", "own.yaml: speculator=3"), ("serve: {mooncake: 5}", "own.yaml: serve.mooncake=5"),
        ("run: {stages: 5}", "own.yaml: run.stages=5"), ("train: null", "own.yaml: train=null"),
        ("hydra: 5", "hydra=5"),
        ("defaults: [5]", "own.yaml: `defaults` has 5"), ("defaults: [{a: {b: c}}]", "own.yaml: `defaults` has {'a'"),
        ("defaults: [own, _self_]", "own -> own"), ("defaults: [other, _self_]", "own -> other -> own"),
        ("defaults: [{/recipe: other}, _self_]", "own -> other -> own"), ("", "target.source"), ("text", "`text`"),
        ("_target_: os.system", "_target_"), ("train: {_target_: x}", "train._target_"), ('"": 1', "option ``"),
        ("train: {lr: [1]}", "own.yaml: train.lr"),
        ("run: {stages: {train: {timelimit: 1}}}", "run.stages.train.timelimit"),
        ("evaluate: {datasets: 5}", "own.yaml: evaluate.datasets"), ("speculator: null", "speculator"),
    ],
)  # fmt: skip
def test_plan_checks_name_the_recipe_that_cannot_be_composed(
    world: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    (world / "own.yaml").write_text(text)
    (world / "other.yaml").write_text("defaults: [/recipe/own, _self_]")
    code, error, hint = planned(capsys, recipe="own")
    assert (code, named in error, bool(hint)) == (1, True, True), error


def test_plan_adds_names_from_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("data.new.source=more.jsonl", "data.new.format=messages"),
        ("data.new={source: more.jsonl, format: messages}",),
        ("data=[]", "data.new.source=more.jsonl", "data.new.format=messages", "evaluate.datasets=[new]"),
        ("run.stages.train.time_limit=7200",),
        ("run.stages={train: {time_limit: 7200}}", "run.stages.extract.retries=1"),
    ):
        (world / "more.jsonl").write_text((world / "rows.jsonl").read_text())
        assert planned(capsys, *words) == (0, "", "")
    assert cli._guarded(["plan", "recipe=eagle3.yaml", "data.new.source=more.jsonl", "data.new.format=messages"]) == 0
    assert "dataset.new " in capsys.readouterr().out


@pytest.mark.parametrize("form", ["tokens", "null"])
def test_token_ids_are_refused_where_the_target_answers(
    world: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    (world / "tokens.jsonl").write_text('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    words: tuple[str, ...] = (f"data.mine.format={form}", "data.mine.source=tokens.jsonl")
    code, error, hint = planned(capsys, *words)
    assert (code, "data.mine" in error, "token ids" in error) == (1, True, True)
    assert planned(capsys, *mended(words, hint)) == (0, "", "")
    measured = f"evaluate.datasets=[{{t: {{source: tokens.jsonl, format: {form}}}}}]"
    code, error, hint = planned(capsys, *mended(words, hint), measured)
    assert (code, "evaluate.datasets.t" in error, hint.endswith("a dataset of text")) == (1, True, True)


def test_length_of_answers_is_no_matter_where_nothing_is_regenerated(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("regenerate.max_tokens=4095", "max_seq_len=2048")
    code, error, _ = planned(capsys, *words)
    assert (code, "regenerate.max_tokens" in error) == (1, True)
    assert planned(capsys, *words, "pipeline=off_policy") == (0, "", "")
    (world / "target" / "config.json").write_text(json.dumps({**FACTS, "max_position_embeddings": 512}))
    assert planned(capsys, "evaluate.max_tokens=64", "pipeline=off_policy") == (0, "", "")
    _, _, hint = planned(capsys, "max_seq_len=900", "evaluate.max_tokens=64", "pipeline=off_policy")
    assert "regenerate" not in hint


FILES = [
    ("new.jsonl", "", "evaluate.datasets.new.source=new.jsonl: data set `new`: new.jsonl is empty"),
    ("new.jsonl", "text\n", "evaluate.datasets.new.source=new.jsonl"),
    ("new.jsonl", b"\xff\xfe\x00", "evaluate.datasets.new.source=new.jsonl"),
    ("new.jsonl", '{"id": 1, "text": "a"}\n', "evaluate.datasets.new.source=new.jsonl"),
    ("new.jsonl", None, "evaluate.datasets.new.source: the directory `new.jsonl` has no data files"),
    ("rows.jsonl", "", "rows.jsonl: data set"),
    ("target/tokenizer.json", "text", "tokenizer.json is not JSON"),
    ("target/tokenizer.json", '{"model": {"voc', "tokenizer.json is not JSON"),
    ("target/tokenizer.json", b"\xff{}", "tokenizer.json is not JSON"),
    ("target/tokenizer.json", "[]", "tokenizer.json contains no JSON object"),
    ("target/tokenizer_config.json", '{"chat_template": "{{ messages "}', "line 1 of the chat template"),
    ("target/chat_template.jinja", "{% for m in messages %}\n", "of the chat template"),
    ("target/chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ("target/generation_config.json", "{", "generation_config.json is not JSON"),
    ("target/model.safetensors.index.json", '{"weight_map": {}}', "model.safetensors.index.json"),
    ("target/model.safetensors.index.json", '{"weight_map": {"a": 5}}', "model.safetensors.index.json"),
    ("target/model.safetensors", None, "model.safetensors: Is a directory"),
    ("target/config.json", "[]", "config.json"),
    ("target/config.json", b"\xff", "config.json"),
    ("target/config.json", None, "has no config.json"),
]
"""A file, its content (None: a directory in its place), and what the error names."""


@pytest.mark.parametrize(("file", "content", "named"), FILES)
def test_plan_checks_the_files_that_late_stages_read(
    world: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | bytes | None, named: str
) -> None:
    words = ["evaluate.datasets=[{new: {source: new.jsonl, format: prompts}}]"] if file == "new.jsonl" else []
    (world / file).unlink(missing_ok=True)
    if content is None:
        (world / file).mkdir()
    else:
        (world / file).write_bytes(content.encode() if isinstance(content, str) else content)
    code, error, hint = planned(capsys, *words)
    assert (code, named in error, bool(hint)) == (1, True, True), error


def test_plan_checks_a_vocabulary_of_another_structure(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "target" / "tokenizer.json").write_text('{"model": 5}')
    code, error, _ = planned(capsys, recipe="dflash")
    assert (code, "has no tokens in its tokenizer.json" in error) == (1, True), error


def test_plan_checks_no_data_of_stages_that_do_not_run(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "new.jsonl").write_text("")
    words = ["evaluate.datasets=[{new: {source: new.jsonl, format: prompts}}]"]
    assert planned(capsys, *words, "until=train")[0] == 0
    assert cli._guarded(["recipe=eagle3.yaml", *words]) == 1, "a run is refused like its plan"
    assert "evaluate.datasets.new.source=new.jsonl" in capsys.readouterr().err


def test_plan_takes_what_chat_templates_of_transformers_contain(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    (world / "target" / "chat_template.jinja").write_text(text)
    assert planned(capsys)[0] == 0


def test_plan_needs_no_home_unless_a_path_does(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    code, error, hint = planned(capsys, "run.store='~/store'")
    assert (code, "home directory" in error, "HOME=" in hint) == (1, True, True), error


def test_plan_takes_what_a_recipe_may_say(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "force: train\nfrom: tokenize\nrun: {stages: {train: {time_limit: 7200}}}\n"
    (world / "null.yaml").write_text((world / "eagle3.yaml").read_text() + more)
    assert planned(capsys, recipe="null")[0] == 0
    for name in ("n\u00e9", "2024", "it's"):
        (world / f"{name}.yaml").write_text((world / "eagle3.yaml").read_text())
        assert planned(capsys, recipe=name)[0] == 0


def test_a_sweep_is_checked_before_its_first_job(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._guarded(["-m", "recipe=eagle3.yaml", "train.lr=1e-3,nan"]) == 1
    assert "train.lr=NaN" in capsys.readouterr().err
    assert not [path for path in world.glob("runs/*") if "sweep" not in path.name], "no job has begun"


@pytest.mark.parametrize("value", [0, -1, True, "8"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "num_attention_heads", "max_position_embeddings"])
def test_plan_checks_that_sizes_of_the_target_are_positive(
    world: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    (world / "target" / "config.json").write_text(json.dumps(FACTS | {name: value}))
    code, error, _ = planned(capsys)
    assert (code, f"its config.json has {name}={value!r}" in error) == (1, True), error
